"""Members: the checkpoints that a model file is made from."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training import checkpoint as checkpoints
from training.checkpoint import Checkpoint, CheckpointError
from training.evaluate import Classifier
from training.recipe import Recipe, Views


@dataclass(frozen=True)
class Member:
    """A checkpoint, its file's SHA-256 in hexadecimal, and its recipe with the model file's views."""

    checkpoint: Checkpoint
    digest: str
    recipe: Recipe

    def __str__(self) -> str:
        run = self.checkpoint
        return f"{run.recipe_name} seed {run.run['seed']} ({self.digest[:12]})"

    def classifier(self) -> Classifier:
        """The network with normalisation and views, on the CPU.

        Raises:
            CheckpointError: the weights are not those of the recipe's network.
        """
        return Classifier(self.checkpoint.network(), self.recipe)

    def facts(self) -> dict[str, Any]:
        """What a model file says about a member.

        This includes the run's test accuracy, if that was measured with the same views.
        """
        run = self.checkpoint
        facts = {
            "name": run.recipe_name,
            "recipe": run.parsed_recipe().to_toml(),
            "seed": run.run["seed"],
            "views": self.recipe.views,
            "commit": run.commit,
            "checkpoint_sha256": self.digest,
        }
        if (result := run.result) is not None:
            measured = {"none": result.single_view_accuracy, result.views: result.accuracy}
            if self.recipe.views in measured:
                facts["test_accuracy"] = measured[self.recipe.views]
                facts["test_images"] = result.test_images
        return facts


def load(path: Path, views: Views | None) -> Member:
    """Read a checkpoint; ``views``, if given, replace those of its recipe.

    Raises:
        CheckpointError, RecipeError: a checkpoint that cannot be used.
    """
    content = checkpoints.read(path)  # read once, so that the digest is of the bytes that are loaded
    state = checkpoints.decode(content, path)
    recipe = state.parsed_recipe()
    if views is not None:
        recipe = recipe.model_copy(update={"views": views})
    return Member(state, hashlib.sha256(content).hexdigest(), recipe)


def check_different(members: Sequence[Member]) -> None:
    """Raise CheckpointError if a member is given twice: it would count twice in the average."""
    seen: set[str] = set()
    for member in members:
        if member.digest in seen:
            raise CheckpointError(f"{member} is given twice; right would be different checkpoints")
        seen.add(member.digest)
