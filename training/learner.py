"""What learns: a recipe's network, its optimizers and its training images on the device, in steps.

All that is random in a step is seeded from (seed, epoch, step), whatever came before.
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

AHEAD = 512  # images: smaller batches are augmented several at a time, as small calls cost as much

# Steps that a GPU may be behind: enough that it never waits, and few enough that a run ends in time.
BEHIND = 8


class TrainingError(ExplainedError):
    """A training that cannot start or go on; the message says why."""


@dataclass(frozen=True)
class Batch:
    """What a step learns from.

    Attributes:
        epoch, step: where in the run, both from 0; a step's number begins anew with each epoch.
        count: images of the global batch.
        inputs: this process's share of them, augmented: float32 [N, 3, S, S] on the device.
        labels: int64 [N], theirs.
    """

    epoch: int
    step: int
    count: int
    inputs: Tensor
    labels: Tensor


class Learner:
    """The training side of a recipe on this process's device.

    Args:
        recipe: what to do.
        seed: of the weights, of the order of the images and of all that is random in a step.
        images: the training images.
        processes: that share each batch.
        teacher: the checkpoint to distil from; None is the recipe's, where it has one.
        compiled: whether torch compiles the steps' networks, in a single process, and on a GPU captures
            the steps; None is as the device has it.

    Attributes:
        steps: in an epoch.
        model: the network that is trained, with its initial weights; ``average`` follows it, where the
            recipe has one.
        selector: chooses the images of each batch that it learns from, where the recipe has one.
        optimizers, scaler: with their states, which a run saves and loads; the selector's come last.

    Raises:
        TrainingError: too few images for a batch, or for the processes, or too few GPUs for them; or
            the steps of several are to be compiled.
        RecipeError: the network does not take the images, or does not fit into memory; or the teacher's
            recipe is none of this program.
        CheckpointError: a teacher that cannot be used.
    """

    def __init__(
        self,
        recipe: Recipe,
        seed: int,
        images: Images,
        processes: Processes,
        teacher: Path | None = None,
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
        """The dtype of forward and backward passes, by its name in torch, and if they are compiled."""
        rounded = self.dtype == torch.float32 and device.rounds_to_tf32(self.device)
        return (
            str(self.dtype).removeprefix("torch.")
            + " (TF32 in convolutions)" * rounded
            + ", compiled" * self.compiled
        )

    @property
    def result(self) -> nn.Module:
        """The network that training gives: the average, where the recipe keeps one."""
        return self.model if self.average is None else self.average.network

    @property
    def lr(self) -> float:
        """The learning rate of the last step (Muon's, where SGD is beside it)."""
        lr: float = self._leading.param_groups[0]["lr"]
        return lr

    def selected(self, count: int) -> int:
        """How many of a batch of ``count`` images a step learns from."""
        return count if self.selector is None else self.selector.count(count)

    def order(self, epoch: int) -> list[Tensor]:
        """The batches of an epoch: places of the images, int64 on the host."""
        generator = torch.Generator().manual_seed(seed_of(self.seed, epoch))
        order = torch.randperm(len(self.images), generator=generator)
        return list(order.split(self.recipe.batch_size)[: self.steps])

    def batches(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        """What the steps of an epoch learn from, from step ``first`` on.

        Raises:
            TrainingError: memory does not suffice; of a single process, the message names a batch that
                fits.
        """
        order = self.order(epoch)
        ahead = max(1, AHEAD // self.recipe.batch_size)
        for start in range(first - first % ahead, len(order), ahead):
            for batch in self._augmented(order[start : start + ahead], epoch, start):
                if batch.step >= first:
                    yield batch

    def to_compile(self, epochs: Iterable[int]) -> list[int]:
        """Those of ``epochs`` that have to be compiled for: one for each size of images."""
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
        """Make one step; ``rate`` gives the learning rate from the recipe's.

        Returns:
            The sum of the losses of the images in this process's share that it learns from, and how many
            of them were classified correctly; scalars on the device, which the next step may overwrite.

        Raises:
            TrainingError: memory does not suffice; of a single process, the message names a batch that
                fits. Or the networks cannot be compiled.
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
        """Batches of images in these ``places``, of which the first is of step ``start``."""
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
        # Whether and by which share a batch is mixed is the same in all processes; dropout is not.
        self._seed(batch, 1)
        inputs, targets = self._objective.mix(inputs, labels, batch.epoch)
        if not self.processes.first:
            self._seed(batch, 1 + rank)
        found = self._gradients(inputs, labels, selection_loss, batch.count, targets)
        self._optimize()
        return found

    def _seed(self, batch: Batch, *more: int) -> None:
        number = seed_of(self.seed, batch.epoch, batch.step, *more)
        # torch.manual_seed would note where it was called from, for longer than a small step takes.
        torch.default_generator.manual_seed(number)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(number)

    def _step_of_graph(self, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """A step whose rates are read on the GPU, and that takes all else from there as well."""
        found = self._gradients(*self._select(inputs, labels, len(labels)), len(labels))
        with optimizer.reading_rates(self._groups(), self._rates):
            self._optimize()
        return found

    def _select(
        self, inputs: Tensor, labels: Tensor, count: int
    ) -> tuple[Tensor, Tensor, Tensor | float]:
        """What to learn from of a batch, and a selector's loss, whose gradients are computed."""
        if self.selector is None:
            return inputs, labels, 0.0
        with self._autocast():
            loss, chosen = self.selector.select(inputs, labels, count)
        self.scaler.scale(loss).backward()
        inputs = inputs[chosen].contiguous(memory_format=torch.channels_last)
        return inputs, labels[chosen], loss.detach()

    def _gradients(
        self,
        inputs: Tensor,
        labels: Tensor,
        selection_loss: Tensor | float,
        count: int,
        targets: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Compute the gradients of a batch of ``count`` images; gives what ``learn`` does.

        ``targets`` are those of mixed images; else the labels are.
        """
        with self._autocast():
            logits = self._forward(inputs, count)
            loss = self._objective.loss(logits, labels if targets is None else targets, inputs)
        # The mean over processes of these is the mean over the global batch, however it was shared.
        self.scaler.scale(loss * self.processes.count / self.selected(count)).backward()
        correct = (logits.detach().argmax(1) == labels).sum()
        # A selector that has diverged chooses anything; 0 times its loss is then not finite.
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
        """``network`` as the steps run it, on inputs of a batch of so many images."""
        compiled = torch.compile(network, dynamic=False) if self.compiled else network
        whole = self.recipe.batch_size
        # The smaller batch at an epoch's end is not worth what it takes to compile for it.
        return lambda inputs, count: (compiled if count == whole else network)(inputs)

    def _can_be_captured(self) -> bool:
        """Whether a step takes all that it needs from the GPU, and the host nothing from the step.

        How images are mixed is drawn on the host. The scaler of fp16 asks there whether a gradient of an
        optimizer that is not fused, as Muon is not, was infinite.
        """
        scaled_back = all(part.defaults.get("fused") for part in self.optimizers)
        asked = self.scaler.is_enabled() and not scaled_back
        return self.device.type == "cuda" and self.recipe.mixing is None and not asked

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)

    def _explain(self, what: Callable[[], T], count: int, epoch: int) -> T:
        """The result of ``what``, with steps of ``count`` images; its errors say what to do."""
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
        # Only now, without the exception, the step's own memory is free.
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
    """The steps of an epoch over so many images, and the images of its smallest batch.

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
    from torch._dynamo.exc import TorchDynamoException  # takes a second, which few runs need

    return isinstance(error, TorchDynamoException)


def seed_of(*numbers: int) -> int:
    """A seed from several numbers, none of them negative.

    Combinations of as many numbers have seeds of their own; but a SeedSequence takes no notice of zeros
    at the end, so (3, 1) and (3, 1, 0) have the same. All runs so far are of these seeds.
    """
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))
