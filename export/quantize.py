"""int8 model files: static quantisation, calibrated on training images.

This follows ONNX Runtime's advice for x86-64 CPUs with VNNI: nodes that quantise and dequantise (QDQ)
around each convolution, uint8 activations scaled by their smallest and largest values, int8 weights,
scaled by channel for accuracy. Only convolutions, which take nearly all the time, compute in int8. The
first one, which sees the pixels, stays float: on training images that lowers the error by a quarter and
costs no time.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_static,
)

from export.graph import INPUT, IR_VERSION, check, quiet
from training import data

BATCH = 50
COLORS = 3


class TrainingImages(CalibrationDataReader):  # type: ignore[misc]
    """The bundled sample's training images, which are the same on every machine."""

    def __init__(self) -> None:
        self._batches: Iterator[NDArray[np.uint8]] = iter(
            batch.numpy() for batch in data.load_sample().train.pixels.split(BATCH)
        )

    def get_next(self) -> dict[str, NDArray[np.uint8]] | None:
        """The next batch as the graph's inputs, or None after the last one."""
        batch = next(self._batches, None)
        return None if batch is None else {INPUT: batch}


def int8(model: ModelProto) -> ModelProto:
    """Quantise a float32 graph of ``export.graph`` to int8; its input and logits keep their types.

    Raises:
        GraphError: the quantised graph does not keep the contract.
    """
    with tempfile.TemporaryDirectory() as folder, quiet():
        float_file, int8_file = Path(folder) / "float.onnx", Path(folder) / "int8.onnx"
        onnx.save(model, float_file)  # given the model itself, the quantiser would empty its tensors
        quantize_static(
            float_file,
            int8_file,
            TrainingImages(),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=["Conv"],
            nodes_to_exclude=_first_convolutions(model),
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.MinMax,
        )
        quantized = onnx.load(int8_file)
    quantized.ir_version = IR_VERSION
    quantized.producer_name, quantized.producer_version = model.producer_name, model.producer_version
    quantized = onnx.shape_inference.infer_shapes(quantized, strict_mode=True)
    check(quantized)
    return quantized


def _first_convolutions(model: ModelProto) -> list[str]:
    """The names of the ungrouped convolutions of three channels: red, green and blue."""
    colors = {tensor.name for tensor in model.graph.initializer if tensor.dims[1:2] == [COLORS]}
    return [
        node.name
        for node in model.graph.node
        if node.op_type == "Conv"
        and node.input[1] in colors
        and all(attribute.i == 1 for attribute in node.attribute if attribute.name == "group")
    ]
