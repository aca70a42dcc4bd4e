from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console

from tests.training.runs import SGD, assert_same, interrupted_and_whole, selection
from training import checkpoint, data, recipe, train
from training.checkpoint import CheckpointError
from training.initial import initial_network
from training.learner import Batch, Learner, TrainingError
from training.processes import Processes
from training.recipe import RecipeError
from training.watch import Watch

SELECTING = [SGD, "epochs=2", "batch_size=64", "label_smoothing=0.1", selection(0.25)]


def learner(settings: list[str]) -> Learner:
    chosen, images = recipe.load("A1", settings), data.load_sample().train
    return Learner(chosen, 0, images, Processes())


def test_the_hardest_are_chosen_and_learned_from() -> None:
    selecting = learner(SELECTING)
    assert selecting.selector is not None
    batch = next(selecting.batches(0))
    logits = selecting.selector.network(batch.inputs)
    losses = F.cross_entropy(logits, batch.labels, label_smoothing=0.1, reduction="none")
    order = losses.argsort(descending=True)
    hardest, others = order[:16].sort().values, order[16:]
    loss, chosen = selecting.selector.select(batch.inputs, batch.labels, 64)
    assert torch.equal(chosen, hardest)
    assert losses[chosen].min() >= losses[others].max()
    torch.testing.assert_close(loss, losses[hardest].mean())

    # For both networks the step is the same as with a batch of only the chosen images.
    alone = learner(SELECTING[:-1])
    small = learner([*SELECTING[:-1], "batch_size=16"])
    small.model.load_state_dict(selecting.selector.network.state_dict())
    part = Batch(0, 0, 16, batch.inputs[hardest], batch.labels[hardest])
    results = [each.learn(part, lambda lr: lr) for each in (alone, small)]
    loss_sum, correct = selecting.learn(batch, lambda lr: lr)
    assert (loss_sum, correct) == results[0]
    assert selecting.selected(64) == 16
    for key, value in alone.model.state_dict().items():
        assert torch.equal(selecting.model.state_dict()[key], value), key
    for key, value in small.model.state_dict().items():
        torch.testing.assert_close(selecting.selector.network.state_dict()[key], value)


def test_a_share_is_of_whole_images_and_one_at_least() -> None:
    selector = learner(SELECTING).selector
    assert selector is not None
    assert [selector.count(images) for images in (1, 2, 6, 64, 1000)] == [1, 1, 2, 16, 250]


def test_resumed_run_selects_as_an_uninterrupted_one(tmp_path: Path) -> None:
    resumed, state = interrupted_and_whole(tmp_path, "A1", SELECTING)
    assert_same(resumed.selector, state.selector)  # on its own, as both networks have the same layers
    assert state.selector is not None
    chosen = state.parsed_recipe()
    initial = initial_network(chosen.model, chosen, 0, data.load_sample().train).state_dict()
    assert all(not torch.equal(state.selector[key], value) for key, value in initial.items())
    # Near ln 10, since the mean is over the images that were learned from, not over all.
    assert all(2 < line["train_loss"] < 3 for line in state.history)


def test_a_checkpoint_without_the_selector_is_an_error(tmp_path: Path) -> None:
    chosen, dataset, path = recipe.load("A1", SELECTING), data.load_sample(), tmp_path / "checkpoint.pt"
    train.create(tmp_path, chosen, "A1", 0, dataset, unchanged=False)
    checkpoint.save(checkpoint.load(path).model_copy(update={"selector": None}), path)
    with pytest.raises(CheckpointError, match=r"(?s)the weights do not fit recipe A1: .*Missing key"):
        train.resume(tmp_path, dataset, Console(quiet=True), Watch(), Processes())


def test_a_selector_that_diverges_stops_the_run(tmp_path: Path) -> None:
    settings = [*SELECTING, "selection.optimizer.lr=1e30"]
    chosen, dataset = recipe.load("A1", settings), data.load_sample()
    train.create(tmp_path, chosen, "A1", 0, dataset, unchanged=False)
    with pytest.raises(TrainingError, match="the loss of epoch 1 is nan"):
        train.resume(tmp_path, dataset, Console(quiet=True), Watch(), Processes())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ([selection(1.0)], "key selection.share: Input should be less than 1"),
        (
            [
                "schedule={kind='shifted_warmup_cosine', warmup_epochs=1, min_lr=0.0}",
                selection(0.5),
            ],
            "shifted_warmup_cosine is defined for one learning rate",
        ),
    ],
)
def test_selections_that_make_no_sense(settings: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe.load("A1", settings)
