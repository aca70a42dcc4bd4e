"""Data parallelism with real processes on this machine."""

import copy
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tests import ROOT
from tests.training.runs import SGD, selection
from training import checkpoint
from training.__main__ import main
from training.learner import TrainingError
from training.processes import Processes

# A network without BatchNorm and one with it, and both where one selects for the other; batches that
# cannot be shared evenly, the last such that only one process has an image to learn from. SGD, because
# Adam and Muon make full steps even from gradients that are nothing but rounding; small steps, because
# each large one makes a difference in rounding ten times as large. In float32, as bfloat16 rounds more.
C1 = ["amp=off", "batch_size=25", "model.widths=[16,16,32]", "optimizer.lr=1e-4"]
SETTINGS = {
    "plain": ("A1", ["batch_size=125", SGD]),
    "BatchNorm": ("C1", C1),
    "selection": ("C1", [*C1, selection(0.6)]),
    "selection of one": ("A1", ["batch_size=4", SGD, selection(0.25)]),
}


# Runs that go on one after another, as starting the processes takes longer than any of them.
RESUME_ALL = """
import os, sys, time
from contextlib import nullcontext, suppress
from pathlib import Path
from training.__main__ import main
from training.processes import Processes

with Processes().joined():
    Processes.joined = lambda self: nullcontext()
    for out in sys.argv[1:]:
        if code := main(["resume", out]):
            sys.exit(code)

def of_gloo():
    threads = []
    for file in Path("/proc/self/task").glob("*/comm"):
        with suppress(OSError):  # it has ended
            threads.append(file.read_text().strip())
    return [name for name in threads if "gloo" in name]

deadline = time.monotonic() + 20
while of_gloo() and time.monotonic() < deadline:
    os.sched_yield()  # a thread that has ended is listed for a moment
print("left:", *of_gloo())
"""
pytestmark = pytest.mark.usefixtures("sample")


def torchrun(
    processes: int, *arguments: str, program: Sequence[str] = ("-m", "training")
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    return subprocess.run(
        [*command, str(processes), *program, *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )


@pytest.fixture(scope="module")
def runs(sample: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each setting: the beginning of a run, and how two processes went on with it."""
    folder = tmp_path_factory.mktemp("runs")
    program = folder / "program.py"
    program.write_text(RESUME_ALL)
    for setting, (name, settings) in SETTINGS.items():
        begun, limit = folder / setting / "begun", ["--limit", "75"] if setting != "plain" else []
        # The one second is kept for a checkpoint, so no step is made.
        arguments = ["run", name, "--out", str(begun), "--max-seconds", "1", *limit, "--set"]
        assert main([*arguments, *settings, "epochs=2", "data.validation=0.2"]) == 75
        shutil.copytree(begun, folder / setting / "two")
    shared = [str(folder / setting / "two") for setting in SETTINGS]
    process = torchrun(2, *shared, program=[str(program)])
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("epoch 1") == len(SETTINGS), "only the first process talks"
    # A thread of gloo that has a tensor to free once the interpreter ends aborts a finished run.
    assert [line for line in process.stdout.splitlines() if line.startswith("left:")] == ["left:"] * 2
    return folder


@pytest.mark.parametrize("setting", SETTINGS)
def test_two_processes_agree_with_one(setting: str, runs: Path, tmp_path: Path) -> None:
    begun, one = runs / setting / "begun", tmp_path / "one"
    shutil.copytree(begun, one)
    assert main(["resume", str(one)]) == 0
    folders = (begun, one, runs / setting / "two")
    initial, alone, shared = (checkpoint.load(folder / "checkpoint.pt") for folder in folders)
    assert shared.sessions[-1]["processes"] == 2
    for key, value in alone.model.items():
        torch.testing.assert_close(shared.model[key], value, atol=1e-4, rtol=1e-3)
    assert (shared.selector is None) == (alone.selector is None) == (not setting.startswith("selection"))
    for key, value in (alone.selector or {}).items():
        torch.testing.assert_close((shared.selector or {})[key], value, atol=1e-4, rtol=1e-3)
    moved = [(initial.model[key] - value).abs().max().item() for key, value in alone.model.items()]
    assert max(moved) > 2e-3, "there is something to agree on"
    for line, other in zip(alone.history, shared.history, strict=True):
        for key in line.keys() - {"seconds"}:
            assert other[key] == pytest.approx(line[key], rel=1e-3), key


def test_resume_with_another_number_of_processes(short: Path, tmp_path: Path) -> None:
    slow, alone, out = tmp_path / "slow.toml", tmp_path / "alone", tmp_path / "run"
    slow.write_text(short.read_text().replace("lr = 0.05", "lr = 0.01"))  # small steps, as above
    assert main(["run", str(slow), "--out", str(alone), "--seed", "7"]) == 0
    # The one second is kept for writing a checkpoint, so no step is made.
    process = torchrun(2, "run", str(slow), "--out", str(out), "--seed", "7", "--max-seconds", "1")
    assert process.returncode != 0
    assert process.stderr.count("stopped by the time limit; go on with") == 1
    assert main(["resume", str(out), "--max-seconds", "1"]) == 75
    process = torchrun(2, "resume", str(out))
    assert process.returncode == 0, process.stderr
    state, expected = (checkpoint.load(f / "checkpoint.pt") for f in (out, alone))
    assert [session["processes"] for session in state.sessions] == [2, 1, 2]
    assert state.parsed_recipe().optimizer.lr == 0.01
    for key, value in expected.model.items():
        torch.testing.assert_close(state.model[key], value, atol=1e-4, rtol=1e-3)
    assert state.result is not None
    assert expected.result is not None
    assert state.result.test_images == 1000
    assert state.result.accuracy == pytest.approx(expected.result.accuracy, abs=0.005)


def test_error_of_the_first_process_ends_all(tmp_path: Path) -> None:
    process = torchrun(2, "run", "A1", "--out", str(tmp_path), "--set", "batch_size=1")
    assert process.returncode == 1
    assert "2 processes cannot share a batch of 1" in process.stderr


def test_out_of_memory_in_one_process_ends_all(tmp_path: Path) -> None:
    """The others wait in a collective, which the search for a batch that fits would disturb."""
    program, out = tmp_path / "program.py", tmp_path / "run"
    program.write_text(
        "import sys, torch\n"
        "from training.__main__ import main\n"
        "from training.learner import Learner\n"
        "from training.processes import Processes\n"
        "def step(self, *arguments):\n"
        "    raise torch.OutOfMemoryError('out of memory')\n"
        "if Processes().rank == 1:\n"
        "    Learner._step = step\n"
        "sys.exit(main())\n"
    )
    arguments = ["run", "C1", "--out", str(out), "--limit", "50", "--epochs", "1", "--set"]
    process = torchrun(2, *arguments, *C1, program=[str(program)])
    assert process.returncode == 1
    assert "out of memory with a batch of 25 on cpu: try --set batch_size=12," in process.stderr


def test_a_stop_in_the_evaluation_counts_no_image_twice(short: Path, tmp_path: Path) -> None:
    program, run, whole = tmp_path / "program.py", tmp_path / "run", tmp_path / "whole"
    program.write_text(
        "import os, signal, sys\n"
        "from training.__main__ import main\n"
        "from training.run import Run\n"
        "evaluate = Run._evaluate\n"
        "def stopped(self, part, *arguments):\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    return evaluate(self, part, *arguments)\n"
        "Run._evaluate = stopped\n"
        "sys.exit(main())\n"
    )
    arguments = ["run", str(short), "--limit", "64", "--epochs", "1", "--set", "data.validation=0.2"]
    process = torchrun(2, *arguments, "--out", str(run), program=[str(program)])
    assert "stopped by SIGTERM; go on with" in process.stderr
    assert main(["resume", str(run)]) == 0
    assert main([*arguments, "--out", str(whole)]) == 0
    (line,), (expected,) = (checkpoint.load(out / "checkpoint.pt").history for out in (run, whole))
    assert line["train_loss"] == pytest.approx(expected["train_loss"], rel=1e-3)
    assert line["train_accuracy"] == expected["train_accuracy"]


def test_batch_norm_over_processes_is_torchs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = nn.BatchNorm2d(3, eps=0.5, momentum=0.4)
    network = nn.Sequential(copy.deepcopy(alone))
    monkeypatch.setenv("WORLD_SIZE", "2")  # but this process has the whole batch
    dist.init_process_group("gloo", rank=0, world_size=1, init_method=f"file://{tmp_path / 'store'}")
    try:
        parallel, x = Processes().parallel(network), torch.randn(8, 3, 4, 4)
        assert type(network[0]) is not nn.BatchNorm2d
        for training in (True, False):
            for module in (parallel, alone):
                module.train(training)
            torch.testing.assert_close(parallel(x), alone(x))
        torch.testing.assert_close(network[0].state_dict(), alone.state_dict())
    finally:
        dist.destroy_process_group()


def test_shares_cover_a_batch_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for count in (1, 2, 3, 8):
        for images in (1, 7, 8, 125):
            rows: list[int] = []
            for rank in range(count):
                monkeypatch.setenv("WORLD_SIZE", str(count))
                monkeypatch.setenv("RANK", str(rank))
                rows += range(images)[Processes().rows(images)]
            assert rows == list(range(images))


def test_after_an_error_nobody_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[str] = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(dist, "init_process_group", lambda *arguments, **options: None)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: left.append("in order"))

    def fail() -> None:
        with Processes().joined():
            raise TrainingError("out of memory")

    with pytest.raises(TrainingError, match="out of memory"):
        fail()
    assert left == []
    with Processes().joined():
        assert left == []
    assert left == ["in order"]


def test_alone_nothing_changes() -> None:
    processes = Processes()
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    with processes.joined():
        assert processes.parallel(network) is network
        assert type(network[1]) is nn.BatchNorm2d
        assert (processes.highest(3), processes.agree("folder"), processes.first) == (3, "folder", True)
