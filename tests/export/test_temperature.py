from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from export import temperature
from export.member import Member, load
from export.temperature import TemperatureError
from tests.export.conftest import Bundled
from training.recipe import Distillation


def drawn(at: float) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Logits, and labels drawn from their probabilities at the temperature ``at``."""
    generator = np.random.default_rng(0)
    logits = 3 * generator.normal(size=(20_000, 10))
    noise = generator.gumbel(size=logits.shape)
    return logits.astype(np.float32), (logits / at + noise).argmax(1)


@pytest.mark.parametrize("true", [0.5, 1.0, 2.0])
def test_fit_finds_the_temperature_that_labels_were_drawn_at(true: float) -> None:
    assert temperature.fit(*drawn(true)) == pytest.approx(true, rel=0.02)


def test_fit_is_where_the_likelihood_is_highest() -> None:
    logits, labels = drawn(1.7)
    found = temperature.fit(logits, labels)

    def loss(at: float) -> float:
        scaled = logits.astype(np.float64) / at
        return float((np.log(np.exp(scaled).sum(1)) - scaled[np.arange(len(labels)), labels]).mean())

    assert loss(found) < min(loss(found * 0.99), loss(found * 1.01))


def test_what_is_added_to_all_logits_of_an_image_changes_nothing() -> None:
    logits, labels = drawn(1.7)
    added = np.float32(2048) * (np.arange(len(labels)) % 2)[:, np.newaxis].astype(np.float32)
    found = temperature.fit(logits + added, labels)
    assert found == pytest.approx(temperature.fit(logits, labels), rel=1e-3)


def test_always_right_stays_in_the_range() -> None:
    certain = np.eye(10, dtype=np.float32) * 5
    assert temperature.fit(certain, np.arange(10)) == temperature.RANGE[0]


def members(*paths: Path) -> list[Member]:
    return [load(path, None) for path in paths]


def test_without_held_out_images_there_is_none_and_it_says_why(trained: Path) -> None:
    found = temperature.of(members(trained), [])
    assert (found.value, found.val_images, found.val_ece_after) == (1.0, 0, None)
    assert found.origin.startswith("not calibrated: all training images were trained on")


def test_held_out_images_of_the_run_itself(bundled: Bundled) -> None:
    found = temperature.of(members(bundled(0.2)), [])
    assert found.val_images == 100
    assert found.value != 1
    assert found.origin.startswith("held-out training images of accurate seed 0")
    assert found.val_ece_before is not None
    assert found.val_ece_after is not None
    assert found.val_ece_after < found.val_ece_before


def test_an_ensemble_is_fitted_on_what_all_held_out(bundled: Bundled) -> None:
    assert temperature.of(members(bundled(0.2), bundled(0.1)), []).val_images == 50
    for share in (0.0, 0.0001):  # the second is less than half an image
        found = temperature.of(members(bundled(0.2), bundled(share)), [])
        assert (found.value, found.val_images) == (1.0, 0)


def test_trials_give_it_to_runs_on_all_images(trained: Path, bundled: Bundled) -> None:
    trial = bundled(0.2)
    found = temperature.of(members(trained), members(trial))
    assert found == temperature.of(members(trial), [])


def test_trials_that_cannot(trained: Path, bundled: Bundled) -> None:
    def attempt(*trials: Path) -> None:
        temperature.of(members(trained), members(*trials))

    with pytest.raises(TemperatureError, match="none was held out"):
        attempt(trained)
    with pytest.raises(TemperatureError, match=r"of another recipe than .*: batch_size differ"):
        attempt(bundled(0.2, batch_size=100))
    with pytest.raises(TemperatureError, match=r"of another recipe than .*: views differ"):
        attempt(bundled(0.2, views="none"))
    with pytest.raises(TemperatureError, match=r"is not finished: epoch 3 of \d+"):
        attempt(bundled(0.2, epoch=3))
    with pytest.raises(TemperatureError, match=r"2 checkpoints .* for 1 checkpoints"):
        attempt(bundled(0.2), bundled(0.2))


def test_a_trial_of_other_images_gives_no_temperature(trained: Path, bundled: Bundled) -> None:
    mine, trial = load(trained, None), load(bundled(0.2), None)
    for changed, said in (({"limit": 400}, "--limit"), ({"data": "cifar10"}, "data set")):
        run = {**trial.checkpoint.run, **changed}
        state = trial.checkpoint.model_copy(update={"run": run})
        with pytest.raises(TemperatureError, match=f"another recipe than .*: {said} differ"):
            temperature.of([mine], [Member(state, trial.digest, trial.recipe)])


def test_a_trial_may_have_another_teacher_but_nothing_else(trained: Path, bundled: Bundled) -> None:
    def taught(path: Path, teacher: str, share: float) -> Member:
        (found,) = members(path)
        distillation = Distillation(teacher=teacher, temperature=2.0, weight=share)
        return replace(found, recipe=found.recipe.model_copy(update={"distillation": distillation}))

    mine, trial = taught(trained, "a.pt", 0.9), taught(bundled(0.2), "b.pt", 0.9)
    assert temperature.of([mine], [trial]).val_images == 100
    with pytest.raises(TemperatureError, match=r"of another recipe than .*: distillation differ"):
        temperature.of([mine], [taught(bundled(0.2), "b.pt", 0.8)])


def test_logits_that_are_no_numbers(bundled: Bundled) -> None:
    (diverged,) = members(bundled(0.2))
    diverged.checkpoint.model["head.weight"][0, 0] = float("nan")
    with pytest.raises(TemperatureError, match=r"logits of accurate seed 0 .* are no finite numbers"):
        temperature.of([diverged], [])


@pytest.mark.parametrize("source", ["cifar10", "sample-0123456789ab"])
def test_images_of_another_data_set_are_not_taken(source: str, bundled: Bundled) -> None:
    path = bundled(0.2)
    state = load(path, None).checkpoint
    state.run["data"] = source
    elsewhere = Member(state, "0" * 64, state.parsed_recipe())
    for ensemble in ([elsewhere], [load(path, None), elsewhere]):
        found = temperature.of(ensemble, [])
        assert found.value == 1
        assert f"are from {source}, but the data set here is sample" in found.origin
