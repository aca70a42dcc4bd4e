"""Real runs of real recipes on the bundled sample, through the command line."""

import json
import os
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

from training import checkpoint, data, recipe, results
from training.__main__ import main
from training.model import CLASSES, build

SMALL = ["--epochs", "1", "--limit", "12", "--set", "batch_size=4"]


@pytest.fixture(autouse=True)
def _sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(data.ROOT_VARIABLE, str(data.SAMPLE))


@pytest.mark.parametrize("name", recipe.names())
def test_every_recipe_trains_a_few_steps(name: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    before = results.RESULTS.read_bytes() if results.RESULTS.exists() else None
    assert main(["run", name, "--out", str(out), *SMALL]) == 0

    resolved = recipe.load(out / "recipe.toml")
    assert resolved == recipe.load(name, ["epochs=1", "batch_size=4"])
    (line,) = [json.loads(text) for text in (out / "metrics.jsonl").read_text().splitlines()]
    assert line["epoch"] == 1
    assert line["train_loss"] > 0
    assert ("val_loss" in line) == (resolved.data.validation > 0)
    state = checkpoint.load(out / "checkpoint.pt")
    assert state.parsed_recipe() == resolved
    assert state.classes == list(CLASSES)
    assert state.result is not None
    assert state.result["test_images"] == 12
    torch.manual_seed(0)  # the run's own seed: its network before the first step
    initial = build(resolved.model).named_parameters()
    trained = state.network().get_parameter
    assert all(not torch.equal(p, trained(key)) for key, p in initial if p.requires_grad)
    # A trial leaves no row.
    after = results.RESULTS.read_bytes() if results.RESULTS.exists() else None
    assert after == before


def start(out: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "training", *more]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("uninterrupted") / "run"
    os.environ[data.ROOT_VARIABLE] = str(data.SAMPLE)
    assert main(["run", "A1", "--out", str(out), "--epochs", "3", "--seed", "7"]) == 0
    return out


@pytest.mark.parametrize(
    ("signum", "code"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -signal.SIGKILL)],
)
def test_interrupted_run_resumes_to_the_same_weights(
    uninterrupted: Path, tmp_path: Path, signum: signal.Signals, code: int
) -> None:
    out = tmp_path / "run"
    process = start(out, "run", "A1", "--out", str(out), "--epochs", "3", "--seed", "7")
    assert process.stdout is not None
    assert any(line.startswith("epoch 1") for line in process.stdout)
    process.send_signal(signum)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == code
    if signum != signal.SIGKILL:
        assert f"go on with: python -m training resume {out}" in errors
        state = checkpoint.load(out / "checkpoint.pt")
        assert (state.epoch, state.result) == (1, None)
        assert state.step > 0
    assert main(["resume", str(out)]) == 0

    expected = checkpoint.load(uninterrupted / "checkpoint.pt")
    actual = checkpoint.load(out / "checkpoint.pt")
    assert actual.model.keys() == expected.model.keys()
    assert all(torch.equal(actual.model[key], expected.model[key]) for key in expected.model)
    same = {"epoch", "lr", "train_loss", "train_accuracy"}
    assert [{k: line[k] for k in same} for line in actual.history] == [
        {k: line[k] for k in same} for line in expected.history
    ]
    lines = (out / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [1, 2, 3]


def test_training_learns(uninterrupted: Path) -> None:
    history = checkpoint.load(uninterrupted / "checkpoint.pt").history
    assert history[-1]["train_loss"] < history[0]["train_loss"] < 2.31


def test_finished_run_gives_its_result_again(
    uninterrupted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (uninterrupted / "checkpoint.pt").read_bytes()
    assert main(["resume", str(uninterrupted)]) == 0
    assert "test accuracy" in capsys.readouterr().out
    assert (uninterrupted / "checkpoint.pt").read_bytes() == before


def test_second_run_takes_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert main(["run", "A1", *SMALL]) == 0
    assert [path.name for path in sorted(Path("runs").iterdir())] == ["A1-seed0", "A1-seed0-2"]
    capsys.readouterr()
    assert main(["run", "A1", "--out", "runs/A1-seed0", *SMALL]) == 1
    assert "holds a run" in capsys.readouterr().err


def test_divergence_names_the_epoch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["run", "C1", "--out", str(tmp_path / "run"), *SMALL, "optimizer.lr=1e30"]
    assert main(arguments) == 1
    assert "the loss of epoch 1 is" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "A9"], "no recipe 'A9'; there are: A1,"),
        (["run", "A1", "--set", "epoch=3"], "unknown key epoch"),
        (["run", "fast", "--limit", "8"], "fewer than a batch"),
        (["resume", "nowhere"], "no checkpoint at"),
    ],
)
def test_wrong_arguments_are_one_clear_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert message in captured.err
    assert "Traceback" not in captured.err


def test_list_has_a_line_for_each_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "--markdown"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0].strip("| ") for line in lines[2:]] == recipe.names()
    assert "| A3 | Angeles, ResNet-34 | 21,282,122 | 96.00 % (last epoch of 200) |" in lines[4]


def test_help_is_complete() -> None:
    process = subprocess.run(
        [sys.executable, "-m", "training", "run", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    for option in ("RECIPE", "--out", "--seed", "--epochs", "--limit", "--set"):
        assert option in process.stdout


def test_resolved_recipe_is_toml(uninterrupted: Path) -> None:
    resolved = tomllib.loads((uninterrupted / "recipe.toml").read_text())
    assert resolved["epochs"] == 3
    assert resolved["report"]["id"] == "A1"
