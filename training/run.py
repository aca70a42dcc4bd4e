"""A run in progress: its state on the training device, taken from a checkpoint and written to one.

All randomness of a step is seeded from (seed, epoch, step): a resumed run goes on exactly as it would
have, without generators' states.
"""

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from training import checkpoint as checkpoints
from training import data, device, model, optimizer, provenance
from training.augment import Augmenter
from training.average import Average
from training.checkpoint import Checkpoint
from training.data import DataSet, Images
from training.evaluate import Evaluation, evaluate
from training.files import replacing
from training.objective import Objective
from training.processes import Processes
from training.results import Result
from training.schedule import learning_rate
from training.watch import Stopped, Watch

CHECKPOINT = "checkpoint.pt"
FACTS = "run.json"
METRICS = "metrics.jsonl"
RECIPE = "recipe.toml"
TEACHER = "teacher.pt"
TENSORBOARD = "tensorboard"

# What a kill may cost: a checkpoint is written at the first step after so many seconds.
SAVE_SECONDS = 60.0
SAVE = 1  # beside the reasons to stop, which are signals' numbers or above


class TrainingError(RuntimeError):
    """A run that cannot start or go on; the message says why."""


@dataclass
class Tally:
    """Sums over the images of an epoch that this process has trained on, on the device."""

    loss: Tensor
    correct: Tensor


class Run:
    """A run on this process's device.

    Args:
        folder: of the run, whose files this writes in the first process.
        state: the checkpoint to go on from.
        dataset: that the run was created for.
        processes: that share the run.
        console: for the progress bar and a line an epoch, in the first process.
        tensorboard: write the epochs' metrics as TensorBoard events too.

    Raises:
        TrainingError: too few images for a batch or for the processes.
        CheckpointError: weights that do not fit, or a teacher that cannot be used.
    """

    def __init__(
        self,
        folder: Path,
        state: Checkpoint,
        dataset: DataSet,
        processes: Processes,
        console: Console,
        tensorboard: bool = False,
    ) -> None:
        self.folder, self.state, self.processes, self.console = folder, state, processes, console
        self.recipe = state.parsed_recipe()
        self.seed: int = state.run["seed"]
        self.device = device.choose(processes.local_rank)
        device.prepare(self.recipe, self.device)
        self.dtype = device.precision(self.recipe.amp, self.device)
        self.precision = str(self.dtype).removeprefix("torch.")

        limit = state.run["limit"]
        train, val = data.split(dataset.train, self.recipe.data.validation)
        self.train_images = train.first(limit).to(self.device)
        self.val_images = val.first(limit).to(self.device)
        self.test_images = dataset.test.first(limit)
        self.steps = self._count_steps()

        network = state.network_with(state.model).to(self.device)
        self.model = network.to(memory_format=torch.channels_last)
        self.average: Average | None = None
        if self.recipe.averaging is not None:
            self.average = Average(self.model, self.recipe.averaging.decay)
            self.average.network.load_state_dict(state.average or state.model)
        self.parallel = processes.parallel(self.model)
        self.optimizers = optimizer.build(self.recipe.optimizer, self.model)
        for part, part_state in zip(self.optimizers, state.optimizers, strict=True):
            part.load_state_dict(part_state)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        if state.scaler:
            self.scaler.load_state_dict(state.scaler)
        self.augment = Augmenter(self.recipe, len(self.train_images), self.seed, self.device)
        self.objective = Objective(self.recipe, folder / TEACHER, self.device)

        name = device.describe(self.device)
        session = provenance.session(state.epoch, state.step, name, self.precision, processes.count)
        state.sessions.append(session)
        self.events: SummaryWriter | None = None
        if tensorboard and processes.first:
            self.events = SummaryWriter(str(folder / TENSORBOARD), purge_step=state.epoch + 1)
        self._saved = time.monotonic()
        self._image_seconds = 0.0  # an image's share of the slowest of the last steps
        self._save_seconds = 0.0

    def train(self, watch: Watch) -> None:
        """Train all epochs that are left.

        Raises:
            Stopped: ``watch`` has a reason to; the checkpoint is written.
            TrainingError: the loss is not finite, or memory does not suffice.
        """
        shared = f", {self.processes.count} processes" if self.processes.count > 1 else ""
        self.console.print(
            f"[bold]{self.state.recipe_name}[/] seed {self.seed}: {len(self.train_images)} "
            f"training images, {model.parameter_count(self.model):,} parameters, {self.precision} on "
            f"{device.describe(self.device)}{shared}"
        )
        columns = (
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[speed]} images/s"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.console, transient=True) as progress:
            total = (self.recipe.epochs - self.state.epoch) * self.steps - self.state.step
            progress.add_task("", total=total, epoch="", speed="")
            while self.state.epoch < self.recipe.epochs:
                self._epoch(watch, progress)

    def test(self, watch: Watch) -> None:
        """Evaluate the trained network on the test images and record the result.

        Raises:
            Stopped: ``watch`` has a reason to.
        """
        needed = len(self.test_images) * self._image_seconds / self.processes.count
        if reason := self.processes.highest(watch.reason(needed)):
            raise Stopped(reason)
        test_images = self.test_images.to(self.device)
        evaluation = self._evaluate(test_images, self.recipe.views)
        single = evaluation
        if self.recipe.views != "none":
            single = self._evaluate(test_images, "none")
        sessions = self.state.sessions
        result = Result(
            date=provenance.now(),
            recipe=self.state.recipe_name,
            recipe_digest=self.recipe.digest(),
            seed=self.seed,
            accuracy=evaluation.accuracy,
            single_view_accuracy=single.accuracy,
            val_accuracy=self.state.history[-1].get("val_accuracy"),
            views=self.recipe.views,
            test_images=evaluation.images,
            train_images=len(self.train_images),
            parameters=model.parameter_count(self.model),
            epochs=self.recipe.epochs,
            seconds=round(self.state.seconds, 1),
            device=_several([_devices(session) for session in sessions]),
            precision=_several([session["precision"] for session in sessions]),
            python=_several([session["python"] for session in sessions]),
            torch=_several([session["torch"] for session in sessions]),
            commit=self.state.run["commit"],
        )
        self.state.result = result.model_dump()
        self._save()

    def _count_steps(self) -> int:
        batch_size = self.recipe.batch_size
        whole, rest = divmod(len(self.train_images), batch_size)
        steps = whole if self.recipe.drop_last or not rest else whole + 1
        if steps == 0:
            raise TrainingError(
                f"{len(self.train_images)} images are fewer than a batch of "
                f"{batch_size}: raise --limit or set a smaller batch_size"
            )
        smallest = batch_size if steps == whole else rest
        if smallest < self.processes.count:
            raise TrainingError(
                f"{self.processes.count} processes cannot share a batch of {smallest}: start fewer, or "
                "set another batch_size or drop_last"
            )
        return steps

    def _epoch(self, watch: Watch, progress: Progress) -> None:
        """Train an epoch from the state's step on, then evaluate it on the ``val`` images."""
        state, batch_size = self.state, self.recipe.batch_size
        began, seconds_before, images = time.monotonic(), state.seconds, 0
        first = self.processes.first  # whose tally goes on from the checkpoint's sums
        tally = Tally(
            torch.tensor(state.loss_sum if first else 0.0, device=self.device, dtype=torch.float64),
            torch.tensor(state.correct if first else 0, device=self.device),
        )
        generator = torch.Generator().manual_seed(_mix(self.seed, state.epoch))
        order = torch.randperm(len(self.train_images), generator=generator)
        (task,) = progress.task_ids
        progress.update(task, epoch=f"{state.epoch + 1}/{self.recipe.epochs}")

        def keep() -> None:
            state.loss_sum = self.processes.total(tally.loss.clone()).item()
            state.correct = int(self.processes.total(tally.correct.clone()).item())
            state.seconds = seconds_before + time.monotonic() - began
            self._save()

        self.parallel.train()
        for step in range(state.step, self.steps):
            wanted = watch.reason(self._needed(batch_size))
            wanted = wanted or SAVE * (time.monotonic() - self._saved > SAVE_SECONDS)
            if wanted := self.processes.highest(wanted):
                keep()
                if wanted != SAVE:
                    raise Stopped(wanted)
            before = time.monotonic()
            indices = order[step * batch_size : (step + 1) * batch_size]
            self._step(indices, step, tally)
            state.step = step + 1
            images += len(indices)
            now = time.monotonic()
            self._image_seconds = max(0.9 * self._image_seconds, (now - before) / len(indices))
            progress.update(task, advance=1, speed=f"{images / (now - began):,.0f}")

        if wanted := self.processes.highest(watch.reason(self._needed(len(self.val_images)))):
            keep()
            raise Stopped(wanted)
        seen = min(self.steps * batch_size, len(self.train_images))
        metrics = {
            "epoch": state.epoch + 1,
            "lr": self.optimizers[-1].param_groups[0]["lr"],
            "train_loss": self.processes.total(tally.loss).item() / seen,
            "train_accuracy": self.processes.total(tally.correct).item() / seen,
        }
        self._check_finite(metrics["train_loss"])
        if len(self.val_images):
            val = self._evaluate(self.val_images, self.recipe.views)
            metrics |= {"val_loss": val.loss, "val_accuracy": val.accuracy}
        state.seconds = seconds_before + time.monotonic() - began
        metrics["seconds"] = round(state.seconds, 1)
        state.history.append(metrics)
        state.epoch, state.step, state.loss_sum, state.correct = state.epoch + 1, 0, 0.0, 0
        ended = state.epoch == self.recipe.epochs
        if self.processes.highest(int(ended or time.monotonic() - self._saved > SAVE_SECONDS)):
            self._save()
        self._report(metrics)

    def _step(self, indices: Tensor, step: int, tally: Tally) -> None:
        """Train on one global batch, whose images' places are ``indices``, int64 [N] on the CPU."""
        try:
            self._minimise(indices, step, tally)
            return
        except RuntimeError as error:
            if not _out_of_memory(error):
                raise
        # Only now, without the exception, the step's own memory is free.
        rows = self.processes.rows(len(indices))
        size = self._fitting(rows.stop - rows.start) * self.processes.count
        advice = f"{size} would fit: --set batch_size={size}, with a learning rate to match"
        if size == 0:
            advice = "not even one image fits; this network needs another device"
        raise TrainingError(f"out of memory with a batch of {len(indices)} on {self.device}: {advice}")

    def _minimise(self, indices: Tensor, step: int, tally: Tally) -> None:
        epoch, count = self.state.epoch, len(indices)
        rows = self.processes.rows(count)
        # The augmentation is drawn for the global batch, so it is the same however that is shared.
        generator = torch.Generator().manual_seed(_mix(self.seed, epoch, step))
        drawn = [
            {name: values[rows] for name, values in parameters.items()}
            for parameters in self.augment.draw(indices, epoch, generator)
        ]
        torch.manual_seed(_mix(self.seed, epoch, step, 1 + self.processes.rank))
        val_losses = [line["val_loss"] for line in self.state.history if "val_loss" in line]
        for part in self.optimizers:
            for group in part.param_groups:
                group["lr"] = learning_rate(
                    self.recipe.schedule,
                    group["base_lr"],
                    epoch + step / self.steps,
                    self.recipe.epochs,
                    val_losses,
                )
        own = indices[rows].to(self.device, non_blocking=True)
        labels = self.train_images.labels[own]
        inputs = self.augment.apply(self.train_images.pixels[own], drawn, epoch)
        inputs, targets = self.objective.mix(inputs, labels)
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            logits = self.parallel(inputs)
            loss = self.objective.loss(logits, targets, inputs)
        # The mean over processes of these is the mean over the global batch, however it was shared.
        share = len(own) * self.processes.count / count
        self.scaler.scale(loss * share).backward()
        for part in self.optimizers:
            self.scaler.step(part)
            part.zero_grad()
        self.scaler.update()
        if self.average is not None:
            self.average.update(self.model, epoch * self.steps + step)
        tally.loss += loss.detach().double() * len(own)
        tally.correct += (logits.detach().argmax(1) == labels).sum()

    def _evaluate(self, images: Images, views: str) -> Evaluation:
        """Evaluate the network that the run gives, each process on its share of the images."""
        network = self.average.network if self.average is not None else self.model
        recipe = self.recipe.model_copy(update={"views": views})
        rows = self.processes.rows(len(images))
        share = evaluate(network, recipe, Images(images.pixels[rows], images.labels[rows]))
        sums = torch.tensor([share.correct, share.loss_sum], dtype=torch.float64)
        correct, loss_sum = self.processes.total(sums).tolist()
        return Evaluation(round(correct), loss_sum, len(images))

    def _needed(self, images: int) -> float:
        """Seconds to train on, or evaluate, so many images and write a checkpoint; rather too many."""
        return 1.0 + 2 * images * self._image_seconds / self.processes.count + 2 * self._save_seconds

    def _check_finite(self, loss: float) -> None:
        if not math.isfinite(loss):
            lr = self.optimizers[-1].param_groups[0]["lr"]
            raise TrainingError(
                f"the loss of epoch {self.state.epoch + 1} is {loss}: the learning rate ({lr:g}) is "
                f"probably too high for this network and batch size; {self.folder / CHECKPOINT} is from "
                "before"
            )

    def _fitting(self, batch: int) -> int:
        """The largest halving of ``batch`` whose gradients can be computed; 0 where none can."""
        while batch := batch // 2:
            device.release_memory(self.device)
            try:
                drawn = self.augment.draw(torch.arange(batch), self.state.epoch, torch.Generator())
                inputs = self.augment.apply(self.train_images.pixels[:batch], drawn, self.state.epoch)
                with torch.autocast(
                    self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32
                ):
                    self.model(inputs).sum().backward()
                return batch
            except RuntimeError as error:
                if not _out_of_memory(error):
                    raise
            for part in self.optimizers:
                part.zero_grad()
        return 0

    def _save(self) -> None:
        """Write the checkpoint and what belongs to it; a run whose loss is not finite keeps the old."""
        self._check_finite(self.state.loss_sum)
        began = time.monotonic()
        self.state.model = self.model.state_dict()
        if self.average is not None:
            self.state.average = self.average.network.state_dict()
        self.state.optimizers = [part.state_dict() for part in self.optimizers]
        self.state.scaler = self.scaler.state_dict()
        if self.processes.first:
            checkpoints.save(self.state, self.folder / CHECKPOINT)
            self._write_history()
        self._saved = time.monotonic()
        self._save_seconds = self._saved - began

    def _report(self, metrics: dict[str, float]) -> None:
        """Tell of an epoch: on the console, in the metrics file, to TensorBoard."""
        if not self.processes.first:
            return
        self._write_history()
        if self.events is not None:
            for key in metrics.keys() - {"epoch"}:
                self.events.add_scalar(key, metrics[key], metrics["epoch"])
            self.events.flush()
        line = "  ".join(f"{key} {value:.6g}" for key, value in metrics.items())
        self.console.print(line, highlight=False)

    def _write_history(self) -> None:
        with replacing(self.folder / METRICS) as file:
            file.writelines(f"{json.dumps(line)}\n".encode() for line in self.state.history)
        with replacing(self.folder / FACTS) as file:
            file.write(f"{json.dumps(self.state.facts(), indent=2)}\n".encode())


def _several(values: list[str]) -> str:
    """Distinct values of a run's sessions, in order."""
    return " + ".join(dict.fromkeys(values))


def _devices(session: provenance.Session) -> str:
    many = f"{session['processes']} x " if session["processes"] > 1 else ""
    return many + session["device"]


def _out_of_memory(error: RuntimeError) -> bool:
    # On a CPU torch's allocator and oneDNN, which cannot create a primitive then, have only texts.
    texts = ("can't allocate memory", "could not create a primitive", "bad_alloc")
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in texts)


def _mix(*numbers: int) -> int:
    """A seed from several numbers, different for each combination."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))
