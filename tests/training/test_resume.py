from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from rich.console import Console

from tests.training.runs import SGD, Limited, assert_same, interrupted_and_whole
from training import checkpoint, data, recipe, results, train
from training.data import DataSet, Images
from training.evaluate import evaluate
from training.learner import Learner, seed_of
from training.processes import Processes
from training.watch import Stopped, Watch

RANDOM = [
    *("epochs=2", "batch_size=64", "model.widths=[8,8,8,8]", "schedule={kind='linear'}"),
    *("averaging={decay=0.9}", "mixing={kind='cutmix', alpha=1.0, p=0.5, epochs=[0, 2]}"),
]


def test_dropout_mixing_and_average_go_on_as_they_would_have(tmp_path: Path) -> None:
    resumed, state = interrupted_and_whole(tmp_path, "D1", RANDOM)
    assert_same(resumed.average, state.average)
    # 400 images are 7 steps; the rate falls with each, and an epoch's rate is that of its last step.
    for line, last in zip(state.history, (6, 13), strict=True):
        assert line["lr"] == pytest.approx(0.01 * (1 - last / 14))
    # The run's result, which was evaluated, is the average.
    network = state.network()
    assert_same(network.state_dict(), state.average)
    val = evaluate(network, state.parsed_recipe(), data.split(data.load_sample().train, 0.2)[1])
    assert state.history[-1]["val_loss"] == pytest.approx(val.loss)


def test_plateau_watches_held_out_images_that_are_not_trained_on(tmp_path: Path) -> None:
    sample = data.load_sample()
    places = Images(sample.train.pixels, torch.arange(len(sample.train)))
    _, held_out = data.split(places, 0.2)
    labels = torch.zeros_like(places.labels)
    labels[held_out.labels] = 1  # a class that the other images do not have
    dataset = DataSet(Images(places.pixels, labels), sample.test, "sample")
    plateau = "schedule={kind='plateau', factor=0.5, patience=0}"
    settings = ["epochs=4", "batch_size=50", "data.validation=0.2", SGD, plateau]
    train.create(tmp_path, recipe.load("A1", settings), "A1", 0, dataset, unchanged=False)
    state = train.resume(tmp_path, dataset, Console(quiet=True), Watch(), Processes())
    assert [line["lr"] for line in state.history] == [0.05, 0.05, 0.025, 0.0125]
    assert state.history[-1]["train_loss"] < 0.05
    assert state.history[-1]["val_loss"] > 3


def test_order_and_augmentation_are_of_the_seed_and_the_epoch() -> None:
    images = data.load_sample().train
    settings = ["batch_size=300", "drop_last=true", "augment.2.p=1.0"]
    chosen = recipe.load("A1", settings)
    learners = [Learner(chosen, seed, images, Processes()) for seed in (3, 4)]
    orders, drawn = [], []
    for learner, epoch in ((learners[0], 0), (learners[0], 1), (learners[1], 0)):
        (order,), (batch,) = learner.order(epoch), learner.batches(epoch)  # the rest is dropped
        orders.append(order)
        # The hidden pixels, in the order of the batch, show what was drawn for its places.
        drawn.append((batch.inputs == 0).all(1))
    for each in (orders, drawn):
        assert not any(torch.equal(each[0], other) for other in each[1:])


def test_all_that_is_random_is_as_it_was() -> None:
    """So a run goes on the same, and its held-out images stay held out, with a newer program."""
    images = data.load_sample().train
    places = Images(images.pixels, torch.arange(len(images)))
    assert (seed_of(7), seed_of(7, 1, 3)) == (8460147692890830636, 7964965305340474863)
    rest, held_out = (part.labels.tolist() for part in data.split(places, 0.02))
    assert held_out == [3, 4, 183, 250, 302, 380, 387, 437, 487, 489]
    assert rest == sorted(set(range(500)) - set(held_out))
    learner = Learner(recipe.load("A1"), 3, images, Processes())
    assert learner.order(1)[0][:5].tolist() == [191, 453, 61, 174, 445]


def test_a_complete_run_has_its_row_once_and_of_all_its_sessions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, out = tmp_path / "results.csv", tmp_path / "run"
    monkeypatch.setattr(results, "record", partial(results.record, path=path))
    dataset, console = replace(data.load_sample(), source="cifar10"), Console(quiet=True)
    chosen = recipe.load("A1", ["epochs=2", "batch_size=64", "data.validation=0.2", SGD])
    train.create(out, chosen, "A1", 0, dataset)
    with pytest.raises(Stopped):
        train.resume(out, dataset, console, Limited(2), Processes())
    state = checkpoint.load(out / checkpoint.FILE)
    (own,) = state.sessions
    earlier = {"device": "a GPU", "precision": "float16", "python": "3.10", "torch": "1"}
    other = {**own, **earlier, "processes": 2}
    begun = state.model_copy(update={"seconds": 1000.0, "sessions": [other]})
    checkpoint.save(begun, out / checkpoint.FILE)
    with pytest.raises(Stopped):
        train.resume(out, dataset, console, Limited(2), Processes())
    assert checkpoint.load(out / checkpoint.FILE).seconds >= 1000
    for _ in range(2):
        state = train.resume(out, dataset, console, Watch(), Processes())
        (row,) = results.read(path)
        assert row == state.result
    assert row.seconds == state.history[-1]["seconds"] >= 1000
    assert (row.train_images, row.val_accuracy) == (400, state.history[-1]["val_accuracy"])
    assert row.device == f"2 x a GPU + {own['device']}"
    for key in ("precision", "python", "torch"):
        assert getattr(row, key) == f"{earlier[key]} + {own[key]}"
