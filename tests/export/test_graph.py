from collections.abc import Callable
from copy import deepcopy
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, numpy_helper

from export import graph
from export.ensemble import Ensemble
from export.graph import GraphError
from export.member import load
from tests import ROOT
from tests.export.conftest import Train
from training import checkpoint
from training.evaluate import Classifier

Built = Callable[[str], ModelProto]


@pytest.fixture(scope="module")
def built(train: Train) -> Built:
    """Builds the graph of a recipe's network, once; a test that changes it must copy it first."""

    @cache
    def build(name: str) -> ModelProto:
        state = checkpoint.load(train(name))
        return graph.build(Ensemble([Classifier(state.network(), state.parsed_recipe())]))

    return build


# One recipe for each kind of network, with and without averaged views.
@pytest.mark.parametrize("name", ["A1", "D1", "fast"])
def test_graph_keeps_the_contract(name: str, built: Built) -> None:
    model = built(name)
    (image,), (logits,) = model.graph.input, model.graph.output
    assert (image.name, logits.name) == ("images", "logits")
    assert image.type.tensor_type.elem_type == TensorProto.UINT8
    assert logits.type.tensor_type.elem_type == TensorProto.FLOAT
    shapes = [value.type.tensor_type.shape.dim for value in (image, logits)]
    assert [d.dim_param or d.dim_value for d in shapes[0]] == ["N", 32, 32, 3]
    assert [d.dim_param or d.dim_value for d in shapes[1]] == ["N", 10]
    assert {opset.domain for opset in model.opset_import} == {""}
    assert str(ROOT).encode() not in model.SerializeToString(), "a path of this machine is in the file"


def test_names_are_those_of_the_modules(built: Built) -> None:
    model = built("fast")
    names = [node.name for node in model.graph.node]
    assert len(set(names)) == len(names)
    for node in model.graph.node:
        assert node.op_type in node.name
    modules = {"normalize/Sub", "model.stem/Conv", "model.head/Gemm"}
    assert {f"members.0.{name}" for name in modules} <= {*names}
    known = {tensor.name for tensor in model.graph.initializer} | {"images", "logits"} | {*names}
    assert known.issuperset(name for node in model.graph.node for name in (*node.input, *node.output))
    assert not [name for name in known if "val_" in name or "scalar" in name]


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_written_files_keep_the_contract_and_all_shapes_are_known(
    precision: str, files: dict[str, Path]
) -> None:
    model = onnx.load(files[precision])
    graph.check(model)
    noted = {value.name for value in model.graph.value_info} | {"logits"}
    assert noted.issuperset(name for node in model.graph.node for name in node.output)


def _external(model: ModelProto) -> None:
    model.graph.initializer[0].data_location = TensorProto.EXTERNAL


def _extension(model: ModelProto) -> None:
    model.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))


def _fixed_batch(model: ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 4


def _half_logits(model: ModelProto) -> None:
    model.graph.output[0].type.tensor_type.elem_type = TensorProto.FLOAT16


def _other_version(model: ModelProto) -> None:
    model.ir_version = 9


def _loose_end(model: ModelProto) -> None:
    model.graph.node[1].input[0] = "nowhere"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_external, "are in another file"),
        (_extension, r"operator sets: .*com\.microsoft.*; right would be"),
        (_fixed_batch, r"inputs: .*4, 32, 32, 3.*; right would be .*dynamic"),
        (_half_logits, r"outputs: .*FLOAT16.*; right would be"),
        (_other_version, "IR version: 9; right would be 10"),
        (_loose_end, "not valid ONNX: .*nowhere"),
    ],
)
def test_a_graph_that_is_not_as_it_should_be(
    change: Callable[[ModelProto], None], message: str, built: Built
) -> None:
    model = deepcopy(built("A1"))
    change(model)
    with pytest.raises(GraphError, match=f"(?s){message}"):
        graph.check(model)


def test_shape_that_cannot_be_inferred(train: Train) -> None:
    model = graph.build(Ensemble([load(train("A1"), None).classifier()]))
    *others, last = model.graph.node
    model.graph.initializer.append(numpy_helper.from_array(np.array([-2]), "two"))
    negative = onnx.helper.make_node("Neg", ["two"], ["axes"], name="Neg")
    loose = onnx.helper.make_node("Squeeze", [last.input[0], "axes"], ["loose"], name="Squeeze")
    last = onnx.helper.make_node("Gemm", ["loose", *last.input[1:]], ["logits"], name="Gemm", transB=1)
    del model.graph.node[:]
    model.graph.node.extend([*others, negative, loose, last])
    with pytest.raises(GraphError, match="the shape of what Squeeze"):
        graph.check(model)
