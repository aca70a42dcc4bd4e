"""A run in progress: loaded from a checkpoint, trained epoch by epoch, saved to checkpoints.

A step depends on the checkpoint's state alone, so a resumed run goes on exactly as it would have.
"""

import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

from training import checkpoint as checkpoints
from training import data, device, model, optimizer, provenance
from training.checkpoint import Checkpoint
from training.data import DataSet, Images
from training.evaluate import SHARES, Evaluation, at_once, evaluate
from training.files import replacing
from training.learner import Learner, TrainingError
from training.processes import Processes
from training.recipe import Recipe, Views
from training.results import Result
from training.schedule import learning_rate
from training.watch import Stopped, Watch

FACTS = "run.json"
METRICS = "metrics.jsonl"
TEACHER = "teacher.pt"
TENSORBOARD = "tensorboard"

# What a kill may cost: a checkpoint is written at the first step after this many seconds.
SAVE_SECONDS = 60.0
SAVE = 1  # lower than the reasons to stop: SIGINT, SIGTERM and TIME_LIMIT


class Run:
    """A run on this process's device.

    Args:
        folder: the run's folder; the first process writes its files.
        state: the checkpoint to go on from.
        dataset: the one that the run was created for.
        processes: those that share the run.
        console: for the progress bar and a line for each epoch, in the first process.
        tensorboard: whether to write the epochs' metrics as TensorBoard events too.
        compiled: whether to compile the steps; None: the device's default.

    Raises:
        TrainingError, RecipeError: as ``Learner``.
        CheckpointError: weights or optimizer states do not fit, or the teacher cannot be used.
    """

    def __init__(
        self,
        folder: Path,
        state: Checkpoint,
        dataset: DataSet,
        processes: Processes,
        console: Console,
        *,
        tensorboard: bool = False,
        compiled: bool | None = None,
    ) -> None:
        self.folder, self.state, self.processes, self.console = folder, state, processes, console
        self.recipe = state.parsed_recipe()
        self.seed: int = state.run["seed"]
        limit = state.run["limit"]
        train, val = data.split(dataset.train, self.recipe.data.validation)
        self.learner = Learner(
            self.recipe,
            self.seed,
            train.first(limit),
            processes,
            folder / TEACHER,
            compiled=compiled,
        )
        self.device = self.learner.device
        self.val_images = val.first(limit).to(self.device)
        self.test_images = dataset.test.first(limit)
        state.load_into(self.learner.model, state.model)
        if self.learner.average is not None:
            state.load_into(self.learner.average.network, state.average or {})
        if self.learner.selector is not None:
            state.load_into(self.learner.selector.network, state.selector or {})
        if state.sessions:
            self._load_optimizers()
        if state.scaler:
            self.learner.scaler.load_state_dict(state.scaler)

        name = device.describe(self.device)
        session = provenance.session(
            state.epoch, state.step, name, self.learner.precision, processes.count
        )
        state.sessions.append(session)
        self.events: SummaryWriter | None = None
        if tensorboard and processes.first:
            self.events = SummaryWriter(str(folder / TENSORBOARD), purge_step=state.epoch + 1)
        self._stepped = False
        self._saved = time.monotonic()
        self._image_seconds = 0.0  # for each image, in the slowest of the last steps
        self._view_seconds = 0.0  # for each view of an image, in the last evaluation
        self._save_seconds = 0.0

    def train(self, watch: Watch) -> None:
        """Train all epochs that are left.

        Raises:
            Stopped: ``watch`` has a reason to stop; the checkpoint is written.
            TrainingError: the loss is not finite, out of memory, or the steps cannot be compiled.
            CheckpointError: a checkpoint cannot be written.
            OSError: a file beside it cannot be written.
        """
        shared = f", {self.processes.count} processes" if self.processes.count > 1 else ""
        self.console.print(
            f"{self.state.recipe_name} seed {self.seed}: {len(self.learner.images)} "
            f"training images, {model.parameter_count(self.learner.model):,} parameters, "
            f"{self.learner.precision} on {device.describe(self.device)}{shared}"
        )
        if epochs := self.learner.to_compile(range(self.state.epoch, self.recipe.epochs)):
            self._compile(epochs, watch)
        columns = (
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[speed]} images/s"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.console, transient=True) as progress:
            total = (self.recipe.epochs - self.state.epoch) * self.learner.steps - self.state.step
            progress.add_task("", total=total, epoch="", speed="")
            while self.state.epoch < self.recipe.epochs:
                self._epoch(watch, progress)

    def test(self, watch: Watch) -> None:
        """Evaluate the trained network on the test images and record the result.

        Raises:
            Stopped: ``watch`` has a reason to stop.
            TrainingError: the loss is not finite, or out of memory.
            CheckpointError: the checkpoint with the result cannot be written.
            OSError: a file beside it cannot be written.
        """

        def go_on(needed: float) -> None:
            if reason := self.processes.highest(watch.reason(self._allowed(needed))):
                raise Stopped(reason)

        go_on(self._needed_to_evaluate(len(self.test_images), *{self.recipe.views, "none"}))
        test_images = self.test_images.to(self.device)
        evaluation = self._evaluate("test", test_images, self.recipe.views, go_on)
        single = evaluation
        if self.recipe.views != "none":
            single = self._evaluate("test", test_images, "none", go_on)
        sessions = self.state.sessions
        self.state.result = Result(
            date=provenance.now(),
            recipe=self.state.recipe_name,
            recipe_digest=self.recipe.digest(),
            seed=self.seed,
            accuracy=evaluation.accuracy,
            single_view_accuracy=single.accuracy,
            val_accuracy=self.state.history[-1].get("val_accuracy"),
            views=self.recipe.views,
            test_images=evaluation.images,
            train_images=len(self.learner.images),
            parameters=model.parameter_count(self.learner.model),
            epochs=self.recipe.epochs,
            seconds=round(self.state.seconds, 1),
            device=_several([_devices(session) for session in sessions]),
            precision=_several([session["precision"] for session in sessions]),
            python=_several([session["python"] for session in sessions]),
            torch=_several([session["torch"] for session in sessions]),
            commit=self.state.commit,
        )
        self._save()

    def _load_optimizers(self) -> None:
        state = self.state
        try:
            for part, part_state in zip(self.learner.optimizers, state.optimizers, strict=True):
                optimizer.load(part, part_state)
        except ValueError as error:
            raise state.misfit("optimizers", error) from error

    def _compile(self, epochs: list[int], watch: Watch) -> None:
        """Compile before the run's clock starts: the time depends on what was compiled here before."""
        began, spent = time.monotonic(), 0.0
        with self.console.status("compiling the steps"):
            for epoch in epochs:
                if reason := watch.reason(self._needed(spent)):
                    raise Stopped(reason)
                before = time.monotonic()
                self.learner.compile(epoch)
                spent = time.monotonic() - before
        self.state.sessions[-1]["compile_seconds"] = round(time.monotonic() - began, 1)

    def _epoch(self, watch: Watch, progress: Progress) -> None:
        """Train an epoch from the state's step on, then evaluate the network on the ``val`` images."""
        state, learner = self.state, self.learner
        began, seconds_before, images = time.monotonic(), state.seconds, 0
        first = self.processes.first  # only its tally goes on from the checkpoint's sums
        loss_sum = torch.tensor(
            state.loss_sum if first else 0.0, device=self.device, dtype=torch.float64
        )
        correct = torch.tensor(state.correct if first else 0, device=self.device)
        val_losses = [line["val_loss"] for line in state.history if "val_loss" in line]
        (task,) = progress.task_ids
        progress.update(task, epoch=f"{state.epoch + 1}/{self.recipe.epochs}")

        def keep() -> None:
            state.loss_sum = self.processes.total(loss_sum).item()
            state.correct = int(self.processes.total(correct).item())
            state.seconds = seconds_before + time.monotonic() - began
            self._save()

        def go_on(needed: float) -> None:
            if wanted := self.processes.highest(watch.reason(self._allowed(needed))):
                keep()
                raise Stopped(wanted)

        for batch in learner.batches(state.epoch, state.step):
            wanted = watch.reason(self._needed(self.recipe.batch_size * self._image_seconds))
            wanted = wanted or SAVE * (time.monotonic() - self._saved > SAVE_SECONDS)
            if wanted := self.processes.highest(wanted):
                keep()
                if wanted != SAVE:
                    raise Stopped(wanted)
            before = time.monotonic()
            done = state.epoch + batch.step / learner.steps

            def rate(base: float, done: float = done) -> float:
                return learning_rate(self.recipe.schedule, base, done, self.recipe.epochs, val_losses)

            loss, right = learner.learn(batch, rate)
            self._stepped = True
            loss_sum += loss
            correct += right
            state.step = batch.step + 1
            images += batch.count
            now = time.monotonic()
            self._image_seconds = max(0.9 * self._image_seconds, (now - before) / batch.count)
            progress.update(task, advance=1, speed=f"{images / (now - began):,.0f}")

        ended = state.epoch + 1 == self.recipe.epochs
        # Several views take that many times as long, so they are for the last epoch, the result's, only.
        views = self.recipe.views if ended else "none"
        go_on(self._needed_to_evaluate(len(self.val_images), views))
        seen = sum(learner.selected(len(places)) for places in learner.order(state.epoch))
        metrics = {
            "epoch": state.epoch + 1,
            "lr": learner.lr,
            "train_loss": self.processes.total(loss_sum).item() / seen,
            "train_accuracy": self.processes.total(correct).item() / seen,
        }
        self._check_finite("loss", metrics["train_loss"])
        if len(self.val_images):
            val = self._evaluate("val", self.val_images, views, go_on)
            metrics |= {"val_loss": val.loss, "val_accuracy": val.accuracy}
        state.seconds = seconds_before + time.monotonic() - began
        metrics["seconds"] = round(state.seconds, 1)
        state.history.append(metrics)
        state.epoch, state.step, state.loss_sum, state.correct = state.epoch + 1, 0, 0.0, 0
        if self.processes.highest(int(ended or time.monotonic() - self._saved > SAVE_SECONDS)):
            self._save()
        elif self.processes.first:
            self._write_history()
        self._report(metrics)

    def _evaluate(
        self, part: str, images: Images, views: Views, go_on: Callable[[float], None]
    ) -> Evaluation:
        """Evaluate the run's resulting network, each process on its share of the images.

        ``part`` is their name in the error for a loss that is not finite. ``go_on`` is called before
        every few images with the seconds that they need, and raises ``Stopped`` if those are not left.
        """
        recipe = self.recipe.model_copy(update={"views": views})
        together = at_once(views) * self.processes.count
        sums = torch.zeros(2, dtype=torch.float64)
        own, spent, seconds = 0, 0.0, 0.0
        for first in range(0, len(images), together):
            go_on(self._needed(seconds))
            began = time.monotonic()
            rows = self.processes.rows(min(together, len(images) - first))
            rows = slice(first + rows.start, first + rows.stop)
            share = self._evaluate_share(recipe, Images(images.pixels[rows], images.labels[rows]))
            sums += torch.tensor([share.correct, share.loss_sum], dtype=torch.float64)
            seconds = time.monotonic() - began
            own, spent = own + share.images, spent + seconds
        if own:
            self._view_seconds = spent / (own * len(SHARES[views]))
        correct, loss_sum = self.processes.total(sums).tolist()
        self._check_finite(f"{part} loss", loss_sum)
        return Evaluation(round(correct), loss_sum, len(images))

    def _evaluate_share(self, recipe: Recipe, images: Images) -> Evaluation:
        if not len(images):
            return Evaluation(0, 0.0, 0)
        try:
            return evaluate(self.learner.result, recipe, images)
        except RuntimeError as error:
            if not device.out_of_memory(error):
                raise
            raise TrainingError(
                f"out of memory in the evaluation of {len(images)} images on {self.device}: make room, "
                f"and go on with: {checkpoints.resume_command(self.folder)}"
            ) from error

    def _needed(self, seconds: float) -> float:
        """Seconds to allow for work that should take ``seconds`` and a checkpoint; rather too many."""
        return 1.0 + 2 * seconds + 2 * self._save_seconds

    def _allowed(self, needed: float) -> float:
        """The seconds that must be left for a part of an evaluation that needs ``needed``.

        An evaluation with which a session begins has no limit: nothing of it is in a checkpoint, so with
        too tight a limit each session would begin it anew.
        """
        return needed if self._stepped else -math.inf

    def _needed_to_evaluate(self, images: int, *views: Views) -> float:
        """Seconds to evaluate ``images`` images by these views; at first judged by training's pace."""
        passes = images * sum(len(SHARES[each]) for each in views)
        view_seconds = self._view_seconds / self.processes.count
        return self._needed(passes * (view_seconds or self._image_seconds))

    def _check_finite(self, name: str, loss: float) -> None:
        if not math.isfinite(loss):
            epoch = self.state.epoch + (self.state.step > 0)  # the epoch under way, or the last one
            raise TrainingError(
                f"the {name} of epoch {epoch} is {loss}: the learning rate "
                f"({self.learner.lr:g}) is probably too high for this network and batch size; start "
                f"anew with a lower one, as {self.folder / checkpoints.FILE}, written before this was "
                f"seen, may hold weights that are too large already"
            )

    def _save(self) -> None:
        """Write the checkpoint and the files beside it; keep the old ones if the loss is not finite."""
        self._check_finite("loss", self.state.loss_sum)
        began = time.monotonic()
        self.state.model = self.learner.model.state_dict()
        if self.learner.average is not None:
            self.state.average = self.learner.average.network.state_dict()
        if self.learner.selector is not None:
            self.state.selector = self.learner.selector.network.state_dict()
        self.state.optimizers = [part.state_dict() for part in self.learner.optimizers]
        self.state.scaler = self.learner.scaler.state_dict()
        if self.processes.first:
            checkpoints.save(self.state, self.folder / checkpoints.FILE)
            self._write_history()
        self._saved = time.monotonic()
        self._save_seconds = self._saved - began

    def _report(self, metrics: dict[str, float]) -> None:
        """Report an epoch's metrics on the console and to TensorBoard."""
        if self.events is not None:
            for key in metrics.keys() - {"epoch"}:
                self.events.add_scalar(key, metrics[key], metrics["epoch"])
            self.events.flush()
        line = "  ".join(f"{key} {value:.6g}" for key, value in metrics.items())
        self.console.print(line)

    def _write_history(self) -> None:
        with replacing(self.folder / METRICS) as file:
            file.writelines(f"{json.dumps(line)}\n".encode() for line in self.state.history)
        with replacing(self.folder / FACTS) as file:
            file.write(f"{json.dumps(self.state.facts(), indent=2)}\n".encode())


def _several(values: list[str]) -> str:
    """The distinct values of a run's sessions in order, as one text."""
    return " + ".join(dict.fromkeys(values))


def _devices(session: provenance.Session) -> str:
    many = f"{session['processes']} x " if session["processes"] > 1 else ""
    return many + session["device"]
