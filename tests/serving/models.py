"""Small model files that keep the contract."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from serving.version import version

CLASSES = [
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
]
METADATA = {
    "contract": "1",
    "name": "tiny",
    "version": "",  # which `write_model` sets
    "classes": json.dumps(CLASSES),
    "precision": "fp32",
    "commit": "12e456789012",
    "parameters": "30720",
    "parity": json.dumps({"images": 1000, "top1_agreement": 1.0}),
}


def write_model(
    path: Path,
    nodes: Sequence[onnx.NodeProto],
    tensors: dict[str, npt.NDArray[Any]],
    *,
    metadata: dict[str, str] = METADATA,
    input_name: str = "images",
    input_type: int = TensorProto.UINT8,
    input_shape: Sequence[int | str] = ("N", 32, 32, 3),
    outputs: int = 10,
) -> Path:
    """Write a model file whose graph leads from the input to `logits`.

    The version in the metadata, if there is one, is the graph's, which has the file's name.
    """
    graph = helper.make_graph(
        nodes,
        path.stem,
        [helper.make_tensor_value_info(input_name, input_type, input_shape)],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, (input_shape[0], outputs))],
        [numpy_helper.from_array(value, name) for name, value in tensors.items()],
    )
    domains = {"", *(node.domain for node in nodes)}
    imports = [helper.make_opsetid(domain, 1 if domain else 17) for domain in sorted(domains)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=9)
    if "version" in metadata:
        metadata = metadata | {"version": version(model.SerializeToString())}
    helper.set_model_props(model, metadata)
    onnx.save(model, path)
    return path


def write_fragile_model(folder: Path) -> Path:
    """A model that looks the brightest value up in a table, which ends at 127 and has NaN at 50."""
    table = np.random.default_rng(0).normal(size=(128, 10)).astype(np.float32)
    table[50] = np.nan
    nodes = [
        helper.make_node("Cast", ["images"], ["integers"], to=TensorProto.INT64),
        helper.make_node("ReduceMax", ["integers"], ["index"], axes=[1, 2, 3], keepdims=0),
        helper.make_node("Gather", ["table", "index"], ["logits"]),
    ]
    return write_model(folder / "fragile.onnx", nodes, {"table": table})


def write_slow_model(folder: Path) -> Path:
    """A model that takes half a GFLOP per image, so that a test can count on work that lasts."""
    normal = np.random.default_rng(0).standard_normal
    nodes = [
        helper.make_node("Cast", ["images"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Reshape", ["floats", "shape"], ["pixels"]),
        helper.make_node("MatMul", ["pixels", "narrow"], ["wide"]),
        helper.make_node("MatMul", ["wide", "square"], ["mixed"]),
        helper.make_node("ReduceMean", ["mixed"], ["means"], axes=[1], keepdims=0),
        helper.make_node("MatMul", ["means", "last"], ["logits"]),
    ]
    tensors: dict[str, npt.NDArray[Any]] = {
        "shape": np.array([0, 1024, 3], np.int64),
        "narrow": normal((3, 512), np.float32) / 255,
        "square": normal((512, 512), np.float32) / 512,
        "last": normal((512, 10), np.float32),
    }
    return write_model(folder / "slow.onnx", nodes, tensors)
