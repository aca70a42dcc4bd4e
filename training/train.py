"""A run: from a recipe to a trained, evaluated checkpoint, through any number of interruptions.

A run is created with a checkpoint of its initial state and then only ever continued from its last
checkpoint, so a first start and a resumption are the same code. All randomness of a step is seeded
from (seed, epoch, step): a resumed run goes on exactly as it would have, without generators' states.
"""

import json
import math
import platform
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from training import checkpoint as checkpoints
from training import data, device, model, optimizer, results
from training.augment import Augmenter, Normalize
from training.checkpoint import Checkpoint
from training.data import DataSet
from training.evaluate import evaluate
from training.files import replacing
from training.recipe import Recipe
from training.results import Result
from training.schedule import learning_rate

CHECKPOINT = "checkpoint.pt"
METRICS = "metrics.jsonl"
RECIPE = "recipe.toml"


class TrainingError(RuntimeError):
    """A run that cannot start or go on; the message says why."""


class Interrupted(Exception):
    """A signal stopped the run after it had written its checkpoint."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


def create(
    folder: Path,
    recipe: Recipe,
    name: str,
    seed: int,
    dataset: DataSet,
    limit: int | None = None,
    complete: bool = True,
) -> None:
    """Make a run's folder with its resolved recipe and a checkpoint of its initial state.

    Args:
        folder: made here; it must not hold a run already.
        recipe: the resolved recipe, and ``name``, that under which its result will be recorded.
        seed: of the weights, the order of the images and the augmentation.
        dataset: its first training images set a whitening stem.
        limit: train, validate and test on the first so many images only.
        complete: the recipe is as its file has it, so that the result deserves a row.

    Raises:
        TrainingError: the folder holds a run.
        RecipeError: parts of the recipe that do not fit each other.
    """
    if (folder / CHECKPOINT).exists():
        raise TrainingError(f"{folder} holds a run: resume it, or name another folder with --out")
    torch.manual_seed(seed)
    network = model.build(recipe.model)
    train_images = data.split(dataset.train, recipe.data.validation)[0].first(limit)
    if isinstance(network, model.WhitenedResNet):
        normalize = Normalize(recipe.data.mean, recipe.data.std)
        network.whiten(normalize(train_images.pixels[:5000].permute(0, 3, 1, 2)))
    state = Checkpoint(
        recipe=recipe.model_dump(mode="json", exclude_none=True),
        recipe_name=name,
        classes=list(model.CLASSES),
        run={
            "seed": seed,
            "limit": limit,
            "complete": complete and limit is None and dataset.source == "cifar10",
            "data": dataset.source,
            "commit": _commit(),
        },
        model=network.state_dict(),
        optimizers=[part.state_dict() for part in optimizer.build(recipe.optimizer, network)],
        scaler={},
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RECIPE).write_text(recipe.to_toml(), encoding="utf-8")
    checkpoints.save(state, folder / CHECKPOINT)


def resume(folder: Path, dataset: DataSet, console: Console) -> Result:
    """Train a created run from its last checkpoint to its end, then evaluate it on the test images.

    The test images are used here and nowhere else, once. The row of a complete run is appended to
    ``results.csv``; a run that had ended already gives its result again.

    Raises:
        CheckpointError: no checkpoint, or one that cannot be used.
        TrainingError: the loss is not finite, or the run was created for another data set.
        Interrupted: SIGINT or SIGTERM; a checkpoint was written before.
    """
    state = checkpoints.load(folder / CHECKPOINT)
    if state.run["data"] != dataset.source:
        raise TrainingError(f"{folder} trains on {state.run['data']}, not on {dataset.source}")
    run = Run(folder, state, dataset, console)
    if state.result is None:
        with _stop_on_signals() as signals:
            run.train(signals)
        run.test()
    result = Result.model_validate(state.result)
    if state.run["complete"] and result not in results.read():
        results.append(result)
    return result


class Run:
    """A run in progress: its state on the training device."""

    def __init__(self, folder: Path, state: Checkpoint, dataset: DataSet, console: Console) -> None:
        self.folder, self.state, self.console = folder, state, console
        self.recipe = state.parsed_recipe()
        self.seed: int = state.run["seed"]
        self.device = device.choose()
        device.prepare(self.recipe, self.device)
        self.dtype = device.precision(self.recipe.amp, self.device)

        limit = state.run["limit"]
        train, val = data.split(dataset.train, self.recipe.data.validation)
        self.train_images = train.first(limit).to(self.device)
        self.val_images = val.first(limit).to(self.device)
        self.test_images = dataset.test.first(limit)
        batches = len(self.train_images) / self.recipe.batch_size
        self.steps = math.floor(batches) if self.recipe.drop_last else math.ceil(batches)
        if self.steps == 0:
            raise TrainingError(
                f"{len(self.train_images)} images are fewer than a batch of "
                f"{self.recipe.batch_size}: raise --limit or set a smaller batch_size"
            )

        network = state.network().to(self.device)
        self.model = network.to(memory_format=torch.channels_last)
        self.optimizers = optimizer.build(self.recipe.optimizer, self.model)
        for part, part_state in zip(self.optimizers, state.optimizers, strict=True):
            part.load_state_dict(part_state)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        if state.scaler:
            self.scaler.load_state_dict(state.scaler)
        self.augment = Augmenter(self.recipe, len(self.train_images), self.seed, self.device)

    def train(self, signals: list[int]) -> None:
        """Train all epochs that are left; stop at the next step once ``signals`` has one."""
        self.console.print(
            f"[bold]{self.state.recipe_name}[/] seed {self.seed}: {len(self.train_images)} "
            f"training images, {model.parameter_count(self.model):,} parameters, {self._precision()} on "
            f"{device.describe(self.device)}"
        )
        columns = (
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[speed]} images/s"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.console, transient=True) as progress:
            total = (self.recipe.epochs - self.state.epoch) * self.steps
            task = progress.add_task("", total=total, epoch="", speed="")
            while self.state.epoch < self.recipe.epochs:
                epoch = f"{self.state.epoch + 1}/{self.recipe.epochs}"
                progress.update(task, epoch=epoch)
                start = time.monotonic()
                for done in self._epoch(signals):
                    elapsed = time.monotonic() - start
                    progress.update(task, advance=1, speed=f"{done / elapsed:,.0f}")

    def test(self) -> None:
        """Evaluate the trained network on the test images and record the result."""
        test_images = self.test_images.to(self.device)
        evaluation = evaluate(self.model, self.recipe, test_images)
        single = evaluation
        if self.recipe.views != "none":
            single = evaluate(self.model, self.recipe.model_copy(update={"views": "none"}), test_images)
        last = self.state.history[-1]
        result = Result(
            date=datetime.now(UTC).isoformat(timespec="seconds"),
            recipe=self.state.recipe_name,
            recipe_digest=self.recipe.digest(),
            seed=self.seed,
            accuracy=evaluation.accuracy,
            single_view_accuracy=single.accuracy,
            val_accuracy=last.get("val_accuracy"),
            views=self.recipe.views,
            test_images=evaluation.images,
            train_images=len(self.train_images),
            parameters=model.parameter_count(self.model),
            epochs=self.recipe.epochs,
            seconds=round(self.state.seconds, 1),
            device=device.describe(self.device),
            precision=self._precision(),
            python=platform.python_version(),
            torch=torch.__version__,
            commit=self.state.run["commit"],
        )
        self.state.result = result.model_dump()
        self._save()

    def _epoch(self, signals: list[int]) -> Iterator[int]:
        """Train one epoch from the state's step on; yields the images trained since the call."""
        state, count, batch_size = self.state, len(self.train_images), self.recipe.batch_size
        began, seconds_before, images = time.monotonic(), state.seconds, 0
        loss_sum = torch.tensor(state.loss_sum, device=self.device, dtype=torch.float64)
        correct = torch.tensor(state.correct, device=self.device)
        generator = torch.Generator().manual_seed(_mix(self.seed, state.epoch))
        order = torch.randperm(count, generator=generator).to(self.device)
        self.model.train()
        for step in range(state.step, self.steps):
            indices = order[step * batch_size : (step + 1) * batch_size]
            loss, logits = self._step(indices, step)
            loss_sum += loss.double() * len(indices)
            correct += (logits.argmax(1) == self.train_images.labels[indices]).sum()
            images += len(indices)
            state.step = step + 1
            if signals:
                state.loss_sum, state.correct = loss_sum.item(), int(correct.item())
                state.seconds = seconds_before + time.monotonic() - began
                self._save()
                raise Interrupted(signals[0])
            yield images

        seen = min(self.steps * batch_size, count)
        metrics = {
            "epoch": state.epoch + 1,
            "lr": self.optimizers[-1].param_groups[0]["lr"],
            "train_loss": loss_sum.item() / seen,
            "train_accuracy": correct.item() / seen,
        }
        if not math.isfinite(metrics["train_loss"]):
            raise TrainingError(
                f"the loss of epoch {state.epoch + 1} is {metrics['train_loss']}: the learning "
                f"rate ({metrics['lr']:g}) is probably too high for this network and batch size"
            )
        if len(self.val_images):
            val = evaluate(self.model, self.recipe, self.val_images)
            metrics |= {"val_loss": val.loss, "val_accuracy": val.accuracy}
        state.seconds = seconds_before + time.monotonic() - began
        metrics["seconds"] = round(state.seconds, 1)
        state.history.append(metrics)
        state.epoch, state.step, state.loss_sum, state.correct = state.epoch + 1, 0, 0.0, 0
        self._save()
        self.console.print(
            "  ".join(f"{key} {value:.6g}" for key, value in metrics.items()), highlight=False
        )

    def _step(self, indices: Tensor, step: int) -> tuple[Tensor, Tensor]:
        epoch = self.state.epoch
        torch.manual_seed(_mix(self.seed, epoch, step))
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
        inputs = self.augment(self.train_images.pixels[indices], indices, epoch)
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            logits = self.model(inputs)
            loss = F.cross_entropy(
                logits,
                self.train_images.labels[indices],
                label_smoothing=self.recipe.label_smoothing,
            )
        self.scaler.scale(loss).backward()
        for part in self.optimizers:
            self.scaler.step(part)
            part.zero_grad()
        self.scaler.update()
        return loss.detach(), logits.detach()

    def _save(self) -> None:
        """Write the checkpoint and the metrics that belong to it."""
        self.state.model = self.model.state_dict()
        self.state.optimizers = [part.state_dict() for part in self.optimizers]
        self.state.scaler = self.scaler.state_dict()
        checkpoints.save(self.state, self.folder / CHECKPOINT)
        with replacing(self.folder / METRICS) as file:
            file.writelines(f"{json.dumps(line)}\n".encode() for line in self.state.history)

    def _precision(self) -> str:
        return str(self.dtype).removeprefix("torch.")


def _mix(*numbers: int) -> int:
    """A seed from several numbers, different for each combination."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


@contextmanager
def _stop_on_signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM in a list; a second one acts as it did before."""
    received: list[int] = []
    before = {int(n): signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}

    def receive(number: int, frame: FrameType | None) -> None:
        received.append(number)
        signal.signal(number, before[number])

    for number in before:
        signal.signal(number, receive)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _commit() -> str:
    """The repository's commit, ``-dirty`` with uncommitted changes, ``unknown`` outside of git."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return described.stdout.strip()
