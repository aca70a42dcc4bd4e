"""Checkpoints: one file that says everything about a run and lets it go on.

A checkpoint is a dictionary of plain values and tensors, so it loads with ``weights_only=True``.
"""

import pickle
import zipfile
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn
from typing_extensions import TypedDict

from training import model
from training.files import replacing
from training.recipe import Recipe, parse

FORMAT = 1


class CheckpointError(RuntimeError):
    """A checkpoint that is missing, damaged or not one of ours; the message names the file."""


class RunFacts(TypedDict):
    """What a run was created with: ``data`` is ``cifar10`` or ``sample``; ``limit`` as on the command
    line; ``complete`` runs, of an unchanged recipe on all images, get a row in results.csv.
    """

    seed: int
    limit: int | None
    complete: bool
    data: str
    commit: str


Natural = Annotated[int, Field(ge=0)]


class Checkpoint(BaseModel):
    """The state of a run between two steps.

    Attributes:
        recipe: the resolved recipe's data.
        recipe_name: its name in the registry or its file's stem.
        classes: the ten class names in the order of the logits.
        run: what the run was created with.
        model: the network's state.
        optimizers: the optimizers' states.
        scaler: the gradient scaler's state, empty without fp16.
        epoch: epochs done.
        step: steps done in the current epoch.
        seconds: time spent training and evaluating so far.
        loss_sum: sum of the losses of the current epoch's images so far.
        correct: how many of the current epoch's images so far were classified correctly.
        history: a dictionary an epoch, the lines of ``metrics.jsonl``.
        result: the finished run's figures, None before its end.
    """

    # A loaded file's types are checked, nothing is converted.
    model_config = ConfigDict(strict=True, arbitrary_types_allowed=True, extra="forbid")

    recipe: dict[str, Any]
    recipe_name: str
    classes: list[str]
    run: RunFacts
    model: dict[str, Tensor]
    optimizers: list[dict[str, Any]]
    scaler: dict[str, Any]
    epoch: Natural = 0
    step: Natural = 0
    seconds: float = 0.0
    loss_sum: float = 0.0
    correct: int = 0
    history: list[dict[str, Any]] = []
    result: dict[str, Any] | None = None

    def parsed_recipe(self) -> Recipe:
        """The recipe, validated anew."""
        return parse(self.recipe, f"recipe {self.recipe_name} in the checkpoint")

    def network(self) -> nn.Module:
        """The recipe's network with this checkpoint's weights, on the CPU.

        Raises:
            CheckpointError: the weights are not those of the recipe's network.
        """
        network = model.build(self.parsed_recipe().model)
        try:
            network.load_state_dict(self.model)
        except (RuntimeError, AttributeError, TypeError) as error:
            raise CheckpointError(
                f"the weights do not fit recipe {self.recipe_name}: {error}"
            ) from error
        return network


def save(checkpoint: Checkpoint, path: Path) -> None:
    """Write a checkpoint beside ``path`` and rename it there: a kill leaves the old or the new one."""
    values = {name: getattr(checkpoint, name) for name in Checkpoint.model_fields}
    with replacing(path) as file:
        torch.save({"format": FORMAT, **values}, file)


def load(path: Path) -> Checkpoint:
    """Read a checkpoint onto the CPU; nothing in the file is executed.

    Raises:
        CheckpointError: missing, damaged, of another format, or not a checkpoint of ours.
    """
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}")
    try:
        data = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError, zipfile.BadZipFile) as error:
        reason = str(error).partition("\n")[0]
        raise CheckpointError(f"{path}: damaged or not a checkpoint: {reason}") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise CheckpointError(f"{path}: not a checkpoint of this program (format {FORMAT})")
    del data["format"]
    try:
        return Checkpoint.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise CheckpointError(f"{path}: damaged or not a checkpoint: {place}: {first['msg']}") from error
