"""The training job: create a run's folder from a recipe, and train the run through any interruption.

A run is created with a checkpoint of its initial state and then only ever continued from its last
checkpoint, so a first start and a resumption are the same code.
"""

import shlex
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from rich.console import Console
from torch import nn

from training import checkpoint as checkpoints
from training import data, device, model, provenance, results
from training.checkpoint import Checkpoint, RunFacts
from training.data import DataSet
from training.files import held, replacing
from training.initial import check_alone, check_sizes, initial_network
from training.learner import TrainingError, count_steps
from training.processes import Processes
from training.recipe import Recipe, load
from training.run import TEACHER, Run
from training.watch import Watch

RECIPE = "recipe.toml"


def create(
    folder: Path,
    recipe: Recipe,
    name: str,
    seed: int,
    dataset: DataSet,
    *,
    limit: int | None = None,
    unchanged: bool = True,
    deterministic: bool = False,
) -> None:
    """Make a run's folder with its resolved recipe and a checkpoint of its initial state.

    A teacher's checkpoint is copied into it, so that the folder is all that the run needs.

    Args:
        folder: made here; it must not hold a run already.
        recipe: the resolved recipe.
        name: the recipe's name, under which the result will be recorded.
        seed: of the weights, the order of the images and the augmentation.
        dataset: its first training images set a whitening stem.
        limit: train and validate only on the first ``limit`` images.
        unchanged: whether the recipe is as its file has it. A run of a changed recipe, or on a part of
            the images, is a trial, which is never evaluated on the test images.
        deterministic: a GPU has to give the same weights for the same seed, even if interrupted.

    Raises:
        TrainingError: fewer images than a batch, or none held out for a schedule that watches them; or
            the folder holds a run, or another process trains in it; or the teacher is missing, or not
            one that this run may learn from.
        RecipeError: parts of the recipe do not fit each other, or the network does not fit into memory.
        CheckpointError: the teacher cannot be used or is not finished; or the checkpoint cannot be
            written.
        OSError: the folder or another of its files cannot be written.
    """
    train_images, val_images = data.split(dataset.train, recipe.data.validation)
    if recipe.schedule.kind == "plateau" and not len(val_images):
        raise TrainingError(
            f"data.validation={recipe.data.validation:g} holds out none of {len(dataset.train)} images, "
            "and the plateau schedule watches them: set a larger one"
        )
    train_images = train_images.first(limit)
    _, smallest = count_steps(recipe, len(train_images))
    network = initial_network(recipe.model, recipe, seed, train_images)
    selector: nn.Module | None = None
    if recipe.selection is not None:
        selector = initial_network(recipe.selection.model, recipe, seed, train_images)
        check_alone(selector, recipe, smallest)
        smallest = recipe.selection.count(smallest)
    check_alone(network, recipe, smallest)
    state = Checkpoint(
        recipe=recipe.model_dump(mode="json", exclude_none=True),
        recipe_name=name,
        classes=list(model.CLASSES),
        run={
            "seed": seed,
            "limit": limit,
            "complete": unchanged and limit is None,
            "data": dataset.source,
            "commit": provenance.commit(),
            "deterministic": deterministic,
        },
        model=network.state_dict(),
        average=network.state_dict() if recipe.averaging is not None else None,
        selector=selector.state_dict() if selector is not None else None,
        optimizers=[],
        scaler={},
    )
    teacher = b""
    if recipe.distillation is not None:
        teacher = _read_teacher(recipe, Path(recipe.distillation.teacher), state.run)
    folder.mkdir(parents=True, exist_ok=True)
    with _alone_in(folder):
        if checkpoints.present(folder / checkpoints.FILE):
            raise TrainingError(f"{folder} holds a run: resume it, or name another folder with --out")
        if teacher:
            with replacing(folder / TEACHER) as copy:
                copy.write(teacher)
        (folder / RECIPE).write_text(recipe.to_toml(), encoding="utf-8")
        checkpoints.save(state, folder / checkpoints.FILE)


def resume(
    folder: Path,
    dataset: DataSet,
    console: Console,
    watch: Watch,
    processes: Processes,
    *,
    tensorboard: bool = False,
    compiled: bool | None = None,
) -> Checkpoint:
    """Train a created run from its last checkpoint to its end, and evaluate it if it is complete.

    Only complete runs are evaluated on the test images, here and once; the row of one that trained on
    CIFAR-10 is added to ``results.csv``, once. A run that has ended stays as it is.

    Returns:
        The state at the end, with its ``result`` if the run is complete.

    Raises:
        CheckpointError: no checkpoint that can be used, or one that cannot be written.
        TrainingError: the loss is not finite, out of memory, another process trains the run, it was
            created for another data set, or the folder's recipe was changed since.
        RecipeError: the checkpoint's or the folder's recipe is not valid in this program, or its network
            does not fit into memory.
        ResultsError: ``results.csv`` is damaged.
        OSError: another file of the run, or ``results.csv``, cannot be read or written.
        Stopped: ``watch`` has a reason to stop; a checkpoint has been written.
    """
    with _alone_in(folder) if processes.first else nullcontext():
        state, warning = checkpoints.load_last(folder / checkpoints.FILE)
        if warning:
            console.print(warning, style="yellow")
        if state.run["data"] != dataset.source:
            raise TrainingError(f"{folder} trains on {state.run['data']}, not on {dataset.source}")
        _check_unchanged(folder / RECIPE, state)
        if not state.ended:
            if state.run.get("deterministic"):
                device.be_deterministic()
            run = Run(
                folder, state, dataset, processes, console, tensorboard=tensorboard, compiled=compiled
            )
            with watch.signals():
                run.train(watch)
                if state.run["complete"]:
                    run.test(watch)
        if processes.first and state.result is not None and dataset.source == "cifar10":
            results.record(state.result)
        return state


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    with held(folder) as alone:
        if not alone:
            raise TrainingError(f"another process trains in {folder}")
        yield


def _check_unchanged(path: Path, state: Checkpoint) -> None:
    """Raise TrainingError for an edited recipe: the folder would show it, but the run ignore it."""
    if path.exists() and load(path).digest() != state.parsed_recipe().digest():
        raise TrainingError(
            f"{path} was changed, and a run goes on as it began: take the change back (or the file "
            f"away), or begin another run: python -m training run {shlex.quote(str(path))}"
        )


def _read_teacher(recipe: Recipe, teacher: Path, student: RunFacts) -> bytes:
    if not teacher.exists():
        raise TrainingError(
            f"no teacher at {teacher}: train one, or name its checkpoint with "
            "--set distillation.teacher=FILE"
        )
    content = checkpoints.read(teacher)  # read once: the run that writes it may be going on
    state = checkpoints.decode(content, teacher)
    state.check_finished()
    same_data = state.run["data"] == student["data"]
    if student["complete"] and not (state.run["complete"] and same_data):
        raise TrainingError(
            f"{teacher} is of a trial, or of other images: a run that is evaluated on the test images "
            "must learn from a complete run; --set distillation.teacher=FILE makes this run a trial too"
        )
    if recipe.data.validation and not same_data:
        raise TrainingError(
            f"{teacher} was trained on other images ({state.run['data']}, not {student['data']}), which "
            "may be some that this run would hold out; right would be a teacher of these images, or "
            "data.validation=0"
        )
    held_out = state.parsed_recipe().data.validation
    if held_out < recipe.data.validation:
        raise TrainingError(
            f"{teacher} has trained on images that this run would hold out: its data.validation is "
            f"{held_out:g}; right would be at least {recipe.data.validation:g}, as here"
        )
    check_sizes(state.network(), recipe, f"distillation.teacher {teacher}")
    return content
