"""The largest batch that fits into memory, found by trying."""

from collections.abc import Callable

import torch
from torch import Tensor

from training import device


def largest_fitting(batch: int, step: Callable[[int], None], place: torch.device) -> int:
    """The largest halving of ``batch`` for which ``step`` finds enough memory on ``place``; 0 if none.

    Sizes are tried from the smallest up, each only if more memory is free than it should take: when a
    CPU's memory is used up, oneDNN may call code that it had no room for, which ends the process.

    Args:
        step: computes and drops the gradients of so many images.
    """
    fitting, needed = 0, 0
    for size in (batch >> halvings for halvings in range(batch.bit_length() - 1, 0, -1)):
        device.release_memory(place)
        try:
            torch.empty(needed, dtype=torch.uint8, device=place)
            device.release_memory(place)
            needed = 3 * _kept_by(step, size)  # the next size is twice this one, or one more
        except RuntimeError as error:
            if not device.out_of_memory(error):
                raise
            break
        fitting = size
    return fitting


def _kept_by(step: Callable[[int], None], size: int) -> int:
    """Run a step; returns the bytes that it keeps for its backward pass."""
    kept: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        step(size)
    return sum(kept.values())
