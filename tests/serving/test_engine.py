import logging
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnxruntime.capi.onnxruntime_pybind11_state import InvalidArgument

from serving.engine import Engine
from serving.errors import ProviderError
from serving.model import Model
from serving.openvino import FULL_PRECISION, OpenVINOSession
from serving.providers import CPU, CUDA, OPENVINO, TENSORRT, obstacle
from serving.sessions import OnnxRuntimeSession
from serving.settings import BUNDLED_MODEL, ProviderName
from tests.openvino import needs_openvino
from tests.serving.models import METADATA

Images = npt.NDArray[np.uint8]
ModelFile = Callable[..., Path]

without_gpu = pytest.mark.skipif(obstacle("cuda") is None, reason="CUDA goes before the others")


@needs_openvino
def test_openvino_computes_what_the_cpu_provider_computes(images: Images) -> None:
    expected = Engine(BUNDLED_MODEL, "cpu", 1).run(images)
    engine = Engine(BUNDLED_MODEL, "openvino", 1)
    assert (engine.provider, engine.reason) == (OPENVINO, "asked for by name")
    actual = engine.run(images)
    # No closer, since bfloat16, in which OpenVINO computes what is not int8 where the processor
    # multiplies it natively, puts some values on another of int8's steps.
    assert np.sqrt(np.square(actual - expected).mean()) <= 0.02 * np.abs(expected).max()
    assert (actual.argmax(1) == expected.argmax(1)).mean() >= 0.99


@needs_openvino
@pytest.mark.parametrize("count", [1, 3, 64])
def test_openvino_takes_any_batch_in_any_strides(
    model_file: ModelFile, images: Images, count: int
) -> None:
    engine = Engine(model_file(), "openvino", 1)
    planes = np.ascontiguousarray(images[:count].transpose(0, 3, 1, 2))
    logits = engine.run(planes.transpose(0, 2, 3, 1))
    assert logits.shape == (count, 10)
    assert logits.dtype == np.float32
    np.testing.assert_array_equal(logits, engine.run(images[:count]))


@needs_openvino
@without_gpu
@pytest.mark.parametrize(("gain", "taken"), [(0.0, OPENVINO), (1e9, CPU)])
def test_auto_measures_and_takes_openvino_if_it_is_clearly_faster(
    model_file: ModelFile, gain: float, taken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serving.engine.OPENVINO_GAIN", gain)
    engine = Engine(model_file(), "auto", 2, runs=2)
    rates = {
        name: float(rate.replace(",", ""))
        for name, rate in re.findall(rf"({CPU}|{OPENVINO}) ([\d,]+),", engine.reason)
    }
    assert "by 2 batches of 8 at a time" in engine.reason
    assert min(rates[CPU], rates[OPENVINO]) > 0
    assert engine.provider == taken


@needs_openvino
@without_gpu
def test_processes_that_share_a_choice_take_the_same_provider(
    model_file: ModelFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, choice = model_file(), tmp_path / "choice"
    found = []
    for gain in (0.0, 1e9):
        monkeypatch.setattr("serving.engine.OPENVINO_GAIN", gain)
        engine = Engine(path, "auto", 2, runs=2, choice=choice)
        found.append((engine.provider, engine.reason))
    assert found[0][0] == OPENVINO
    assert found[1] == found[0]
    assert Engine(path, "auto", 2, runs=2).provider == CPU, "which decides for itself"


@without_gpu
def test_a_choice_that_cannot_be_used_is_made_anew(
    model_file: ModelFile, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, choice = model_file(), tmp_path / "choice"
    for former in ('["tensorrt", "it was the fastest"]', '["cpu", "its writer was kil'):
        choice.write_text(former)
        with caplog.at_level(logging.WARNING, "serving"):
            engine = Engine(path, "auto", 1, choice=choice)
        assert engine.provider in (CPU, OPENVINO)
        assert Engine(path, "auto", 1, choice=choice).reason == engine.reason
    assert caplog.text.count("Going on without it.") == 1
    assert Engine(path, "auto", 1, choice=tmp_path / "gone" / "choice").provider in (CPU, OPENVINO)


@without_gpu
def test_without_openvino(model_file: ModelFile, monkeypatch: pytest.MonkeyPatch) -> None:
    # How Python marks a module that cannot be imported.
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(ProviderError, match=r"`pip install openvino`.* SERVING_PROVIDER=cpu"):
        Engine(model_file(), "openvino", 1)
    engine = Engine(model_file(), "auto", 1)
    assert engine.provider == CPU
    assert "`pip install openvino`" in engine.reason


@without_gpu
def test_an_openvino_that_does_not_start_is_left_out(
    model_file: ModelFile, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def damaged() -> None:
        raise OSError("libopenvino.so: file too short")

    monkeypatch.setattr("serving.openvino.core", damaged)
    monkeypatch.setattr("serving.sessions.obstacle", lambda name: None)
    with caplog.at_level(logging.WARNING, "serving"):
        engine = Engine(model_file(), "auto", 1)
    assert (engine.provider, engine.reason) == (CPU, "there is no other that starts")
    assert "OpenVINO does not run the model: libopenvino.so: file too short" in caplog.text


@needs_openvino
def test_openvino_computes_a_file_in_full_precision_that_asks_for_it(
    model_file: ModelFile, images: Images, tmp_path: Path
) -> None:
    """On a processor that multiplies bfloat16, it otherwise takes that."""
    path = model_file(METADATA | {FULL_PRECISION: "true"})
    expected = Engine(path, "cpu", 1).run(images)
    actual = Engine(path, "openvino", 1).run(images)
    np.testing.assert_allclose(actual, expected, atol=1e-5 * np.abs(expected).max())
    bundled, asking = onnx.load(BUNDLED_MODEL), tmp_path / "asking.onnx"
    bundled.metadata_props.add(key=FULL_PRECISION, value="true")
    onnx.save(bundled, asking)
    expected = Engine(BUNDLED_MODEL, "cpu", 1).run(images[:200])
    actual = Engine(asking, "openvino", 1).run(images[:200])
    assert np.abs(actual - expected).max() <= 0.05 * np.abs(expected).max()
    assert (actual.argmax(1) == expected.argmax(1)).mean() >= 0.99


@needs_openvino
def test_openvino_does_not_report_to_its_makers(tmp_path: Path) -> None:
    """Its import otherwise starts a process that does, and leaves an identity in the user's home."""
    program = f"""
import sys
from pathlib import Path
from serving.engine import Engine
assert Engine(Path({str(BUNDLED_MODEL)!r}), "openvino", 1).provider == "OpenVINO"
print([name for name in sys.modules if "telemetry" in name and name.startswith("openvino")])
"""
    known = {"HOME": str(tmp_path), "PATH": os.environ["PATH"]}  # CI would keep it from reporting
    done = subprocess.run(
        [sys.executable, "-c", program], env=known, capture_output=True, text=True, timeout=300
    )
    assert (done.stdout, done.stderr) == ("[]\n", "")
    assert list(tmp_path.iterdir()) == []


@needs_openvino
def test_signals_are_received_after_sessions_with_openvino_have_gone() -> None:
    """Each of OpenVINO's cores changes the stack on which Python receives them."""
    program = f"""
import signal
from pathlib import Path
from serving.engine import Engine
engines = [Engine(Path({str(BUNDLED_MODEL)!r}), "openvino", 1) for count in range(3)]
while engines:
    del engines[0]
signal.signal(signal.SIGTERM, lambda number, frame: print("received", number))
signal.raise_signal(signal.SIGTERM)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (0, "received 15\n", "")


@needs_openvino
def test_many_threads_may_run_openvino_at_a_time(images: Images) -> None:
    engine = Engine(BUNDLED_MODEL, "openvino", 2, runs=2)
    counts = [1 + index % 5 for index in range(80)]
    expected = engine.run(images[:5])
    with ThreadPoolExecutor(16) as threads:
        results = list(threads.map(lambda count: engine.run(images[:count]), counts))
    kept = [result.copy() for result in results]
    engine.run(images[5:10])
    for count, result, copy in zip(counts, results, kept, strict=True):
        assert np.abs(result - expected[:count]).max() <= 0.05 * np.abs(expected).max()
        np.testing.assert_array_equal(result, copy)  # no later run writes into it


@pytest.mark.parametrize(("name", "full_name"), [("cuda", CUDA), ("tensorrt", TENSORRT)])
def test_a_gpu_asked_for_by_name_is_there_or_an_error(
    model_file: ModelFile, name: ProviderName, full_name: str
) -> None:
    """On a machine with a GPU the engine runs there; on any other the error says what to do."""
    if obstacle(name) is None:
        assert Engine(model_file(), name, 1).provider == full_name
    else:
        with pytest.raises(ProviderError, match=r"`pip install 'onnxruntime-gpu.* SERVING_PROVIDER=cpu"):
            Engine(model_file(), name, 1)


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Records the sizes of the batches that sessions run."""
    sizes: list[int] = []
    run = OnnxRuntimeSession.run

    def recorded(session: OnnxRuntimeSession, batch: Images) -> npt.NDArray[np.float32]:
        sizes.append(len(batch))
        return run(session, batch)

    monkeypatch.setattr(OnnxRuntimeSession, "run", recorded)
    return sizes


def test_a_gpus_batches_are_padded_to_few_sizes(
    model_file: ModelFile, images: Images, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(model_file(), "cpu", 1)
    sizes.clear()
    expected = engine.run(images[:5])
    monkeypatch.setattr(engine, "_pads", True)
    np.testing.assert_allclose(engine.run(images[:5]), expected, rtol=1e-5)
    assert sizes == [5, 8]
    sizes.clear()
    engine.warm_up(24)
    assert sizes == [32, 16, 8, 4, 2, 1]
    for count in range(1, 25):
        assert len(engine.run(images[:count])) == count
    assert set(sizes) == {1, 2, 4, 8, 16, 32}


def test_on_a_cpu_each_session_runs_one_batch_of_single_images_at_start(
    model_file: ModelFile, sizes: list[int]
) -> None:
    model = Model(model_file(), "cpu", 2, runs=2, max_batch_size=64)
    assert (model.chunk_size, model.batch_size) == (32, 8)
    assert sizes == [1, 1, 8, 8]


@pytest.mark.parametrize("provider", ["cpu", pytest.param("openvino", marks=needs_openvino)])
def test_runs_at_the_same_time_share_the_threads(
    images: Images, provider: ProviderName, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(BUNDLED_MODEL, provider, 2, runs=2)
    with pytest.raises((InvalidArgument, RuntimeError), match=r"invalid dimensions|incompatible with"):
        engine.run(images[:8, :16])  # a run that fails must count as over, too
    alone = engine.run(images[:8])
    both_began, sessions = threading.Barrier(engine.runs, timeout=60), list[Any]()
    kind: Any = OpenVINOSession if provider == "openvino" else OnnxRuntimeSession
    run = kind.run

    def recorded(session: object, batch: Images) -> npt.NDArray[np.float32]:
        sessions.append(session)
        both_began.wait()
        logits: npt.NDArray[np.float32] = run(session, batch)
        return logits

    monkeypatch.setattr(kind, "run", recorded)
    with ThreadPoolExecutor(engine.runs) as threads:
        results = list(threads.map(engine.run, [images[:8]] * engine.runs))
    assert [type(session) for session in sessions] == [kind] * 2
    if kind is OnnxRuntimeSession:
        assert [session.session.get_providers()[0] for session in sessions] == [engine.provider] * 2
    assert len(set(sessions)) == 2
    for result in results:
        assert np.abs(result - alone).max() <= 0.05 * np.abs(alone).max()


@pytest.mark.parametrize("provider", ["cpu", pytest.param("openvino", marks=needs_openvino)])
def test_a_single_thread_is_not_shared(model_file: ModelFile, provider: ProviderName) -> None:
    assert Engine(model_file(), provider, 1, runs=2).runs == 1


def test_a_run_needs_as_many_images_as_its_threads_take(model_file: ModelFile) -> None:
    path = model_file()
    enough = [Engine(path, "cpu", *many).enough for many in [(1, 2), (2, 2), (4, 2), (4, 1)]]
    assert enough == [8, 8, 16, 32]
