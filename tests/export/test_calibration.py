from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from export import calibration
from export.calibration import CalibrationError, uncalibrated
from export.member import Member, load
from serving.predictions import softmax
from tests.export.conftest import Bundled, calibrated
from training.recipe import Distillation


def drawn(temperature: float, exponent: float = 1.0) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Logits, and labels drawn from their probabilities once they are calibrated."""
    generator = np.random.default_rng(0)
    logits = (3 * generator.normal(size=(10_000, 10))).astype(np.float32)
    noise = generator.gumbel(size=logits.shape)
    return logits, (calibrated(logits, temperature, exponent) + noise).argmax(1)


def loss(logits: NDArray[np.float32], labels: NDArray[np.int64], *found: float) -> float:
    scaled = calibrated(logits, *found).astype(np.float64)
    return float((np.log(np.exp(scaled).sum(1)) - scaled[np.arange(len(labels)), labels]).mean())


@pytest.mark.parametrize(
    ("temperature", "exponent"), [(0.5, 1.0), (1.0, 1.0), (2.0, 1.0), (1.5, 1.6), (0.7, 0.6)]
)
def test_fit_finds_that_by_which_labels_were_drawn(temperature: float, exponent: float) -> None:
    found = calibration.fit(*drawn(temperature, exponent))
    assert found[0] == pytest.approx(temperature, rel=0.05)
    assert found[1] == pytest.approx(exponent, abs=0.101)


def test_fit_is_where_the_likelihood_is_highest() -> None:
    logits, labels = drawn(1.7, 1.3)
    temperature, exponent = calibration.fit(logits, labels)
    least = loss(logits, labels, temperature, exponent)
    assert least < min(loss(logits, labels, temperature * each, exponent) for each in (0.99, 1.01))
    assert least < min(loss(logits, labels, temperature, exponent + each) for each in (-0.1, 0.1))


def test_what_is_added_to_all_logits_of_an_image_changes_nothing() -> None:
    logits, labels = drawn(1.7)
    added = np.float32(2048) * (np.arange(len(labels)) % 2)[:, np.newaxis].astype(np.float32)
    found = calibration.fit(logits + added, labels)
    assert found == pytest.approx(calibration.fit(logits, labels), rel=1e-3)


def test_always_right_stays_in_the_range() -> None:
    certain = np.eye(10, dtype=np.float32) * 5
    assert calibration.fit(certain, np.arange(10)) == (calibration.TEMPERATURES[0], 1.0)


def test_a_few_images_say_little_about_the_exponent() -> None:
    for exponent in (1.0, 2.0):
        logits, labels = drawn(1.0, exponent)
        few, many = (calibration.fit(logits[:count], labels[:count])[1] for count in (5, 10_000))
        assert few == 1.1
        assert many == pytest.approx(exponent, abs=0.101)


def test_uncalibrated_logits_have_the_same_probabilities_as_before() -> None:
    logits, _ = drawn(1.0)
    there = calibrated(logits, 0.7, 1.45)
    assert there.dtype == np.float32
    assert (there.argmax(1) == logits.argmax(1)).all()
    back = uncalibrated(there, 0.7, 1.45)
    assert back.dtype == np.float32
    np.testing.assert_allclose(softmax(back), softmax(logits), rtol=1e-4)


def members(*paths: Path) -> list[Member]:
    return [load(path, None) for path in paths]


def test_without_held_out_images_there_is_none_and_it_says_why(trained: Path) -> None:
    found = calibration.of(members(trained), [])
    assert (found.temperature, found.exponent, found.val_images, found.val_ece_after) == (1, 1, 0, None)
    assert found.origin.startswith("not calibrated: all training images were trained on")


def test_held_out_images_of_the_run_itself(bundled: Bundled) -> None:
    found = calibration.of(members(bundled(0.2)), [])
    assert found.val_images == 100
    assert found.temperature != 1
    assert found.exponent in calibration.EXPONENTS
    assert found.origin.startswith("held-out training images of accurate seed 0")
    assert found.val_ece_before is not None
    assert found.val_ece_after is not None
    assert found.val_ece_after < found.val_ece_before


def test_an_ensemble_is_fitted_on_what_all_held_out(bundled: Bundled) -> None:
    assert calibration.of(members(bundled(0.2), bundled(0.1)), []).val_images == 50
    for share in (0.0, 0.0001):  # the second is less than half an image
        found = calibration.of(members(bundled(0.2), bundled(share)), [])
        assert (found.temperature, found.exponent, found.val_images) == (1, 1, 0)


def test_trials_give_it_to_runs_on_all_images(trained: Path, bundled: Bundled) -> None:
    trial = bundled(0.2)
    found = calibration.of(members(trained), members(trial))
    assert found == calibration.of(members(trial), [])


def test_trials_that_cannot(trained: Path, bundled: Bundled) -> None:
    def attempt(*trials: Path) -> None:
        calibration.of(members(trained), members(*trials))

    with pytest.raises(CalibrationError, match="none was held out"):
        attempt(trained)
    with pytest.raises(CalibrationError, match=r"of another recipe than .*: batch_size differ"):
        attempt(bundled(0.2, batch_size=100))
    with pytest.raises(CalibrationError, match=r"of another recipe than .*: views differ"):
        attempt(bundled(0.2, views="none"))
    with pytest.raises(CalibrationError, match=r"is not finished: epoch 3 of \d+"):
        attempt(bundled(0.2, epoch=3))
    with pytest.raises(CalibrationError, match=r"2 checkpoints .* for 1 checkpoints"):
        attempt(bundled(0.2), bundled(0.2))


def test_a_trial_of_other_images_gives_no_calibration(trained: Path, bundled: Bundled) -> None:
    mine, trial = load(trained, None), load(bundled(0.2), None)
    for changed, said in (({"limit": 400}, "--limit"), ({"data": "cifar10"}, "data set")):
        run = {**trial.checkpoint.run, **changed}
        state = trial.checkpoint.model_copy(update={"run": run})
        with pytest.raises(CalibrationError, match=f"another recipe than .*: {said} differ"):
            calibration.of([mine], [Member(state, trial.digest, trial.recipe)])


def test_a_trial_may_have_another_teacher_but_nothing_else(trained: Path, bundled: Bundled) -> None:
    def taught(path: Path, teacher: str, share: float) -> Member:
        (found,) = members(path)
        distillation = Distillation(teacher=teacher, temperature=2.0, weight=share)
        return replace(found, recipe=found.recipe.model_copy(update={"distillation": distillation}))

    mine, trial = taught(trained, "a.pt", 0.9), taught(bundled(0.2), "b.pt", 0.9)
    assert calibration.of([mine], [trial]).val_images == 100
    with pytest.raises(CalibrationError, match=r"of another recipe than .*: distillation differ"):
        calibration.of([mine], [taught(bundled(0.2), "b.pt", 0.8)])


def test_logits_that_are_no_numbers(bundled: Bundled) -> None:
    (diverged,) = members(bundled(0.2))
    diverged.checkpoint.model["head.weight"][0, 0] = float("nan")
    with pytest.raises(CalibrationError, match=r"logits of accurate seed 0 .* are no finite numbers"):
        calibration.of([diverged], [])


@pytest.mark.parametrize("source", ["cifar10", "sample-0123456789ab"])
def test_images_of_another_data_set_are_not_taken(source: str, bundled: Bundled) -> None:
    path = bundled(0.2)
    state = load(path, None).checkpoint
    state.run["data"] = source
    elsewhere = Member(state, "0" * 64, state.parsed_recipe())
    for ensemble in ([elsewhere], [load(path, None), elsewhere]):
        found = calibration.of(ensemble, [])
        assert (found.temperature, found.exponent) == (1, 1)
        assert f"are from {source}, but the data set here is sample" in found.origin
