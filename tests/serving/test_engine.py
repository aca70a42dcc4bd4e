import logging
import re
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from onnxruntime import InferenceSession
from onnxruntime.capi.onnxruntime_pybind11_state import InvalidArgument

from serving import engine as engines
from serving.engine import Engine
from serving.errors import ProviderError
from serving.model import Model
from serving.providers import CPU, CUDA, OPENVINO, TENSORRT, obstacle
from serving.settings import BUNDLED_MODEL, ProviderName

Images = npt.NDArray[np.uint8]
ModelFile = Callable[..., Path]

PLUG_IN = "onnxruntime_ep_openvino"
needs_openvino = pytest.mark.skipif(
    obstacle("openvino") is not None, reason="OpenVINO's plug-in is not for this machine"
)
without_gpu = pytest.mark.skipif(obstacle("cuda") is None, reason="CUDA goes before the others")


@needs_openvino
def test_openvino_computes_what_the_cpu_provider_computes(images: Images) -> None:
    expected = Engine(BUNDLED_MODEL, "cpu", 1).run(images[:200])
    engine = Engine(BUNDLED_MODEL, "openvino", 1)
    assert (engine.provider, engine.reason) == (OPENVINO, "asked for by name")
    actual = engine.run(images[:200])
    # No closer, since OpenVINO computes in bfloat16 where the processor multiplies it natively.
    assert np.abs(actual - expected).max() <= 0.05 * np.abs(expected).max()
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
def test_auto_measures_and_takes_the_fastest(model_file: ModelFile) -> None:
    engine = Engine(model_file(), "auto", 1)
    rates = {
        name: float(rate.replace(",", ""))
        for name, rate in re.findall(r"(\w+Provider) ([\d,]+)", engine.reason)
    }
    assert set(rates) == {CPU, OPENVINO}
    assert rates[engine.provider] == max(rates.values()) > 0


@without_gpu
def test_without_the_plug_in(model_file: ModelFile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, PLUG_IN, None)  # how Python marks a module that cannot be imported
    with pytest.raises(
        ProviderError, match=r"pip install onnxruntime-ep-openvino.* SERVING_PROVIDER=cpu"
    ):
        Engine(model_file(), "openvino", 1)
    engine = Engine(model_file(), "auto", 1)
    assert engine.provider == CPU
    assert "pip install onnxruntime-ep-openvino" in engine.reason


@without_gpu
@pytest.mark.skipif(find_spec(PLUG_IN) is None, reason="there is no wheel for this machine")
def test_on_a_processor_that_the_plug_in_does_not_take(
    model_file: ModelFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serving.providers._openvino_cpu", lambda: None)
    with pytest.raises(ProviderError, match=r"takes Intel's\. Or set SERVING_PROVIDER=cpu"):
        Engine(model_file(), "openvino", 1)
    engine = Engine(model_file(), "auto", 1)
    assert engine.provider == CPU
    assert "takes no processor of this machine" in engine.reason


@without_gpu
def test_a_plug_in_that_does_not_start_is_left_out(
    model_file: ModelFile, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def damaged() -> None:
        raise OSError("libopenvino.so: file too short")

    monkeypatch.setattr("serving.providers._openvino_cpu", damaged)
    monkeypatch.setattr("serving.engine.obstacle", lambda name: None if name == "openvino" else "none")
    with caplog.at_level(logging.WARNING, "serving"):
        engine = Engine(model_file(), "auto", 1)
    assert (engine.provider, engine.reason) == (CPU, "there is no other that starts")
    assert "libopenvino.so: file too short" in caplog.text


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
    run = engines._logits

    def recorded(session: object, batch: Images) -> npt.NDArray[np.float32]:
        sizes.append(len(batch))
        return run(session, batch)

    monkeypatch.setattr(engines, "_logits", recorded)
    return sizes


def test_a_gpus_batches_are_padded_to_few_sizes(
    model_file: ModelFile, images: Images, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(model_file(), "cpu", 1)
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
    assert sizes == [8, 8]


@pytest.mark.parametrize("provider", ["cpu", pytest.param("openvino", marks=needs_openvino)])
def test_runs_at_the_same_time_share_the_threads(
    images: Images, provider: ProviderName, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(BUNDLED_MODEL, provider, 2, runs=2)
    with pytest.raises(InvalidArgument, match="invalid dimensions"):
        engine.run(images[:8, :16])  # a run that fails must count as over, too
    alone = engine.run(images[:8])
    both_began, sessions = threading.Barrier(engine.runs, timeout=60), []
    run = engines._logits

    def recorded(session: InferenceSession, batch: Images) -> npt.NDArray[np.float32]:
        sessions.append(session)
        both_began.wait()
        return run(session, batch)

    monkeypatch.setattr(engines, "_logits", recorded)
    with ThreadPoolExecutor(engine.runs) as threads:
        results = list(threads.map(engine.run, [images[:8]] * engine.runs))
    assert [session.get_providers()[0] for session in sessions] == [engine.provider] * 2
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
