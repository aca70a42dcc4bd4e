"""No run is ever lost: real processes, killed, starved and cut short."""

import json
import os
import random
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.training.command import start
from tests.training.runs import assert_same
from training import checkpoint, data, results
from training.__main__ import main

# 1.6 GB on top of what the program itself takes: the first layer's output for all images needs more in
# one piece, so there is memory left when it fails. With hardly any left, oneDNN would crash.
SCARCE = """
import resource, torch, training.__main__
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + 1_600_000_000,) * 2)
"""


# The stem's output for many images does not fit; the layers after it are small, so a run is soon done.
NARROW = ["model.widths=[64,8,8]", "model.block={kind='bottleneck', reduction=8, groups=1}"]

pytestmark = pytest.mark.usefixtures("sample")


def assert_same_run(actual: Path, expected: Path) -> None:
    """Check that weights and optimizer are the same bit for bit, and that the history is the same."""
    ours, theirs = (checkpoint.load(folder / "checkpoint.pt") for folder in (actual, expected))
    assert_same(ours.model, theirs.model)
    for part, other in zip(ours.optimizers, theirs.optimizers, strict=True):
        for index, values in other["state"].items():
            assert part["state"][index].keys() == values.keys()
            assert all(torch.equal(part["state"][index][name], values[name]) for name in values)
    same = {"epoch", "lr", "train_loss", "train_accuracy"}
    course = [{key: line[key] for key in same} for line in theirs.history]
    assert [{key: line[key] for key in same} for line in ours.history] == course
    lines = (actual / "metrics.jsonl").read_text().splitlines()
    assert [{key: json.loads(line)[key] for key in same} for line in lines] == course


# After some steps of the second epoch the run waits for a signal: it would be over before a slow test.
WAITING = """
import time
from training.watch import Watch
reason, steps = Watch.reason, []

def waited(self, needed):
    steps.append(needed)
    while len(steps) > 12 and not self._signals:
        time.sleep(0.01)
    return reason(self, needed)

Watch.reason = waited
"""


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_leaves_a_checkpoint_that_resumes(
    short: Path, uninterrupted: Path, tmp_path: Path, signum: signal.Signals, code: int
) -> None:
    out = tmp_path / "run"
    command = start("run", str(short), "--out", str(out), "--seed", "7", before=WAITING)
    assert any(line.startswith("epoch 1") for line in command.stdout)
    assert command.process.pid is not None
    os.kill(command.process.pid, signum)
    ended, errors = command.end()
    assert ended == code
    assert f"stopped by {signum.name}; go on with: python -m training resume {out}" in errors
    state = checkpoint.load(out / "checkpoint.pt")
    assert state.result is None
    assert 8 <= state.epoch * 8 + state.step < 24

    # A run can go on after its folder was moved.
    elsewhere = tmp_path / "elsewhere"
    shutil.move(out, elsewhere)
    assert main(["resume", str(elsewhere)]) == 0
    assert_same_run(elsewhere, uninterrupted)
    sessions = checkpoint.load(elsewhere / "checkpoint.pt").sessions
    assert [session["epoch"] * 8 + session["step"] for session in sessions] == [
        0,
        state.epoch * 8 + state.step,
    ]


def test_killed_at_random_moments(short: Path, uninterrupted: Path, tmp_path: Path) -> None:
    """SIGKILL soon after a start, or after some steps: in a step, an evaluation, a write, a rename.

    With a checkpoint before every step most kills hit a write. Each moment is a wait for the process to
    exit, which it may or may not do in that time: the test does not depend on which.
    """
    out, moments = tmp_path / "run", random.Random(1)
    saving = "import training.run; training.run.SAVE_SECONDS = -1.0"

    def steps() -> int:
        state, _ = checkpoint.load_last(out / "checkpoint.pt")
        return 8 * state.epoch + state.step

    command = start("run", str(short), "--out", str(out), "--seed", "7", before=saving)
    found: set[int] = set()
    kept: list[int] = []
    for least in (0, 3, 9, 14, 20, 24):
        any(line.startswith("short seed 7") for line in command.stdout)  # skips the beginning
        while command.process.is_alive() and (reached := steps()) < least:
            found.add(reached)
        command.process.join(moments.uniform(0, 0.1))
        if command.process.exitcode is not None:
            break
        command.process.kill()
        command.end()
        kept.append(steps())
        command = start("resume", str(out), before=saving)
    code, errors = command.end()
    assert code == 0, errors
    assert len(kept) > 0
    assert kept == sorted(kept), "no kill takes back what a checkpoint had"
    assert any(step % 8 for step in found.union(kept)), "there are checkpoints within an epoch"
    assert main(["resume", str(out)]) == 0
    assert_same_run(out, uninterrupted)


def test_time_limit_stops_before_it_and_goes_on_later(
    short: Path, uninterrupted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "a run"
    # The one second is kept for writing a checkpoint, so no step is made.
    assert main(["run", str(short), "--out", str(out), "--seed", "7", "--max-seconds", "1"]) == 75
    assert f"stopped by the time limit; go on with: python -m training resume '{out}'" in (
        capsys.readouterr().err
    )
    assert checkpoint.load(out / "checkpoint.pt").epoch == 0
    assert main(["resume", str(out), "--max-seconds", "600"]) == 0
    assert_same_run(out, uninterrupted)


@pytest.mark.parametrize("damage", ["flipped", "truncated", "missing"])
def test_previous_checkpoint_replaces_a_damaged_one(
    damage: str, uninterrupted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    shutil.copytree(uninterrupted, out)
    path = out / "checkpoint.pt"
    whole = path.read_bytes()
    if damage == "flipped":
        middle = len(whole) // 2
        path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    elif damage == "truncated":
        path.write_bytes(whole[: len(whole) // 2])
    else:
        path.unlink()
    assert checkpoint.load(checkpoint.previous(path)).result is None
    assert main(["resume", str(out)]) == 0
    assert "going on from checkpoint.previous.pt" in capsys.readouterr().out
    assert_same_run(out, uninterrupted)
    # It was evaluated again, but is still one run with one row.
    evaluations = [checkpoint.load(folder / "checkpoint.pt").result for folder in (uninterrupted, out)]
    for evaluation in evaluations:
        assert evaluation is not None
        results.record(evaluation, tmp_path / "results.csv")
    assert results.read(tmp_path / "results.csv") == evaluations[:1]

    for name in ("checkpoint.pt", "checkpoint.previous.pt"):
        (out / name).write_bytes(whole[:1000])
    assert main(["resume", str(out)]) == 1
    error = capsys.readouterr().err
    assert error.count("damaged or not a checkpoint") == 2
    assert "Traceback" not in error


def test_full_disk_keeps_the_last_checkpoint(short: Path, uninterrupted: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    # Files cannot grow beyond 300 kB: enough for the initial checkpoint, but not for one with momentum.
    full = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))"
    command = start("run", str(short), "--out", str(out), "--seed", "7", before=full)
    code, errors = command.end()
    assert code == 1
    assert "could not write" in errors
    assert "the checkpoint before it is untouched, make room and resume" in errors
    assert "Traceback" not in errors
    # The finished epochs' metrics are there, and nothing is half written.
    assert sorted(path.name for path in out.iterdir()) == [
        *("checkpoint.pt", "metrics.jsonl", "recipe.toml", "run.json"),
    ]
    assert main(["resume", str(out)]) == 0
    assert_same_run(out, uninterrupted)


def test_full_disk_at_the_begin_leaves_nothing_to_resume(short: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    full = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))"
    command = start("run", str(short), "--out", str(out), before=full)
    code, errors = command.end()
    assert code == 1
    assert f"error: could not write {out / 'checkpoint.pt'}: " in errors
    assert "resume" not in errors


def copied(path: Path, times: int) -> Path:
    """Write a sample file with the sample's images repeated so many ``times``."""
    arrays = dict(np.load(data.SAMPLE, allow_pickle=False))
    np.savez(
        path,
        **{name: np.concatenate([part] * times) for name, part in arrays.items()},
        allow_pickle=False,
    )
    return path


@pytest.fixture
def many(tmp_path: Path) -> Path:
    """A sample file of 20,000 training and 40,000 test images."""
    return copied(tmp_path / "many.npz", 40)


def test_signal_ends_the_test_too(short: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(data.ROOT_VARIABLE, str(copied(tmp_path / "more.npz", 10)))
    out, recipe = tmp_path / "run", tmp_path / "short.toml"
    recipe.write_text(short.read_text().replace("epochs = 3", "epochs = 1"))
    # Evaluated one by one, the images take long enough for a signal to arrive between two of them.
    slowly = "import training.evaluate; training.evaluate.AT_ONCE = 1"
    command = start("run", str(recipe), "--out", str(out), before=slowly)
    assert any(line.startswith("epoch 1") for line in command.stdout)
    command.process.terminate()
    code, errors = command.end()
    assert code == 143
    assert "stopped by SIGTERM; go on with" in errors
    state = checkpoint.load(out / "checkpoint.pt")
    assert state.finished
    assert state.result is None
    assert main(["resume", str(out)]) == 0
    state = checkpoint.load(out / "checkpoint.pt")
    assert state.result is not None
    assert state.result.test_images == 10_000


def test_out_of_memory_in_the_evaluation_is_named(
    many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(data.ROOT_VARIABLE, str(many))
    scarce = f"{SCARCE}\nimport training.evaluate; training.evaluate.AT_ONCE = 10**6"
    settings = ["data.validation=0.98", "augment=[]", "batch_size=20", *NARROW]
    command = start(
        *("run", "B2", "--epochs", "1", "--limit", "8000", "--out", str(tmp_path / "run")),
        *("--set", *settings),
        before=scarce,
    )
    code, errors = command.end()
    assert code == 1
    assert "error: out of memory in the evaluation of 8000 images on cpu: make room, and" in errors
    assert main(["resume", str(tmp_path / "run")]) == 0


def test_no_memory_on_a_gpu_for_the_data_set_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(images: data.Images, device: torch.device) -> data.Images:
        raise torch.OutOfMemoryError("CUDA out of memory. Of GPU 0 4 MiB are free.\nSee the manual")

    monkeypatch.setattr(data.Images, "to", full)
    assert main(["run", "A1", "--out", str(tmp_path / "run")]) == 1
    assert capsys.readouterr().err == "error: CUDA out of memory. Of GPU 0 4 MiB are free.\n"


def test_out_of_memory_names_a_batch_that_fits(
    many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, again = tmp_path / "run", tmp_path / "again"
    monkeypatch.setenv(data.ROOT_VARIABLE, str(many))
    settings = ["data.validation=0.002", "augment=[]", *NARROW]
    arguments = ["run", "B2", "--epochs", "1", "--set", *settings]
    command = start(*arguments, "batch_size=19960", "--out", str(out), before=SCARCE)
    code, errors = command.end()
    assert code == 1
    assert "error: out of memory with a batch of 19960 on cpu: " in errors
    assert checkpoint.load(out / "checkpoint.pt").epoch == 0
    size = int(errors.partition("batch_size=")[2].partition(",")[0])
    assert 1 <= size < 19960
    one = [f"batch_size={size}", "--limit", str(size)]  # an epoch of one step
    command = start(*arguments, *one, "--out", str(again), before=SCARCE)
    code, errors = command.end()
    assert code == 0, errors
    assert checkpoint.load(again / "checkpoint.pt").history[0]["train_loss"] > 0
