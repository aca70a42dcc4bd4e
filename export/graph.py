"""The graph of a model file: uint8 NHWC images in, logits out, everything in between inside."""

import ast
import contextlib
import io
import logging
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator

import onnx
import torch
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto
from onnx.checker import ValidationError
from onnx.shape_inference import InferenceError
from torch import nn

from training.errors import ExplainedError

OPSET, IR_VERSION = 20, 10
INPUT, OUTPUT = "images", "logits"
SCOPES = "pkg.torch.onnx.name_scopes"  # the metadata key under which the exporter lists a node's modules


class GraphError(ExplainedError):
    """A model file or graph that breaks the contract; the message says what is wrong and what right."""


def build(classifier: nn.Module) -> ModelProto:
    """Build the ONNX graph of a classifier on the CPU, in the classifier's own precision.

    Nodes and their outputs are named after module and operator (``members.0.model.stem/Conv``).

    Raises:
        GraphError: the exporter's graph does not pass ``check``.
    """
    example = torch.zeros(2, 32, 32, 3, dtype=torch.uint8)
    with quiet("torch.onnx"):
        program = torch.onnx.export(
            classifier.eval(),
            (example,),
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_shapes={"images": {0: torch.export.Dim("N")}},
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    if program is None:
        raise RuntimeError("the exporter returned no program")
    model = program.model_proto
    model.graph.name = "classifier"
    _name(model)
    for part in (*model.graph.node, *model.graph.value_info, *model.graph.initializer):
        part.ClearField("metadata_props")  # the exporter's notes on our source code
        part.ClearField("doc_string")
    check(model)
    return model


def check(model: ModelProto) -> None:
    """Raise GraphError unless a graph keeps the contract and is plain ONNX.

    The contract: the input ``images`` is uint8 [N, 32, 32, 3], the output ``logits`` is float32
    [N, 10], and N is dynamic. Plain ONNX: one file, no extensions, known shapes.
    """
    try:
        _check(model)
    except (ValidationError, InferenceError, ValueError) as error:  # ValueError: a string is not UTF-8
        raise GraphError(f"not valid ONNX: {error}") from error


@contextlib.contextmanager
def quiet(logger: str | None = None) -> Iterator[None]:
    """Silence tools that print their progress and warn about their own internals.

    Hides stdout, warnings, and what ``logger`` (None: the root logger) logs below errors.
    """
    level = logging.getLogger(logger).level
    logging.getLogger(logger).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.getLogger(logger).setLevel(level)


def _check(model: ModelProto) -> None:
    opsets = [(entry.domain, entry.version) for entry in model.opset_import]
    wanted = {
        "IR version": (model.ir_version, IR_VERSION),
        "operator sets": (opsets, [("", OPSET)]),
        "inputs": (_signature(model.graph.input), [(INPUT, "UINT8", ["dynamic", 32, 32, 3])]),
        "outputs": (_signature(model.graph.output), [(OUTPUT, "FLOAT", ["dynamic", 10])]),
    }
    for what, (found, right) in wanted.items():
        if found != right:
            raise GraphError(f"{what}: {found}; right would be {right}")
    for tensor in model.graph.initializer:
        if tensor.data_location == TensorProto.EXTERNAL:
            raise GraphError(f"the values of {tensor.name} are in another file; right would be this one")
    onnx.checker.check_model(model)
    inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    shaped = {value.name for value in inferred.graph.value_info if _has_shape(value)} | {OUTPUT}
    for node in model.graph.node:
        if not shaped.issuperset(node.output):
            raise GraphError(f"the shape of what {node.name} ({node.op_type}) gives cannot be inferred")


def _signature(values: Iterable[ValueInfoProto]) -> list[tuple[str, str, list[object]]]:
    return [
        (
            value.name,
            TensorProto.DataType.Name(value.type.tensor_type.elem_type),
            [
                "dynamic" if size.dim_param else size.dim_value
                for size in value.type.tensor_type.shape.dim
            ],
        )
        for value in values
    ]


def _has_shape(value: ValueInfoProto) -> bool:
    return bool(value.type.tensor_type.HasField("shape"))


def _name(model: ModelProto) -> None:
    """Name nodes, their outputs and constants after module and operator, not the exporter's numbers."""
    counts: Counter[str] = Counter()
    names: dict[str, str] = {}

    def unique(name: str) -> str:
        counts[name] += 1
        return name if counts[name] == 1 else f"{name}_{counts[name]}"

    constants = {tensor.name for tensor in model.graph.initializer if "." not in tensor.name}
    for node in model.graph.node:
        node.name = unique(f"{_module(node)}/{node.op_type}".removeprefix("/"))
        for place, value in enumerate(node.input):
            if value in constants:
                names.setdefault(value, f"{node.name}.{place}")
        for value in node.output:
            names[value] = OUTPUT if value == OUTPUT else node.name
    for node in model.graph.node:
        node.input[:] = [names.get(value, value) for value in node.input]
        node.output[:] = [names[value] for value in node.output]
    for part in (*model.graph.initializer, *model.graph.value_info):
        part.name = names.get(part.name, part.name)


def _module(node: NodeProto) -> str:
    """The innermost module of a node: the exporter lists all its modules and, last, the operation."""
    (scopes,) = [entry.value for entry in node.metadata_props if entry.key == SCOPES] or ["[]"]
    modules = [scope for scope in ast.literal_eval(scopes)[:-1] if not scope.startswith("_")]
    return str(modules[-1]) if modules else ""
