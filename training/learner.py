"""The steps of training: a recipe's network, optimizers and training images on the device.

All randomness in a step is seeded from (seed, epoch, step), whatever came before.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from training import device, optimizer
from training.augment import Augmenter
from training.average import Average
from training.batch import beside
from training.capture import Captured
from training.data import Images
from training.errors import ExplainedError
from training.initial import initial_network
from training.memory import largest_fitting
from training.objective import Objective
from training.processes import Processes
from training.recipe import Recipe
from training.selection import Selector

T = TypeVar("T")

Forward = Callable[[Tensor, int], Tensor]

AHEAD = 512  # images: smaller batches are augmented several at a time, as small calls cost no less

# Steps that a GPU may be behind: enough that it never waits, and few enough that a run stops in time.
BEHIND = 8


class TrainingError(ExplainedError):
    """Training cannot start or go on; the message says why."""


@dataclass(frozen=True)
class Batch:
    """What a step learns from.

    Attributes:
        epoch, step: the place in the run, both from 0; steps are counted anew in each epoch.
        count: number of images in the global batch.
        inputs: this process's share of them, augmented: float32 [N, 3, S, S] on the device.
        labels: int64 [N], the labels of ``inputs``.
    """

    epoch: int
    step: int
    count: int
    inputs: Tensor
    labels: Tensor


class Learner:
    """Trains a recipe's network on this process's device, one step at a time.

    Args:
        recipe: what to train, and how.
        seed: of the weights, the order of the images and all randomness in a step.
        images: the training images.
        processes: those that share each batch.
        teacher: the checkpoint to distil from; None: the recipe's, if it has one.
        compiled: whether to compile the networks and, on a GPU, to capture the steps as graphs; in a
            single process only. None: the device's default.

    Attributes:
        steps: number of steps in an epoch.
        model: the network that is trained, at first with its initial weights.
        average: its moving average, if the recipe has one.
        selector: chooses the images of each batch to learn from, if the recipe has one.
        optimizers, scaler: a run saves and loads their states; the selector's optimizers come last.

    Raises:
        TrainingError: too few images for a batch, or in a batch for the processes; too few GPUs; or
            compiled steps are asked for with several processes.
        RecipeError: the network does not take the images, or does not fit into memory; or the teacher's
            recipe is not valid in this program.
        CheckpointError: the teacher cannot be used.
    """

    def __init__(
        self,
        recipe: Recipe,
        seed: int,
        images: Images,
        processes: Processes,
        teacher: Path | None = None,
        *,
        compiled: bool | None = None,
    ) -> None:
        self.recipe, self.seed, self.processes = recipe, seed, processes
        gpus = torch.cuda.device_count()
        if 0 < gpus <= processes.local_rank:
            raise TrainingError(
                f"process {processes.local_rank + 1} on a machine with {gpus} GPU{'s' * (gpus > 1)}: "
                f"start one process a GPU, torchrun --nproc-per-node {gpus}"
            )
        self.device = device.choose(processes.local_rank)
        device.prepare(self.device)
        self.dtype = device.precision(recipe.amp, self.device)
        if compiled and processes.count > 1:
            raise TrainingError("steps are compiled in a single process only: leave out --compile")
        if compiled is None:
            compiled = processes.count == 1 and device.compiles(self.device)
        self.compiled = compiled
        self.images = images.to(self.device)
        self.steps, smallest = count_steps(recipe, len(images))
        if smallest < processes.count:
            raise TrainingError(
                f"{processes.count} processes cannot share a batch of {smallest}: start fewer, or set "
                "another batch_size or drop_last"
            )
        network = initial_network(recipe.model, recipe, seed, images)
        self.model = network.to(self.device).to(memory_format=torch.channels_last)
        self.average: Average | None = None
        if recipe.averaging is not None:
            self.average = Average(self.model, recipe.averaging.decay)
        self._network = processes.parallel(self.model)
        self._forward = self._as_stepped(self._network)
        self.optimizers = optimizer.build(recipe.optimizer, self.model)
        self._leading = self.optimizers[-1]
        self.selector: Selector | None = None
        if recipe.selection is not None:
            self.selector = Selector(
                recipe, recipe.selection, seed, images, processes, self.device, self._as_stepped
            )
            self.optimizers += self.selector.optimizers
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self._augment = Augmenter(recipe, len(images), seed, self.device)
        self._objective = Objective(recipe, teacher, self.device)
        self._captured: Captured | None = None
        if compiled and self._can_be_captured():
            self._captured = Captured(self._step_of_graph)
        self._rates = [torch.zeros((), device=self.device) for _ in self._groups()]
        self._behind: deque[torch.cuda.Event] = deque()

    @property
    def precision(self) -> str:
        """The dtype of forward and backward passes in words, with TF32 and compilation if used."""
        rounded = self.dtype == torch.float32 and device.rounds_to_tf32(self.device)
        return (
            str(self.dtype).removeprefix("torch.")
            + " (TF32 in convolutions)" * rounded
            + ", compiled" * self.compiled
        )

    @property
    def result(self) -> nn.Module:
        """The resulting network: the moving average if the recipe has one, else ``model``."""
        return self.model if self.average is None else self.average.network

    @property
    def lr(self) -> float:
        """The learning rate of the last step (Muon's, if SGD trains the other parameters)."""
        lr: float = self._leading.param_groups[0]["lr"]
        return lr

    def selected(self, count: int) -> int:
        """How many of a batch of ``count`` images a step learns from."""
        return count if self.selector is None else self.selector.count(count)

    def order(self, epoch: int) -> list[Tensor]:
        """The batches of an epoch, as indices of the images: int64 on the CPU."""
        generator = torch.Generator().manual_seed(seed_of(self.seed, epoch))
        order = torch.randperm(len(self.images), generator=generator)
        return list(order.split(self.recipe.batch_size)[: self.steps])

    def batches(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        """Yield the batches of an epoch from step ``first`` on.

        Raises:
            TrainingError: out of memory; in a single process, the message names a batch size that fits.
        """
        order = self.order(epoch)
        ahead = max(1, AHEAD // self.recipe.batch_size)
        for start in range(first - first % ahead, len(order), ahead):
            for batch in self._augmented(order[start : start + ahead], epoch, start):
                if batch.step >= first:
                    yield batch

    def to_compile(self, epochs: Iterable[int]) -> list[int]:
        """The ``epochs`` to call ``compile`` for: one for each size of images, if steps are compiled."""
        if not self.compiled or len(self.images) < self.recipe.batch_size:
            return []
        return list({self._augment.image_size(epoch): epoch for epoch in epochs}.values())

    def compile(self, epoch: int) -> None:
        """Compile what the steps of an ``epoch`` need, which may take more than a minute.

        Raises:
            TrainingError: as ``learn``.
        """
        networks = [self.model] + ([self.selector.network] if self.selector is not None else [])
        buffers = [buffer for network in networks for buffer in network.buffers()]
        kept = [buffer.clone() for buffer in buffers]
        self._network.train()
        count = self.recipe.batch_size
        self._explain(lambda: self._try(epoch, count), count, epoch)
        for buffer, value in zip(buffers, kept, strict=True):
            buffer.copy_(value)

    def learn(self, batch: Batch, rate: Callable[[float], float]) -> tuple[Tensor, Tensor]:
        """Do one step; ``rate`` turns a learning rate of the recipe into that of the step.

        Returns:
            The summed loss of the images that this process learned from, and how many of them were
            classified correctly: scalars on the device, which the next step may overwrite.

        Raises:
            TrainingError: out of memory; in a single process, the message names a batch size that fits.
                Or the networks cannot be compiled.
        """
        self._network.train()
        for group in self._groups():
            group["lr"] = rate(group["base_lr"])
        found = self._explain(lambda: self._step(batch), batch.count, batch.epoch)
        if self.average is not None:
            self.average.update(self.model, batch.epoch * self.steps + batch.step)
        if self.device.type == "cuda":
            self._wait_for_earlier_steps()
        return found

    def _augmented(self, places: Sequence[Tensor], epoch: int, start: int) -> list[Batch]:
        """Augmented batches of the images at these ``places``; the first is that of step ``start``."""
        return self._explain(lambda: self._augment_all(places, epoch, start), len(places[0]), epoch)

    def _augment_all(self, places: Sequence[Tensor], epoch: int, start: int) -> list[Batch]:
        # The augmentation is drawn for the global batches, so it is the same however they are shared.
        generator = torch.Generator().manual_seed(seed_of(self.seed, epoch, start))
        indices = torch.cat(list(places))
        drawn = self._augment.draw(indices, epoch, generator)
        shares = [self.processes.rows(len(part)) for part in places]
        if self.processes.count > 1:
            offsets = np.cumsum([0, *map(len, places[:-1])])
            rows = np.concatenate(
                [np.arange(s.start, s.stop) + o for s, o in zip(shares, offsets, strict=True)]
            )
            indices = indices[rows]
            drawn = [{name: values[rows] for name, values in part.items()} for part in drawn]
        own = beside(self.images.pixels, indices.numpy())
        sizes = [share.stop - share.start for share in shares]
        inputs = self._augment.apply(self.images.pixels[own], drawn, epoch).split(sizes)
        labels = self.images.labels[own].split(sizes)
        return [
            Batch(epoch, start + number, len(places[number]), inputs[number], labels[number])
            for number in range(len(places))
        ]

    def _groups(self) -> list[dict[str, Any]]:
        return [group for part in self.optimizers for group in part.param_groups]

    def _step(self, batch: Batch) -> tuple[Tensor, Tensor]:
        rank = self.processes.rank
        if self._captured is not None:
            for group, on_device in zip(self._groups(), self._rates, strict=True):
                on_device.fill_(group["lr"])
            self._seed(batch, 1)
            loss, correct = self._captured(batch.inputs, batch.labels)
            return loss, correct
        self._seed(batch, 1, 1 + rank)
        inputs, labels, selection_loss = self._select(batch.inputs, batch.labels, batch.count)
        # Whether a batch is mixed, and by which share, is the same in all processes; dropout is not.
        self._seed(batch, 1)
        inputs, targets = self._objective.mix(inputs, labels, batch.epoch)
        if not self.processes.first:
            self._seed(batch, 1 + rank)
        found = self._gradients(inputs, targets, selection_loss, batch.count)
        self._optimize()
        return found

    def _seed(self, batch: Batch, *more: int) -> None:
        number = seed_of(self.seed, batch.epoch, batch.step, *more)
        # torch.manual_seed also notes where it was called from, which takes longer than a small step.
        torch.default_generator.manual_seed(number)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(number)

    def _step_of_graph(self, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """A step to capture: its learning rates, and all else that it needs, are read on the GPU."""
        found = self._gradients(*self._select(inputs, labels, len(labels)), len(labels))
        with optimizer.reading_rates(self._groups(), self._rates):
            self._optimize()
        return found

    def _select(
        self, inputs: Tensor, labels: Tensor, count: int
    ) -> tuple[Tensor, Tensor, Tensor | float]:
        """Images to learn from, their labels, and a selector's loss, whose gradients are computed."""
        if self.selector is None:
            return inputs, labels, 0.0
        with self._autocast():
            loss, chosen = self.selector.select(inputs, labels, count)
        self.scaler.scale(loss).backward()
        inputs = inputs[chosen].contiguous(memory_format=torch.channels_last)
        return inputs, labels[chosen], loss.detach()

    def _gradients(
        self, inputs: Tensor, targets: Tensor, selection_loss: Tensor | float, count: int
    ) -> tuple[Tensor, Tensor]:
        """Compute the gradients of a batch of ``count`` images; returns what ``learn`` does.

        ``targets`` are the labels or, of mixed images, as ``Objective.mix`` gives them.
        """
        with self._autocast():
            logits = self._forward(inputs, count)
            loss = self._objective.loss(logits, targets, inputs)
        # Averaged over the processes, this is the mean over the global batch, however it was shared.
        self.scaler.scale(loss * self.processes.count / self.selected(count)).backward()
        # Of a mixed image, the class with the largest share is the right one.
        labels = targets.argmax(1) if targets.ndim == 2 else targets
        correct = (logits.detach().argmax(1) == labels).sum()
        # A diverged selector chooses arbitrarily; 0 times its loss then makes this loss NaN.
        return loss.detach().double() + 0 * selection_loss, correct

    def _optimize(self) -> None:
        for part in self.optimizers:
            with self._autocast():  # Muon's matrix products need no more precision
                self.scaler.step(part)
            part.zero_grad()
        self.scaler.update()

    def _wait_for_earlier_steps(self) -> None:
        event = torch.cuda.Event()
        event.record()
        self._behind.append(event)
        if len(self._behind) > BEHIND:
            self._behind.popleft().synchronize()

    def _as_stepped(self, network: nn.Module) -> Forward:
        """``network`` as the steps call it: with inputs, and the whole batch's image count."""
        compiled = torch.compile(network, dynamic=False) if self.compiled else network
        whole = self.recipe.batch_size
        # Compiling for the smaller batch at an epoch's end takes longer than it would save.
        return lambda inputs, count: (compiled if count == whole else network)(inputs)

    def _can_be_captured(self) -> bool:
        """Return whether a step needs nothing from the host, and the host nothing from the step.

        Mixing is drawn on the host. There fp16's scaler also checks for infinite gradients if an
        optimizer is not fused, as Muon is not.
        """
        scaled_back = all(part.defaults.get("fused") for part in self.optimizers)
        asked = self.scaler.is_enabled() and not scaled_back
        return self.device.type == "cuda" and self.recipe.mixing is None and not asked

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)

    def _explain(self, what: Callable[[], T], count: int, epoch: int) -> T:
        """Call ``what``, for steps of ``count`` images; known errors are raised anew with advice."""
        try:
            return what()
        except RuntimeError as error:
            if not device.out_of_memory(error):
                if self.compiled and _is_of_compiler(error):
                    reason = str(error).partition("\n")[0]
                    raise TrainingError(
                        f"the steps cannot be compiled here: {reason}; install what is missing, such as "
                        "g++ and Python's headers, or go on with --no-compile"
                    ) from error
                raise
        # Only here, after the exception, is the step's own memory free.
        raise self._too_large(count, epoch)

    def _too_large(self, count: int, epoch: int) -> TrainingError:
        if self.processes.count > 1:
            # The search would run BatchNorm, which waits for the others; they are still in their step.
            size = count // 2
            advice = f"try --set batch_size={size}, with a learning rate to match, or more processes"
        elif size := largest_fitting(count, partial(self._try, epoch), self.device):
            advice = f"{size} would fit: --set batch_size={size}, with a learning rate to match"
        else:
            advice = "not even one image fits; this network needs another device"
        return TrainingError(f"out of memory with a batch of {count} on {self.device}: {advice}")

    def _try(self, epoch: int, count: int) -> None:
        """Compute the gradients of a batch of ``count`` images, and drop them."""
        drawn = self._augment.draw(torch.arange(count), epoch, torch.Generator())
        inputs = self._augment.apply(self.images.pixels[:count], drawn, epoch)
        self._gradients(*self._select(inputs, self.images.labels[:count], count), count)
        for part in self.optimizers:
            part.zero_grad()


def count_steps(recipe: Recipe, images: int) -> tuple[int, int]:
    """The number of steps in an epoch over ``images`` images, and the size of its smallest batch.

    Raises:
        TrainingError: there is not a single step.
    """
    whole, rest = divmod(images, recipe.batch_size)
    if rest and not recipe.drop_last:
        return whole + 1, rest
    if whole == 0:
        raise TrainingError(
            f"{images} images are fewer than a batch of {recipe.batch_size}: raise --limit or set a "
            "smaller batch_size"
        )
    return whole, recipe.batch_size


def _is_of_compiler(error: RuntimeError) -> bool:
    from torch._dynamo.exc import TorchDynamoException  # takes a second to import, which few runs need

    return isinstance(error, TorchDynamoException)


def seed_of(*numbers: int) -> int:
    """A seed from several numbers, none of them negative.

    Combinations of equally many numbers below 2**32 have different seeds; but SeedSequence ignores zeros
    at the end, so (3, 1) and (3, 1, 0) have the same one. All runs so far used these seeds.
    """
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))
