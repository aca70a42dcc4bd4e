"""The benchmark of inference runs; what it measures depends on the machine."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import pytest
import torch
from torch._dynamo.utils import counters

from benchmarks import engines
from benchmarks import inference as benchmark
from benchmarks.engines import Variant
from benchmarks.stored import BenchmarkError, read
from export import metadata
from serving.model import Model
from serving.providers import obstacle
from serving.settings import BUNDLED_MODEL
from tests import ROOT
from tests.compiler import needs_a_compiler
from training import data, recipe

SIZES = [1, 2]


@pytest.fixture
def images() -> npt.NDArray[np.uint8]:
    pixels: npt.NDArray[np.uint8] = data.load_sample().test.pixels[:8].numpy()
    return pixels


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "BATCH_SIZES", SIZES)


def test_figures_are_written_and_become_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(benchmark, "PYTORCH_BATCH", 2)
    path = tmp_path / "inference.json"
    small = ["--seconds", "0.01", "--rounds", "1", "--rows", "70", "--figures", str(path)]
    assert benchmark.main(["--models", "A1", "--precisions", "int8", *small]) == 0
    printed = capsys.readouterr().out

    figures = read(benchmark.Figures, path)
    assert (figures.n, figures.seconds) == (1, 0.01)
    assert figures.packages["torch"]
    measured = {(rates.engine, rates.precision) for rates in figures.rates}
    assert measured >= {
        *(("onnxruntime", "fp32"), ("service:cpu", "fp32"), ("service:cpu", "int8")),
        *(("pytorch:fp32", "fp32"), ("pytorch:bf16", "bf16")),
    }
    for rates in figures.rates:
        assert list(rates.rates) == SIZES
        assert all(len(each) == 1 and each[0] > 0 for each in rates.rates.values())
        (memory,) = rates.memory
        assert 10 < memory < 10_000
    assert [(times.precision, times.rows) for times in figures.submissions] == [
        ("fp32", 70),
        ("int8", 70),
    ]
    for times in figures.submissions:
        assert times.submit[0] > times.engine_alone[0] > 0
    assert [file.name for file in tmp_path.iterdir()] == ["inference.json"]

    assert benchmark.main(["--markdown", "--figures", str(path)]) == 0
    assert capsys.readouterr().out == printed


def test_tables_have_medians_and_their_ratios() -> None:
    def rates(engine: str, *each: float) -> benchmark.Rates:
        begun = benchmark.Rates.begin("B1", engine, "fp32")
        measured = {size: list(each) for size in (1, 128)}
        return begun.model_copy(update={"rates": measured, "memory": [99.6]})

    times = benchmark.Submissions(
        model="B1",
        engine="service:cpu",
        precision="fp32",
        rows=10_000,
        submit=[9.0, 8.0, 50.0],
        engine_alone=[7.0, 1.0, 8.0],
    )
    figures = benchmark.Figures(
        date="2026-01-02T03:04:05+00:00",
        commit="0123456789abcdef",
        device="a processor",
        python="3.11",
        packages={"onnxruntime": "1"},
        n=3,
        seconds=2,
        rates=[
            rates("onnxruntime", 100.0, 10.0, 200.0),
            rates("service:cpu", 150.0, 150.0, 1000.0),
            rates("pytorch:fp32", 50.0, 50.0, 50.0),
        ],
        submissions=[times],
    )
    tables = benchmark.markdown(figures)
    assert "| B1 | plain ONNX Runtime | fp32 | 100 (1) | 100 (1) | 100 |" in tables
    assert "| B1 | service, CPU provider | fp32 | 150 (5) | 150 (5) | 100 |" in tables
    assert "| B1 | eager PyTorch | fp32 | 50 (0.5) | 50 (0.5) | 100 |" in tables
    assert "| B1 | fp32 | 10,000 | 9.0 | 7.0 | 200.0 | 22.2 |" in tables
    text = tables.replace("\n", " ")
    assert "n=3 interleaved measurements of 2 s (the highest is 6.67 times the lowest" in text
    assert "whose peak memory (RSS, n=1) is the last column" in text
    assert "Python 3.11, onnxruntime 1; commit 0123456789ab, 2026-01-02." in tables.replace("\n", " ")

    alone = figures.model_copy(update={"rates": figures.rates[1:], "submissions": []})
    (table, text) = benchmark.markdown(alone).split("\n\n")
    assert "| B1 | service, CPU provider | fp32 | 150 | 150 | 100 |" in table
    assert text.startswith("Images per second by batch size: medians of n=3 ")
    assert "commit 0123456789ab" in text.replace("\n", " ")


def test_engines_can_be_chosen(tmp_path: Path) -> None:
    path = tmp_path / "inference.json"
    chosen = ["--models", "A1", "--precisions", "int8", "--engines", "onnxruntime"]
    small = ["--seconds", "0.01", "--rounds", "1", "--figures", str(path)]
    assert benchmark.main([*chosen, *small]) == 0
    figures = read(benchmark.Figures, path)
    assert [(rates.engine, rates.precision) for rates in figures.rates] == [("onnxruntime", "fp32")]
    assert figures.submissions == []


def test_a_recipes_network_in_each_precision() -> None:
    with benchmark.built(["A1"], ["int8", "fp16"]) as (model,):
        assert (model.name, list(model.files)) == ("A1", ["fp32", "fp16", "int8"])
        for precision, file in model.files.items():
            assert Model(file, "cpu", 1).metadata["precision"] == precision
        if obstacle("cuda"):
            assert benchmark.engines("fp16", model.files["fp16"]) == []
        operators = {node.op_type for node in onnx.load(model.files["int8"]).graph.node}
        assert {"QuantizeLinear", "DequantizeLinear", "Conv"} <= operators


def test_a_measurements_process_has_no_more_than_its_engine_needs(tmp_path: Path) -> None:
    """Otherwise PyTorch's libraries would count as memory of other engines."""
    code = (
        "import sys; from pathlib import Path; from benchmarks.engines import ENGINES, Variant; "
        f"ENGINES['service:cpu'](Variant(Path({str(BUNDLED_MODEL)!r}), 'accurate', 'flip')); "
        "print(sorted({'torch', 'onnx', 'openvino', 'bentoml'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "[]\n"


def test_the_bundled_model_is_measured_with_the_views_that_its_file_has() -> None:
    bundled = metadata.read(onnx.load(BUNDLED_MODEL))
    assert bundled.members[0].views == "flip"
    assert recipe.load(bundled.name).views == "flip_shift"
    assert benchmark._recipe(bundled.name).views == "flip"
    assert benchmark._recipe("fast") == recipe.load("fast")


def test_input_and_output_stay_bound_from_batch_to_batch(images: npt.NDArray[np.uint8]) -> None:
    variant = Variant(BUNDLED_MODEL, "accurate", "flip")
    plain, bound = engines.onnxruntime(variant), engines.bound("cpu", "cpu")(variant)
    for batch in (images[:2], images[2:4], images[4:5], images[:2]):
        np.testing.assert_allclose(bound(batch), plain(batch), atol=1e-5)


@needs_a_compiler
def test_pytorch_is_compiled(images: npt.NDArray[np.uint8]) -> None:
    logits, graphs, stats = [], [], counters["stats"]
    for engine in (engines.pytorch("fp32"), engines.pytorch("fp16", compiled=True)):
        torch.manual_seed(0)
        before = stats["unique_graphs"]
        logits.append(engine(Variant(Path(), "A1", "flip"))(images))
        graphs.append(stats["unique_graphs"] - before)
    assert graphs == [0, 1]
    np.testing.assert_allclose(logits[1], logits[0], atol=1e-2)
    assert (logits[1] != logits[0]).any()


def test_a_submission_is_run_in_its_batches() -> None:
    batches: list[int] = []

    def run(images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        batches.append(len(images))
        return np.zeros((len(images), 10), np.float32)

    assert engines.submission_seconds(run, 150) > 0
    assert batches == [64, 64, 64, 22]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "A9"], "no recipe 'A9'"),
        pytest.param(
            ["--models", "A1", "--engines", "bound:cuda"],
            "none of these engines runs here: bound:cuda",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="it runs here"),
        ),
        (["--rounds", "0"], "--rounds and --rows have to be at least 1"),
        (["--markdown", "--figures", "nowhere.json"], "no figures at nowhere.json"),
    ],
)
def test_wrong_arguments_are_one_clear_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert benchmark.main(arguments) == 1
    error = capsys.readouterr().err
    assert "error: " in error
    assert message in error


def test_an_engine_that_fails_is_named(tmp_path: Path) -> None:
    file = tmp_path / "text.onnx"
    file.write_text(json.dumps({}))
    with pytest.raises(BenchmarkError, match=r"onnxruntime with text\.onnx failed: "):
        benchmark.apart("onnxruntime", Variant(file, "A1", "none"), "--rows", "1")
