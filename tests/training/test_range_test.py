import itertools
import math
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.training.runs import selection
from training import data, range_test, recipe
from training.__main__ import main
from training.data import DataSet, Images
from training.learner import Learner, TrainingError
from training.processes import Processes
from training.range_test import Measurement

pytestmark = pytest.mark.usefixtures("sample")


def test_the_reports_rate_is_on_the_grid() -> None:
    rates = range_test.rates(1e-5, 1, 100)
    assert len(rates) == 100
    assert rates[80] == pytest.approx(0.112202, abs=5e-7)
    assert rates[-1] == pytest.approx(1)
    assert all(b / a == pytest.approx(10**0.05) for a, b in itertools.pairwise(rates))


def curve(losses: list[float]) -> list[Measurement]:
    rates = range_test.rates(1e-5, 1, len(losses))
    return [Measurement(rate, loss, loss) for rate, loss in zip(rates, losses, strict=True)]


def test_suggestion_is_where_the_loss_falls_fastest() -> None:
    falling = curve([2.3 - 1.5 / (1 + math.exp((70 - step) / 4)) for step in range(100)])
    assert range_test.suggest(falling) == falling[70].rate
    # The first steps do not count.
    rising = curve([5.0 - step / 3 if step < 8 else point.smooth for step, point in enumerate(falling)])
    assert range_test.suggest(rising) == falling[70].rate
    # Neither does a loss that has blown up and comes down again, however steeply.
    blown_up = [*(point.smooth for point in falling[:90]), 2.0, 6.0, 6.0, 3.0, 2.9, 2.9]
    assert range_test.suggest(curve(blown_up)) == curve(blown_up)[70].rate


@pytest.mark.parametrize("steps", [0, 5, 12])
def test_too_early_a_divergence_is_an_error(steps: int) -> None:
    with pytest.raises(TrainingError, match="begin with a lower --low"):
        range_test.suggest(curve([1.0] * 20)[:steps])


def test_loss_that_never_falls_is_an_error() -> None:
    rising = curve([1 + step / 100 for step in range(100)])
    with pytest.raises(TrainingError, match=r"between the rates 3\.548e-05 and 0\.8913:"):
        range_test.suggest(rising)


def test_groups_keep_their_ratio() -> None:
    fast = recipe.load("fast", ["batch_size=20"])
    images = data.load_sample().train.first(40)
    learner = Learner(fast, 0, images, Processes())
    assert isinstance(fast.optimizer, recipe.Muon)
    whole = (fast.optimizer.bias_lr, fast.optimizer.head_lr, fast.optimizer.lr)
    # Three steps, more than an epoch has; ``optimizer.lr`` is 0.12.
    for point, part in zip(range_test.measure(learner, [0.012, 0.03, 0.06]), (10, 4, 2), strict=True):
        groups = [group["lr"] for each in learner.optimizers for group in each.param_groups]
        assert groups == pytest.approx([lr / part for lr in whole])
        assert groups[-1] == pytest.approx(point.rate)


def test_only_training_images_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sample = data.load_sample()
    places = Images(sample.train.pixels, torch.arange(len(sample.train)))
    _, held_out = data.split(places, 0.1)
    labels = sample.train.labels.clone()
    labels[held_out.labels] = 0
    nothing = Images(sample.test.pixels[:0], sample.test.labels[:0])
    arguments = ["lr-find", "A1", "--steps", "20", "--out", str(tmp_path / "plot.svg")]
    arguments += ["--set", "batch_size=32", "data.validation=0.1"]
    assert main(arguments) == 0
    expected = capsys.readouterr().out
    changed = DataSet(Images(sample.train.pixels, labels), nothing, "sample")
    monkeypatch.setattr(data, "load", lambda: changed)
    assert main(arguments) == 0
    assert capsys.readouterr().out == expected


def test_losses_are_means_over_the_images_that_a_step_learns_from() -> None:
    chosen = recipe.load("A1", ["batch_size=20", selection(0.25)])
    images = data.load_sample().train
    learner = Learner(chosen, 0, images, Processes())
    (first,) = range_test.measure(learner, [1e-5])
    assert math.log(10) < first.loss < 1.1 * math.log(10)  # the hardest images have a higher loss


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_real_test_suggests_and_plots(
    ending: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own, plot = tmp_path / "a$_$.toml", tmp_path / f"plot.{ending}"
    own.write_text(recipe.load("A1").to_toml())
    arguments = ["lr-find", str(own), "--steps", "20", "--out", str(plot), "--set", "batch_size=32"]
    outputs = []
    for _ in range(2):
        assert main(arguments) == 0
        outputs.append((capsys.readouterr().out, plot.read_bytes()))
    assert outputs[0] == outputs[1], "the same seed, the same test"
    text, _, _ = outputs[0][0].partition("(the recipe has 0.001)")
    suggestion = float(text.split()[-1])
    assert any(suggestion == pytest.approx(r, rel=1e-5) for r in range_test.rates(1e-5, 1, 20))
    if ending == "png":
        with Image.open(plot) as image:
            assert image.size == (1200, 675)
    else:
        assert b"<!-- smoothed -->" in plot.read_bytes()
        assert b"range test of a$_$: batches of 32" in plot.read_bytes()


def test_divergence_ends_the_test_early(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wild = ["--low", "1e-3", "--high", "1e9", "--steps", "40", "--out", str(tmp_path / "plot.png")]
    assert main(["lr-find", "C1", *wild, "--set", "batch_size=4", "model.widths=[16,16,16]"]) == 0
    assert "the loss diverged at rate" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--low", "1", "--high", "0.1"],
            "no range of rates: --low 1 must be above 0 and below --high 0.1",
        ),
        (["--high", "1e300"], "below --high 1e+300, and that at most 3.4e+38"),
        (["--steps", "5"], "5 steps show no slope: take at least 13"),
        (["--out", "plot.xyz", "--steps", "13"], "a plot is a .png, .svg or .pdf file"),
        (["--out", "/dev/null"], "not a file that can be replaced: '/dev/null'"),
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
    assert main(["lr-find", "A1", *arguments]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ")
    assert list(tmp_path.iterdir()) == []


def test_it_is_for_one_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["lr-find", "A1"]) == 1
    assert "lr-find works in one process: start it without torchrun" in capsys.readouterr().err
