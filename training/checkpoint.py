"""Checkpoints: a file that holds everything about a run, so that it can be resumed.

A checkpoint is a dictionary of plain values and tensors, so it loads with ``weights_only=True``.
"""

import io
import pickle
import shlex
import zipfile
from pathlib import Path
from typing import Annotated, Any, NotRequired

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn
from typing_extensions import TypedDict

from training import model
from training.data import Source
from training.errors import ExplainedError, first_of
from training.files import replacing
from training.provenance import Session
from training.recipe import Recipe, parse
from training.results import Result

FILE = "checkpoint.pt"  # in a run's folder
FORMAT = 1


class CheckpointError(ExplainedError):
    """A checkpoint that is missing, damaged or not one of ours; the message names the file."""


class RunFacts(TypedDict):
    """What a run was created with.

    ``limit`` is as on the command line. ``complete`` runs, of an unchanged recipe on all images, get a
    row in results.csv. ``deterministic`` runs are so on a GPU too; the key is absent in older runs.
    """

    seed: int
    limit: int | None
    complete: bool
    data: Source
    commit: str
    deterministic: NotRequired[bool]


def _as_ours(classes: list[str]) -> list[str]:
    if classes != list(model.CLASSES):
        raise ValueError(f"right would be {', '.join(model.CLASSES)}, in this order")
    return classes


Natural = Annotated[int, Field(ge=0)]


class Checkpoint(BaseModel):
    """The state of a run between two steps.

    Attributes:
        recipe: the resolved recipe, as plain values.
        recipe_name: its name in the registry, or its file's stem.
        classes: the ten class names in the order of the logits.
        run: what the run was created with.
        model: the network's state.
        average: the state of its moving average, if the recipe has one.
        selector: the state of the small network that selects images, if the recipe has one.
        optimizers: the optimizers' states, the small network's last; empty before training starts.
        scaler: the gradient scaler's state, empty without fp16.
        epoch: epochs done.
        step: steps done in the current epoch.
        seconds: time spent training and evaluating so far.
        loss_sum: sum of the losses of the current epoch's images so far.
        correct: how many of the current epoch's images so far were classified correctly.
        history: one dictionary for each epoch, the lines of ``metrics.jsonl``.
        sessions: where and with what the run was trained, one for each start or resumption.
        result: the results on the test images; None if the run was not evaluated on them.
    """

    # The types in a loaded file are checked; nothing is converted.
    model_config = ConfigDict(strict=True, arbitrary_types_allowed=True, extra="forbid")

    recipe: dict[str, Any]
    recipe_name: str
    classes: Annotated[list[str], AfterValidator(_as_ours)]
    run: RunFacts
    model: dict[str, Tensor]
    average: dict[str, Tensor] | None = None
    selector: dict[str, Tensor] | None = None
    optimizers: list[dict[str, Any]]
    scaler: dict[str, Any]
    epoch: Natural = 0
    step: Natural = 0
    seconds: float = 0.0
    loss_sum: float = 0.0
    correct: int = 0
    history: list[dict[str, Any]] = []
    sessions: list[Session] = []
    result: Result | None = None
    _path: Path = Path(FILE)  # of the file that it was read from, if it was

    def parsed_recipe(self) -> Recipe:
        """The recipe, validated anew.

        Raises:
            RecipeError: it is not valid in this program. Whatever needs the recipe raises this too.
        """
        return parse(self.recipe, f"recipe {self.recipe_name} in {self._path}")

    @property
    def commit(self) -> str:
        """The commit of the code that trained the run; all of them if sessions differ."""
        epochs = self.parsed_recipe().epochs
        trained = [session["commit"] for session in self.sessions if session["epoch"] < epochs]
        return " + ".join(dict.fromkeys(trained or [self.run["commit"]]))

    @property
    def finished(self) -> bool:
        """Whether all epochs are trained."""
        return self.epoch >= self.parsed_recipe().epochs

    @property
    def ended(self) -> bool:
        """Whether nothing is left to do: a complete run is evaluated too."""
        return self.finished and not (self.run["complete"] and self.result is None)

    def check_finished(self) -> None:
        """Raise CheckpointError, naming the file, if epochs are left to train."""
        if not self.finished:
            done = f"epoch {self.epoch} of {self.parsed_recipe().epochs}"
            raise CheckpointError(
                f"{self._path}: not finished: {done}; go on with: {resume_command(self._path.parent)}"
            )

    def facts(self) -> dict[str, Any]:
        """The content of ``run.json``: the run's facts without recipe text, tensors and history."""
        return {
            "recipe": self.recipe_name,
            "recipe_digest": self.parsed_recipe().digest(),
            **self.run,
            "epoch": self.epoch,
            "step": self.step,
            "epochs": self.parsed_recipe().epochs,
            "seconds": round(self.seconds, 1),
            "sessions": self.sessions,
            "result": self._result(),
        }

    def values(self) -> dict[str, Any]:
        """All attributes as tensors and plain values."""
        return dict(self) | {"result": self._result()}

    def _result(self) -> dict[str, Any] | None:
        return self.result.model_dump() if self.result else None

    def network(self) -> nn.Module:
        """The run's resulting network, on the CPU: the moving average if the recipe has one.

        Raises:
            CheckpointError: the weights do not fit the recipe's network.
        """
        network = model.build(self.parsed_recipe().model)
        self.load_into(network, self.model if self.average is None else self.average)
        return network

    def load_into(self, network: nn.Module, weights: dict[str, Tensor]) -> None:
        """Load ``weights`` of this checkpoint into ``network``.

        Raises:
            CheckpointError: they do not fit the network.
        """
        try:
            network.load_state_dict(weights)
        except (RuntimeError, AttributeError, TypeError) as error:
            raise self.misfit("weights", error) from error

    def misfit(self, part: str, error: Exception) -> CheckpointError:
        """The error that says that a part of this checkpoint does not fit its recipe."""
        return CheckpointError(f"{self._path}: the {part} do not fit recipe {self.recipe_name}: {error}")


def save(checkpoint: Checkpoint, path: Path) -> None:
    """Write a checkpoint to ``path``; the one that was there becomes the previous one.

    It is written to a file beside and renamed: a kill at any moment leaves a whole checkpoint under one
    of the two names.

    Raises:
        CheckpointError: it could not be written (to a full disk, say); the old ones are untouched.
    """
    beside = path.with_name(path.name + ".next")
    try:
        with replacing(beside) as file:
            torch.save({"format": FORMAT, **checkpoint.values()}, file)
        # A damaged checkpoint must not replace the good previous one that the run was resumed from.
        if _whole(path):
            path.replace(previous(path))
        beside.replace(path)
    # torch reports a file that cannot be written to as a RuntimeError of its zip writer.
    except (OSError, RuntimeError) as error:
        kept = "; the checkpoint before it is untouched, make room and resume" * present(path)
        raise CheckpointError(f"could not write {path}: {error}{kept}") from error


def _whole(path: Path) -> bool:
    try:
        _check_sums(path)
    except Exception:  # nearly anything, as in ``decode``
        return False
    return True


def _check_sums(file: Path | io.BytesIO) -> None:
    """Verify the checksums that torch writes, but does not check when it reads tensors."""
    with zipfile.ZipFile(file) as archive:
        if damaged := archive.testzip():
            raise zipfile.BadZipFile(f"the checksum of {damaged} differs")


def previous(path: Path) -> Path:
    """The path of the checkpoint before the one at ``path``."""
    return path.with_name(f"{path.stem}.previous{path.suffix}")


def present(path: Path) -> bool:
    """Return whether ``load_last`` would find a checkpoint, perhaps a damaged one."""
    return path.exists() or previous(path).exists()


def resume_command(folder: Path) -> str:
    """The shell command that resumes the run in ``folder``."""
    return f"python -m training resume {shlex.quote(str(folder))}"


def load_last(path: Path) -> tuple[Checkpoint, str]:
    """Load the checkpoint at ``path``, or the previous one if that is missing or damaged.

    Returns:
        The checkpoint, and a warning that says why it is the previous one, empty if it is not.

    Raises:
        CheckpointError: neither can be used; the message says why.
    """
    try:
        return load(path), ""
    except CheckpointError as error:
        if not previous(path).exists():
            raise
        try:
            return load(previous(path)), f"{error}; going on from {previous(path).name}"
        except CheckpointError as other:
            raise CheckpointError(f"{error}; {other}") from error


def load(path: Path) -> Checkpoint:
    """Read a checkpoint onto the CPU; nothing in the file is executed.

    Raises:
        CheckpointError: missing, damaged, of another format, or not a checkpoint of ours.
    """
    return decode(read(path), path)


def read(path: Path) -> bytes:
    """Read the bytes of a checkpoint's file.

    Raises:
        CheckpointError: it is missing or cannot be read.
    """
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder; a run's checkpoint is the file {path / FILE}")
    if path.parent.is_file():
        raise CheckpointError(
            f"{path.parent} is a file; a run is named by its folder, {path.parent.parent}"
        )
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}")
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error


def decode(content: bytes, path: Path) -> Checkpoint:
    """Decode a checkpoint from the bytes of its file, onto the CPU; nothing in them is executed.

    Raises:
        CheckpointError: damaged, of another format, or not a checkpoint of ours; names ``path``.
    """
    try:
        _check_sums(io.BytesIO(content))
        data = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # zipfile and torch raise nearly anything for damaged or foreign bytes
        reason = str(error).partition("\n")[0]
        if isinstance(error, pickle.UnpicklingError):  # whose message advises to trust the file
            reason = "it holds more than tensors and plain values"
        raise CheckpointError(f"{path}: damaged or not a checkpoint: {reason}") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise CheckpointError(f"{path}: not a checkpoint of this program (format {FORMAT})")
    del data["format"]
    try:
        # Strict in what it contains, too: a row of results.csv is text, but a result here is not.
        state = Checkpoint.model_validate(data, strict=True)
    except ValidationError as error:
        raise CheckpointError(f"{path}: damaged or not a checkpoint: {first_of(error)}") from error
    state._path = path
    return state
