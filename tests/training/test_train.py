"""Real runs of real recipes on the bundled sample, through the command line."""

import json
import shutil
import signal
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.compiler import needs_a_compiler
from tests.training.runs import ONE_BLOCK, SGD, Limited
from training import checkpoint, data, recipe, train
from training.__main__ import main
from training.checkpoint import Checkpoint
from training.evaluate import AT_ONCE, evaluate, predict
from training.files import held
from training.learner import TrainingError
from training.model import CLASSES, build
from training.processes import Processes
from training.watch import Stopped, Watch

SMALL = ["--epochs", "1", "--limit", "12", "--set", "batch_size=4"]
pytestmark = pytest.mark.usefixtures("sample")


@pytest.mark.parametrize("name", recipe.names())
def test_every_recipe_trains_a_few_steps(name: str, tmp_path: Path, uninterrupted: Path) -> None:
    out = tmp_path / "run"
    settings = ["epochs=1", "batch_size=4"]
    if recipe.load(name).distillation is not None:
        settings.append(f"distillation.teacher={uninterrupted / 'checkpoint.pt'}")
        settings.append("resolution=[]")  # this teacher, A1's network, takes 32 pixels only
    assert main(["run", name, "--out", str(out), "--limit", "12", "--set", *settings]) == 0

    resolved = recipe.load(out / "recipe.toml")
    assert resolved == recipe.load(name, settings)
    (line,) = [json.loads(text) for text in (out / "metrics.jsonl").read_text().splitlines()]
    assert line["epoch"] == 1
    assert line["train_loss"] > 0
    assert ("val_loss" in line) == (resolved.data.validation > 0)
    state = checkpoint.load(out / "checkpoint.pt")
    assert state.parsed_recipe() == resolved
    assert state.classes == list(CLASSES)
    assert state.result is None  # a trial is not evaluated on the test images
    torch.manual_seed(0)  # the run's seed, for its network before the first step
    initial = build(resolved.model).named_parameters()
    assert all(not torch.equal(p, state.model[key]) for key, p in initial if p.requires_grad)


@needs_a_compiler
def test_a_compiled_run_is_resumed_compiled(tmp_path: Path) -> None:
    chosen, dataset = recipe.load("A1", ["epochs=2", "batch_size=16"]), data.load_sample()
    folders = [tmp_path / name for name in ("whole", "parts")]
    for folder in folders:
        train.create(folder, chosen, "A1", 0, dataset, limit=64)

    def resume(folder: Path, watch: Watch) -> None:
        train.resume(folder, dataset, Console(quiet=True), watch, Processes(), compiled=True)

    resume(folders[0], Watch())
    for asked, sessions in ((0, 0), (4, 1)):  # stops before it compiles, and after some steps
        with pytest.raises(Stopped):
            resume(folders[1], Limited(asked))
        assert len(checkpoint.load(folders[1] / "checkpoint.pt").sessions) == sessions
    command = [sys.executable, "-m", "training", "resume", str(folders[1]), "--compile"]
    subprocess.run(command, check=True)
    whole, parts = (checkpoint.load(folder / "checkpoint.pt") for folder in folders)
    assert [session["precision"] for session in parts.sessions] == ["float32, compiled"] * 2
    assert all("compile_seconds" in session for session in parts.sessions)
    assert all(torch.equal(values, parts.model[name]) for name, values in whole.model.items())


def test_what_cannot_be_compiled_is_one_clear_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "/nowhere/g++")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    run = [sys.executable, "-m", "training", "run", "A1", *SMALL, "--compile"]
    done = subprocess.run(
        [*run, "--out", str(tmp_path / "run")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    error = done.stderr.splitlines()[-1]
    assert error.startswith("error: the steps cannot be compiled here: InvalidCxxCompiler: ")
    assert error.endswith("or go on with --no-compile")


def test_no_compile_holds_where_compiled_steps_are_the_rule(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.device.compiles", lambda place: True)
    run = ["run", "A1", "--out", str(tmp_path / "run"), *SMALL]
    assert main([*run[:4], "--no-compile", *run[4:]]) == 0
    (session,) = checkpoint.load(tmp_path / "run" / "checkpoint.pt").sessions
    assert "compile" not in session["precision"]
    assert "compile_seconds" not in session


def test_training_learns(uninterrupted: Path) -> None:
    history = checkpoint.load(uninterrupted / "checkpoint.pt").history
    assert history[-1]["train_loss"] < history[0]["train_loss"] < 2.31


def test_a_run_on_the_sample_leaves_no_row(uninterrupted: Path) -> None:
    assert checkpoint.load(uninterrupted / "checkpoint.pt").result is not None
    assert not uninterrupted.with_name("results.csv").exists()


# One recipe for each optimizer and kind of augmentation.
@pytest.mark.parametrize("name", ["B2", "C1", "E1", "fast"])
def test_same_seed_same_weights(name: str, tmp_path: Path) -> None:
    states = []
    for index, more in enumerate((["--seed", "1"], ["--seed", "1", "--deterministic"], ["--seed", "2"])):
        out = tmp_path / str(index)
        assert main(["run", name, "--out", str(out), *SMALL, *more]) == 0
        states.append(checkpoint.load(out / "checkpoint.pt").model)
    torch.use_deterministic_algorithms(False)
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert not all(torch.equal(states[0][key], states[2][key]) for key in states[0])


def test_deterministic_run_is_resumed_as_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # The one second is kept for writing a checkpoint, so no step is made.
    out = tmp_path / "[b]:cat:"  # must be shown as it is
    arguments = ["run", "A1", "--out", str(out), *SMALL, "--deterministic", "--max-seconds", "1"]
    assert main(arguments) == 75
    shown = capsys.readouterr()
    assert f"run folder: {out}\n" in shown.out
    assert f"go on with: python -m training resume '{out}'\n" in shown.err
    torch.use_deterministic_algorithms(False)  # as in a new process
    try:
        assert main(["resume", str(out)]) == 0
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert json.loads((out / "run.json").read_text())["deterministic"] is True


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
    other = "runs/A1-seed0-trial holds another run; to go on with that: python -m training resume runs/A"
    assert main(["run", "A1", *SMALL, "--max-seconds", "1"]) == 75  # before the first step
    assert "holds" not in capsys.readouterr().out
    assert main(["run", "A1", *SMALL]) == 0
    assert other in capsys.readouterr().out
    assert [path.name for path in sorted(Path("runs").iterdir())] == [
        "A1-seed0-trial",
        "A1-seed0-trial-2",
    ]
    # A run whose last checkpoint is lost can still be resumed, so its folder is not reused.
    assert main(["resume", "runs/A1-seed0-trial"]) == 0
    Path("runs/A1-seed0-trial/checkpoint.pt").rename("runs/A1-seed0-trial/checkpoint.previous.pt")
    assert main(["run", "A1", *SMALL]) == 0
    assert Path("runs/A1-seed0-trial-3/checkpoint.pt").exists()
    assert "runs/A1-seed0-trial holds a finished run\n" in capsys.readouterr().out
    assert main(["run", "A1", "--out", "runs/A1-seed0-trial", *SMALL]) == 1
    assert "holds a run" in capsys.readouterr().err


def test_a_recipe_s_name_may_have_dots(
    short: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(short, "decay0.01.toml")
    assert main(["run", "decay0.01.toml", "--epochs", "1"]) == 0
    assert checkpoint.load(Path("runs/decay0.01-seed0-trial/checkpoint.pt")).recipe_name == "decay0.01"


def test_the_recipe_in_a_run_s_folder_has_the_run_s_name(
    uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["run", str(uninterrupted / "recipe.toml"), "--epochs", "1"]) == 0
    name = checkpoint.load(uninterrupted / "checkpoint.pt").recipe_name
    assert checkpoint.load(Path(f"runs/{name}-seed0-trial/checkpoint.pt")).recipe_name == name


def test_nothing_held_out_for_a_schedule_that_watches_it_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["data.validation=0.0009", "model.widths=[8,8,8]"]
    assert main(["run", "B2", "--out", str(tmp_path / "run"), "--set", *settings]) == 1
    assert "data.validation=0.0009 holds out none of 500 images, and" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_time_limit_allows_for_the_seconds_of_a_step(tmp_path: Path) -> None:
    dataset, watch = data.load_sample(), Limited(3)
    train.create(tmp_path, recipe.load("A1", ["batch_size=16"]), "A1", 0, dataset, limit=64)
    with pytest.raises(Stopped):
        train.resume(tmp_path, dataset, Console(quiet=True), watch, Processes())
    first, *others = watch.needed  # nothing is known before the first step
    assert first == 1.0 < min(others)


def test_ctrl_c_before_training_is_no_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(data, "load", lambda: signal.raise_signal(signal.SIGINT))
    kept = "; a run goes on from its last checkpoint, if it has one"
    for command, told in (("run", f"interrupted{kept}\n"), ("lr-find", "interrupted\n")):
        assert main([command, "A1", "--out", str(tmp_path / "out.png")]) == 130
        assert capsys.readouterr().err == told


def test_an_evaluation_that_begins_a_session_comes_to_its_end(tmp_path: Path) -> None:
    chosen = recipe.load("A1", ["epochs=1", "batch_size=16", "data.validation=0.5"])
    dataset = data.load_sample()
    train.create(tmp_path, chosen, "A1", 0, dataset, limit=64)

    def resume(watch: Watch) -> Checkpoint:
        return train.resume(tmp_path, dataset, Console(quiet=True), watch, Processes())

    with pytest.raises(Stopped):
        resume(Limited(4))  # stops after the steps, before the evaluation
    state = checkpoint.load(tmp_path / "checkpoint.pt")
    assert (state.epoch, state.step) == (0, 4)
    state = resume(Watch(0.0))
    assert (state.epoch, state.result) == (1, None)  # with only some of the images it is a trial


def test_copied_folder_of_a_finished_run_stays_as_it_is(uninterrupted: Path, tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere"
    shutil.copytree(uninterrupted, copy)
    files = {path.name: path.read_bytes() for path in copy.iterdir()}
    assert main(["resume", str(copy)]) == 0
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == files


def test_a_run_goes_on_with_its_own_data_set_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = replace(data.load_sample(), source="cifar10")
    train.create(tmp_path, recipe.load("A1", ["epochs=1"]), "A1", 0, dataset, limit=64)
    assert main(["resume", str(tmp_path)]) == 1
    assert f"error: {tmp_path} trains on cifar10, not on sample" in capsys.readouterr().err


def test_views_are_averaged_on_held_out_images_after_the_last_epoch_only(tmp_path: Path) -> None:
    # With a constant rate the first of two epochs is the same as the only epoch of a shorter run.
    settings = ["batch_size=50", "data.validation=0.2", "model.widths=[16,16,16]", "resolution=[]"]
    settings += ["schedule={kind='constant'}", "optimizer.bias_lr=0.1", "optimizer.head_lr=0.1"]
    val = data.split(data.load_sample().train, 0.2)[1]
    losses: dict[int, dict[str, float]] = {}
    for epochs in (1, 2):
        out = tmp_path / str(epochs)
        count = ["--epochs", str(epochs)]
        assert main(["run", "accurate", "--out", str(out), *count, "--set", *settings]) == 0
        state = checkpoint.load(out / "checkpoint.pt")
        chosen = state.parsed_recipe()
        losses[epochs] = {
            views: evaluate(state.network(), chosen.model_copy(update={"views": views}), val).loss
            for views in ("none", "flip_shift")
        }
        assert losses[epochs]["none"] != pytest.approx(losses[epochs]["flip_shift"], rel=1e-5)
        assert state.history[-1]["val_loss"] == pytest.approx(losses[epochs]["flip_shift"])
    assert state.history[0]["val_loss"] == pytest.approx(losses[1]["none"])


def test_several_views_are_no_more_images_at_once() -> None:
    pixels, chosen = data.load_sample().test.pixels, recipe.load("A1", ["views=flip_shift"])
    network, sizes = build(chosen.model), list[int]()
    network.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    predict(network, chosen, pixels)
    assert sum(sizes) == 6 * len(pixels)
    assert max(sizes) <= AT_ONCE


def test_trial_is_judged_on_held_out_images_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["--epochs", "1", "--set", "batch_size=50", "data.validation=0.2"]
    assert main(["run", "A1", "--out", str(tmp_path / "run"), *settings]) == 0
    out = capsys.readouterr().out
    state = checkpoint.load(tmp_path / "run" / "checkpoint.pt")
    assert state.result is None
    assert f"val accuracy {100 * state.history[-1]['val_accuracy']:.2f} %, a trial" in out
    assert "test accuracy" not in out

    assert main(["run", "A1", "--out", str(tmp_path / "blind"), "--epochs", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("a trial without held-out images"), "before the hours that it takes"
    assert lines[-1].startswith("trial without held-out images")


def test_run_folder_says_everything(uninterrupted: Path) -> None:
    facts = json.loads((uninterrupted / "run.json").read_text())
    resolved = recipe.load(uninterrupted / "recipe.toml")
    assert (facts["recipe"], facts["recipe_digest"]) == ("short", resolved.digest())
    assert (facts["seed"], facts["limit"], facts["complete"]) == (7, None, True)
    assert (facts["epoch"], facts["step"], facts["epochs"]) == (3, 0, 3)
    assert facts["data"] == "sample"
    assert facts["seconds"] > 0
    assert facts["result"]["test_images"] == 1000
    (session,) = facts["sessions"]
    assert session["torch"] == torch.__version__
    assert session["device"].endswith(f"{torch.get_num_threads()} threads")
    assert (session["epoch"], session["step"], session["processes"]) == (0, 0, 1)
    assert session["commit"] == facts["commit"]


def test_tensorboard_has_the_metrics(uninterrupted: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    short = uninterrupted / "recipe.toml"
    assert main(["run", str(short), "--out", str(run), "--seed", "7", "--tensorboard"]) == 0
    assert_in_tensorboard(run)


def test_tensorboard_goes_on_with_a_resumed_run(uninterrupted: Path, tmp_path: Path) -> None:
    run, dataset = tmp_path / "run", data.load_sample()
    short = recipe.load(uninterrupted / "recipe.toml")
    train.create(run, short, "short", 7, dataset, unchanged=False)
    with pytest.raises(Stopped):  # during the second epoch
        train.resume(run, dataset, Console(quiet=True), Limited(12), Processes(), tensorboard=True)
    assert checkpoint.load(run / "checkpoint.pt").epoch == 1
    assert main(["resume", str(run), "--tensorboard"]) == 0
    assert_in_tensorboard(run)


def assert_in_tensorboard(run: Path) -> None:
    """Check that TensorBoard's files have each epoch of the run once."""
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    history = checkpoint.load(run / "checkpoint.pt").history
    assert len(history) == 3
    for key in ("train_loss", "train_accuracy", "lr"):
        scalars = [(event.step, event.value) for event in events.Scalars(key)]
        assert scalars == [(line["epoch"], pytest.approx(line[key])) for line in history]


def test_divergence_names_the_epoch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["run", "C1", "--out", str(tmp_path / "run"), *SMALL, "optimizer.lr=1e30"]
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert "the loss of epoch 1 is" in error
    assert "the learning rate (1e+30) is probably too high" in error
    # The checkpoint that is left is from before the divergence.
    state = checkpoint.load(tmp_path / "run" / "checkpoint.pt")
    assert all(value.isfinite().all() for value in state.model.values())


def test_a_run_that_is_stopped_once_it_has_diverged_keeps_its_checkpoint(tmp_path: Path) -> None:
    dataset, chosen = data.load_sample(), recipe.load("A1", ["batch_size=16", SGD, "optimizer.lr=1e30"])
    train.create(tmp_path, chosen, "A1", 0, dataset, limit=64)
    with pytest.raises(TrainingError, match="the loss of epoch 1 is "):
        train.resume(tmp_path, dataset, Console(quiet=True), Limited(3), Processes())
    state = checkpoint.load(tmp_path / "checkpoint.pt")
    assert (state.step, state.sessions) == (0, [])


@pytest.mark.parametrize(("name", "complete"), [("val", False), ("test", True)])
def test_divergence_in_the_last_step(
    name: str, complete: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # There is only one step, and its loss is that of the initial weights.
    settings = ["epochs=1", "batch_size=50", "drop_last=true", "optimizer.lr=1e30"]
    path, out = tmp_path / "steep.toml", tmp_path / "run"
    arguments = ["--limit", "50", "--set", "data.validation=0.2"]
    if complete:
        settings[1], arguments = "batch_size=500", []
    path.write_text(recipe.load("A1", settings).to_toml())
    assert main(["run", str(path), "--out", str(out), *arguments]) == 1
    error = capsys.readouterr().err
    assert f"the {name} loss of epoch 1 is nan: the learning rate (1e+30) is probably too" in error
    assert f"{out / 'checkpoint.pt'}, written before this was seen, may hold weights" in error
    metrics = out / "metrics.jsonl"
    assert not metrics.exists() or "NaN" not in metrics.read_text()
    assert checkpoint.load(out / "checkpoint.pt").result is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "A9"], "no recipe 'A9'; there are: A1,"),
        (["run", "nowhere/own.toml"], "no file nowhere/own.toml"),
        (["run", "A1", "--set", "epoch=3"], "unknown key epoch"),
        (["run", "fast", "--limit", "8"], "fewer than a batch"),
        (["resume", "nowhere"], "no checkpoint at"),
        (
            ["run", "distilled", "--set", "distillation.teacher=."],
            ". is a folder; a run's checkpoint is",
        ),
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
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "setting", ["batch_size=1", "batch_size=64", f"selection={{share=0.005, model={ONE_BLOCK}, {SGD}}}"]
)
def test_a_step_of_one_image_that_batch_norm_cannot_learn_from(
    setting: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each setting leaves one image to learn from: of the data, of the last batch, of each selection."""
    network = ["model.blocks=[1,1,1,1]", "model.widths=[8,8,8,8]", "resolution=[{from_epoch=0,size=8}]"]
    network += ["batch_size=129"]
    arguments = ["run", "C1", "--out", str(tmp_path / "run"), "--limit", "129", "--epochs", "1", "--set"]
    assert main([*arguments, *network, setting]) == 1
    assert "would learn from one image of 8 x 8 pixels, which leaves" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert main([*arguments, *network]) == 0


@pytest.mark.parametrize(
    ("name", "setting", "message"),
    [
        ("A1", "resolution=[{from_epoch=0,size=24}]", "does not take images of 24 x 24 pixels"),
        ("fast", "resolution=[{from_epoch=0,size=8}]", "does not take images of 8 x 8 pixels"),
        ("A2", "model.widths=[64,1099511627776,64,64]", "out of memory with a network of this size"),
    ],
)
def test_network_that_cannot_run_leaves_no_folder(
    name: str, setting: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", name, "--out", str(tmp_path / "run"), "--set", setting]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seed", "-1"], "'-1' is not a whole number from 0 to below 2**63"),
        (["--seed", str(2**63)], "is not a whole number from 0 to below 2**63"),
        (["--limit", "x"], "'x' is not a whole number of at least 1"),
        (["--max-seconds", "0"], "'0' is not a whole number of at least 1"),
    ],
)
def test_wrong_numbers_are_named(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["run", "A1", *arguments])
    assert message in capsys.readouterr().err


def test_one_process_trains_in_a_folder(
    uninterrupted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy, new = tmp_path / "copy", tmp_path / "new"
    shutil.copytree(uninterrupted, copy)
    new.mkdir()
    for folder, arguments in ((copy, ["resume", str(copy)]), (new, ["run", "A1", "--out", str(new)])):
        with held(folder) as alone:
            assert alone
            assert main(arguments) == 1
            assert f"error: another process trains in {folder}" in capsys.readouterr().err
    assert list(new.iterdir()) == []
    assert main(["resume", str(copy)]) == 0


def test_a_changed_recipe_does_not_go_on_unnoticed(
    uninterrupted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(uninterrupted, folder)
    path = folder / "recipe.toml"
    text = path.read_text()
    path.write_text(text.replace("lr = ", "lr = 0.5  # "))
    assert main(["resume", str(folder)]) == 1
    assert f"{path} was changed, and a run goes on as it began" in capsys.readouterr().err
    path.write_text(text.replace("title = ", "title = 'Mine'  # "))
    assert main(["resume", str(folder)]) == 0
    path.unlink()
    assert main(["resume", str(folder)]) == 0


def test_list_has_a_line_for_each_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "--markdown"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0].strip("| ") for line in lines[2:]] == recipe.names()
    assert "| A3 | Angeles, ResNet-34 | 21,282,122 | 96.00 % (last epoch of 200) |" in lines[4]


def test_list_is_a_table_for_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in lines if "│" in line]
    assert [row[0] for row in rows] == recipe.names()
    a3 = ["A3", "Angeles, ResNet-34", "21,282,122", "96.00 % (last epoch of 200)"]
    assert rows[2][:4] == a3


def test_help_is_complete(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["run", "--help"])
    told = capsys.readouterr().out
    options = "RECIPE --out --seed --epochs --limit --set --max-seconds --tensorboard --deterministic"
    for option in (*options.split(), "--compile", "--no-compile"):
        assert f" {option}" in told


def test_resolved_recipe_is_toml(uninterrupted: Path) -> None:
    resolved = tomllib.loads((uninterrupted / "recipe.toml").read_text())
    assert resolved["epochs"] == 3
    assert resolved["report"]["id"] == "A1"
