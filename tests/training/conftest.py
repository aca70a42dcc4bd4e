"""Short real runs on the bundled sample."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor
from typing_extensions import override

from training import checkpoint, data, recipe, results, train
from training.__main__ import main
from training.checkpoint import Checkpoint
from training.processes import Processes
from training.watch import Stopped, Watch

SGD = "optimizer={kind='sgd', lr=0.05, momentum=0.9, nesterov=false, weight_decay=0.0}"


ONE_BLOCK = (
    "{kind='resnet', block={kind='basic'}, blocks=[1], widths=[8], "
    "activation='relu', dropout=0.0, init='default'}"
)


def selection(share: float) -> str:
    """A setting that makes A1's network select images, and learn by SGD."""
    return f"selection={{share={share}, model={{kind='basic_cnn'}}, {SGD}}}"


class Limited(Watch):
    """A watch that finds a reason to stop, like a signal, once it was asked so many ``times``.

    ``needed`` has the seconds of the work that it was asked about.
    """

    def __init__(self, times: int) -> None:
        super().__init__()
        self.times = times
        self.needed: list[float] = []

    @override
    def reason(self, needed: float) -> int:
        self.needed.append(needed)
        return 15 * (len(self.needed) > self.times)


def interrupted_and_whole(
    folder: Path, name: str, settings: Sequence[str]
) -> tuple[Checkpoint, Checkpoint]:
    """The final checkpoints of a run that was stopped after three steps, and of one that was not.

    Their networks and histories are checked to be the same.
    """
    chosen, dataset, console = recipe.load(name, settings), data.load_sample(), Console(quiet=True)
    whole, parts = folder / "whole", folder / "parts"
    for each in (whole, parts):
        train.create(each, chosen, name, 0, dataset, unchanged=False)
    state = train.resume(whole, dataset, console, Watch(), Processes())
    with pytest.raises(Stopped):
        train.resume(parts, dataset, console, Limited(3), Processes())
    begun = checkpoint.load(parts / checkpoint.FILE)
    assert (begun.epoch, begun.step) == (0, 3)
    torch.manual_seed(5)  # as if resumed in another process
    resumed = train.resume(parts, dataset, console, Watch(), Processes())
    assert_same(resumed.model, state.model)
    for line, other in zip(state.history, resumed.history, strict=True):
        assert line | {"seconds": 0} == other | {"seconds": 0}
    return resumed, state


def assert_same(weights: dict[str, Tensor] | None, others: dict[str, Tensor] | None) -> None:
    """Check that both are there, and equal bit for bit."""
    assert weights is not None
    assert others is not None
    assert weights.keys() == others.keys()
    assert all(torch.equal(weights[key], value) for key, value in others.items())


@pytest.fixture(scope="package")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe with A1's network and augmentation that learns in three epochs of eight steps of SGD."""
    path = tmp_path_factory.mktemp("recipe") / "short.toml"
    path.write_text(recipe.load("A1", ["epochs=3", "batch_size=64", SGD]).to_toml())
    return path


@pytest.fixture(scope="package")
def uninterrupted(short: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of ``short`` with seed 7, to be read or copied.

    Its row, if it had one, would be in ``results.csv`` beside it.
    """
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(data.ROOT_VARIABLE, str(data.SAMPLE))
        patch.setattr(results, "record", partial(results.record, path=folder.with_name("results.csv")))
        assert main(["run", str(short), "--out", str(folder), "--seed", "7"]) == 0
    return folder
