"""What of a step fits into memory, found by trying."""

from collections.abc import Callable

import torch
from torch import Tensor

from training import device


def largest_fitting(batch: int, step: Callable[[int], None], place: torch.device) -> int:
    """The largest halving of ``batch`` for which ``step`` finds memory on ``place``; 0 where none does.

    From the smallest on, and each only where more than it should take is free: with a CPU's memory
    used up, oneDNN may call code that it had no room for, which ends the process.

    Args:
        step: computes and drops the gradients of so many images.
    """
    fitting, needed = 0, 0
    for size in (batch >> halvings for halvings in range(batch.bit_length() - 1, 0, -1)):
        device.release_memory(place)
        try:
            torch.empty(needed, dtype=torch.uint8, device=place)
            device.release_memory(place)
            needed = 3 * _kept_by(step, size)  # the next size is twice this one
        except RuntimeError as error:
            if not device.out_of_memory(error):
                raise
            break
        fitting = size
    return fitting


def _kept_by(step: Callable[[int], None], size: int) -> int:
    """The bytes that a step keeps for its gradients."""
    kept: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        step(size)
    return sum(kept.values())
