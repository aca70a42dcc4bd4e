"""Short real runs, and how two of them are compared."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor
from typing_extensions import override

from training import checkpoint, data, recipe, train
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
