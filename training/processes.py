"""Data parallelism: the processes that ``torchrun`` starts for one run.

Every process holds the network and the whole data set, and takes its share of each global batch.
Gradients and BatchNorm statistics are those of the whole batch, so the number of processes does not
change what a recipe does. The first process writes the files and the console's output. A run started
without torchrun is a single process.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

T = TypeVar("T")

# Longer than any evaluation or download takes: a process that waits this long has lost the others.
PATIENCE = timedelta(minutes=30)


class Processes:
    """The processes of this run, seen from one of them.

    Attributes:
        count: how many there are.
        rank: this one's number; the first is 0.
        local_rank: its number on its machine, and the index of its GPU.
    """

    def __init__(self) -> None:
        self.count = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0"))
        self.local_rank = int(os.environ.get("LOCAL_RANK", "0"))

    @property
    def first(self) -> bool:
        """Whether this process writes the files and the console's output."""
        return self.rank == 0

    @contextmanager
    def joined(self) -> Iterator[None]:
        """Connect the processes: by gloo on CPUs, and by nccl on GPUs.

        After an error they are not disconnected, as that could wait for processes that wait in a step
        for this one: torchrun ends them once this one has ended.
        """
        if self.count == 1:
            yield
            return
        # This module's functions take the group as it is at the import, which DDP would do later, for a
        # default, and so would keep it.
        import torch.distributed.nn

        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=PATIENCE)
        yield
        # With the last reference to the group, gloo's threads end. They may still have a tensor to free,
        # and one that does so while the interpreter ends would abort a process that is done.
        dist.destroy_process_group()

    def rows(self, count: int) -> slice:
        """This process's share of ``count`` images of a batch: contiguous, and as even as possible."""
        return slice(count * self.rank // self.count, count * (self.rank + 1) // self.count)

    def agree(self, value: T) -> T:
        """The first process's ``value``, in every process."""
        if self.count == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values)
        return values[0]

    def highest(self, number: int) -> int:
        """The highest of the processes' numbers, in every process."""
        if self.count == 1:
            return number
        highest = torch.tensor(number)
        dist.all_reduce(highest, dist.ReduceOp.MAX)
        return int(highest)

    def total(self, tensor: Tensor) -> Tensor:
        """The sum of the processes' tensors, in every process; ``tensor`` stays as it is."""
        if self.count == 1:
            return tensor
        total = tensor.clone()
        dist.all_reduce(total)
        return total

    def parallel(self, network: nn.Module) -> nn.Module:
        """``network`` as a module whose backward pass averages the gradients over the processes.

        Its BatchNorm layers become ones that see the whole batch.
        """
        if self.count == 1:
            return network
        for module in network.modules():
            if type(module) is nn.BatchNorm2d:
                module.__class__ = SynchronisedBatchNorm
        # Statistics need no broadcast: they are computed from the same sums everywhere.
        return nn.parallel.DistributedDataParallel(network, forward_sync_buffers=False)


class Total(torch.autograd.Function):
    """The sum of the processes' tensors; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        """Sum ``tensor`` over the processes."""
        total = tensor.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        """Sum the gradient over the processes."""
        return Total.forward(ctx, gradients[0].contiguous())


class SynchronisedBatchNorm(nn.BatchNorm2d):
    """BatchNorm with the statistics of all processes' images; unlike torch's own, works on a CPU too."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise float ``x`` [N, C, H, W]; N may differ between the processes."""
        if not self.training:
            return super().forward(x)
        wide = x.float()
        shape = (1, -1, 1, 1)
        size = x.new_full((1,), x.numel() / x.shape[1], dtype=torch.float32)
        sums = Total.apply(torch.cat([wide.sum((0, 2, 3)), size]))
        mean, size = sums[:-1] / sums[-1], sums[-1]
        centred = wide - mean.view(shape)
        variance = Total.apply(centred.square().sum((0, 2, 3))) / size
        with torch.no_grad():
            assert self.running_mean is not None
            assert self.running_var is not None
            assert self.num_batches_tracked is not None
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum or 0.0)
            self.running_var.lerp_(variance * size / (size - 1), self.momentum or 0.0)
        normalised = centred * torch.rsqrt(variance + self.eps).view(shape)
        out: Tensor = normalised * self.weight.view(shape) + self.bias.view(shape)
        return out.to(x.dtype)
