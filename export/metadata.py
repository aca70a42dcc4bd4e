"""The model file's metadata: what serving, and whoever finds the file, can know about it."""

import hashlib
import json
from pathlib import Path

import onnx
from onnx import ModelProto

from export.graph import OPSET
from export.parity import Parity
from training.checkpoint import Checkpoint
from training.model import parameter_count

CONTRACT = "1"


def write(graph: ModelProto, checkpoint: Checkpoint, path: Path, parity: Parity) -> None:
    """Set the graph's metadata: texts, numbers as decimals, lists and objects as JSON.

    Args:
        graph: changed in place; metadata that it has is replaced.
        checkpoint: that the graph was made from; ``path`` is its file.
        parity: the result of the comparison with PyTorch.
    """
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    recipe = checkpoint.parsed_recipe()
    values = {
        "contract": CONTRACT,
        "name": checkpoint.recipe_name,
        "version": digest[:12],
        "classes": json.dumps(checkpoint.classes),
        "recipe": recipe.to_toml(),
        "seed": str(checkpoint.run["seed"]),
        "parameters": str(parameter_count(checkpoint.network())),
        "views": recipe.views,
        "precision": "fp32",
        "opset": str(OPSET),
        "commit": checkpoint.run["commit"],
        "checkpoint_sha256": digest,
    }
    if checkpoint.result is not None:
        values["test_accuracy"] = str(checkpoint.result["accuracy"])
        values["test_images"] = str(checkpoint.result["test_images"])
    values["parity"] = parity.to_json()
    onnx.helper.set_model_props(graph, values)
