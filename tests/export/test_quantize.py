from pathlib import Path

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, numpy_helper

from export import graph, quantize
from export.ensemble import Ensemble
from export.quantize import TrainingImages
from training import data, recipe
from training.evaluate import Classifier
from training.model import build


def test_convolutions_are_int8_by_channel_and_the_first_one_is_not(files: dict[str, Path]) -> None:
    model = onnx.load(files["int8"])
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    made_by = {name: node for node in model.graph.node for name in node.output}
    convolutions = [node for node in model.graph.node if node.op_type == "Conv"]
    assert len(convolutions) == 10

    def scaled(node: NodeProto, place: int) -> NodeProto | None:
        source = made_by.get(node.input[place])
        return source if source is not None and source.op_type == "DequantizeLinear" else None

    first, *others = convolutions
    assert scaled(first, 0) is None
    assert scaled(first, 1) is None
    for node in others:
        activations, weights = scaled(node, 0), scaled(node, 1)
        assert activations is not None
        assert weights is not None
        assert tensors[activations.input[2]].data_type == TensorProto.UINT8
        assert tensors[weights.input[0]].data_type == TensorProto.INT8
        channels = tensors[weights.input[0]].dims[0]
        assert tensors[weights.input[1]].dims == [channels]
        assert not numpy_helper.to_array(tensors[weights.input[2]]).any(), "weights are symmetric"


def test_a_group_of_three_channels_is_not_taken_for_the_colours() -> None:
    chosen = recipe.load(
        "resnext", ["model.blocks=[1]", "model.widths=[24]", "model.block.groups=4", "views=none"]
    )
    network = build(chosen.model).eval()
    file = quantize.int8(graph.build(Ensemble([Classifier(network, chosen)])))
    scaled = {n for node in file.graph.node if node.op_type == "DequantizeLinear" for n in node.output}
    convolutions = [node for node in file.graph.node if node.op_type == "Conv"]
    assert [node.input[1] in scaled for node in convolutions] == [False, True, True, True]


def test_calibration_images_are_training_images() -> None:
    reader = TrainingImages()
    batches = []
    while (batch := reader.get_next()) is not None:
        batches.append(batch["images"])
    np.testing.assert_array_equal(np.concatenate(batches), data.load_sample().train.pixels.numpy())


def test_files_are_as_small_as_their_precision(files: dict[str, Path]) -> None:
    sizes = {precision: path.stat().st_size for precision, path in files.items()}
    assert sizes["fp16"] < 0.51 * sizes["fp32"]
    assert sizes["int8"] < 0.27 * sizes["fp32"]
