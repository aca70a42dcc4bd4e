"""The benchmark of the training job runs; what it measures depends on the machine."""

import json
import re
import signal
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torchvision import transforms

from benchmarks import training as benchmark
from benchmarks.stored import read
from tests.benchmarks.stopping import assert_ends_with_all_it_started
from training import data, recipe

REPORTS = [name for name in recipe.names() if recipe.load(name).report is not None]


pytestmark = pytest.mark.usefixtures("sample")


def test_figures_stay_where_a_later_recipe_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "training.json"
    arguments = ["--recipes", "A1", "A3", "--seconds", "0.05", "--rounds", "1", "--figures", str(path)]
    path.write_text("of a complete run")
    assert benchmark.main(arguments) == 1
    partial = path.with_name("training.json.partial")
    said = capsys.readouterr()
    assert "error: 500 images are fewer than a batch of 512" in said.err
    assert f"what was measured before is in {partial}" in said.err
    assert said.out.startswith("| recipe |")
    assert path.read_text() == "of a complete run"

    written = json.loads(partial.read_text())
    assert (written["n"], written["seconds"]) == (1, 0.05)
    assert written["packages"]["torch"] == version("torch")
    assert written["device"]
    assert written["commit"]
    assert written["date"]
    (rates,) = written["rates"]
    assert (rates["recipe"], rates["batch_size"], rates["precision"]) == ("A1", 128, "float32")
    for loop in ("job", "plain", "job_without_augmentation"):
        assert len(rates[loop]) == 1
        assert all(rate > 0 for rate in rates[loop])
    assert {file.name for file in tmp_path.iterdir()} == {path.name, partial.name}


def test_ctrl_c_is_no_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(benchmark, "compare", lambda *arguments: signal.raise_signal(signal.SIGINT))
    arguments = ["--recipes", "A1", "--figures", str(tmp_path / "training.json")]
    assert benchmark.main(arguments) == 130
    assert capsys.readouterr().err == "interrupted\n"
    assert list(tmp_path.iterdir()) == []


def test_a_stop_ends_all_processes(tmp_path: Path) -> None:
    figures = str(tmp_path / "training.json")
    assert_ends_with_all_it_started(
        *("benchmarks.training", "--recipes", "A1", "--seconds", "60", "--figures", figures),
        begun=_measures,
    )


def _measures(member: psutil.Process) -> bool:
    """Whether it is the pool's worker, which has torch's threads."""
    return bool(member.cpu_times().user > 1 and "forkserver" in " ".join(member.cmdline()))


def test_figures_become_a_table_without_a_plain_loop_for_a_recipe_of_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    small = recipe.load("fast", ["batch_size=100", "model.widths=[16,16,16]"])
    Path("small.toml").write_text(small.to_toml())
    arguments = ["--seconds", "0.05", "--rounds", "1", "--figures", "new/training.json"]
    assert benchmark.main(["--recipes", "small.toml", *arguments]) == 0
    printed = capsys.readouterr().out
    (rates,) = read(benchmark.Figures, Path("new/training.json")).rates
    assert (rates.plain, rates.ratio) == ([], None)
    assert re.search(r"\| small\.toml \| 100 \| \w+ \| [\d,]+ \|  \|  \| [\d,]+ \| \d+ % \|", printed)

    assert benchmark.main(["--markdown", "--figures", "new/training.json"]) == 0
    assert capsys.readouterr().out == printed


def test_table_has_medians_and_their_ratios() -> None:
    rates = benchmark.Rates(
        recipe="A2",
        batch_size=128,
        precision="bfloat16",
        plain_precision="float32",
        job=[900.0, 1200.0, 1000.0],
        plain=[400.0, 10.0, 500.0],
        job_without_augmentation=[1000.0, 1250.0, 1300.0],
    )
    figures = benchmark.Figures(
        date="2026-01-02T03:04:05+00:00",
        commit="0123456789abcdef",
        device="a processor",
        python="3.11",
        packages={"torch": "2"},
        n=3,
        seconds=10,
        rates=[rates],
    )
    table = benchmark.markdown(figures)
    assert "| A2 | 128 | bfloat16 (float32) | 1,000 | 400 | 2.50 | 1,250 | 80 % |" in table
    assert "medians of n=3 interleaved measurements of 10 s" in table
    assert "commit 0123456789ab, 2026-01-02" in table


CROP, FLIP = transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()
# What each report does with images before and after their normalisation.
TRANSFORMS: dict[str, tuple[list[Any], list[Any]]] = {
    "A": ([CROP, FLIP], [transforms.RandomErasing(0.5, (0.02, 0.33), (0.3, 3.3), 0.0)]),
    "B": (
        [
            CROP,
            FLIP,
            transforms.ColorJitter(0.3, 0.3, 0.3, 0.1),
            transforms.RandomRotation(20),
            transforms.RandomAffine(0, (0.1, 0.1)),
        ],
        [],
    ),
    "C": (
        [
            transforms.RandomRotation(10),
            transforms.ColorJitter(0.1, 0.1, 0.1),
            FLIP,
            transforms.RandomAdjustSharpness(2.0, 0.2),
            CROP,
        ],
        [transforms.RandomErasing(0.2, (0.02, 0.1), (0.3, 3.3), 1.0)],
    ),
    "D": (
        [CROP, FLIP, transforms.ColorJitter(0.2, 0.2, 0.2), transforms.RandomRotation(15)],
        [transforms.RandomErasing(0.5, (0.02, 0.2), (0.3, 3.3), 0.0)],
    ),
    "E": (
        [
            FLIP,
            CROP,
            transforms.ColorJitter(0.2, 0.2, 0.2),
            transforms.AutoAugment(transforms.AutoAugmentPolicy.CIFAR10),
            transforms.RandomRotation(15),
        ],
        [],
    ),
}


@pytest.mark.parametrize("name", REPORTS)
def test_plain_loop_transforms_as_the_report_says(name: str) -> None:
    chosen = recipe.load(name)
    composed = benchmark.transform(chosen)
    images = benchmark.PILImages(data.load_sample().train, composed)
    image, label = images[3]
    assert (image.dtype, image.shape) == (torch.float32, (3, 32, 32))
    assert label == data.load_sample().train.labels[3]
    before, after = TRANSFORMS[name[0]]
    normalise = transforms.Normalize(chosen.data.mean, chosen.data.std)
    expected = [*before, transforms.ToTensor(), normalise, *after]
    assert list(map(repr, composed.transforms)) == list(map(repr, expected))


def test_plain_loop_trains_on_what_the_job_trains_on() -> None:
    dataset = data.load_sample()
    chosen = recipe.load("A1", ["batch_size=150", "data.validation=0.1"])
    for loop in (benchmark.job, benchmark.plain, benchmark.job_without_augmentation):
        steps = loop(chosen, dataset)
        # 450 of the 500 images are trained on: three batches, so the fourth is of the next epoch.
        assert [next(steps) for _ in range(4)] == [150] * 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recipes", "A9"], "no recipe 'A9'"),
        (["--rounds", "0"], "--rounds has to be at least 1"),
        (["--markdown", "--figures", "nowhere.json"], "no figures at nowhere.json"),
    ],
)
def test_wrong_arguments_are_one_clear_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert benchmark.main(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error


def test_missing_data_set_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(data.ROOT_VARIABLE, str(tmp_path))
    assert benchmark.main(["--recipes", "A1"]) == 1
    assert f"CIFAR-10 is not there: {tmp_path / data.FOLDER}" in capsys.readouterr().err
