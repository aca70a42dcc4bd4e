"""The model file's graph: uint8 NHWC images in, logits out, normalisation and views inside."""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator

import onnx
import torch
from onnx import ModelProto

from training.evaluate import Classifier

OPSET = 20
INPUT, OUTPUT = "images", "logits"


def build(classifier: Classifier) -> ModelProto:
    """The ONNX graph of a classifier on the CPU, checked by onnx's checker.

    Input ``images``: uint8 [N, 32, 32, 3]; output ``logits``: float32 [N, 10]; N is dynamic.
    """
    example = torch.zeros(2, 32, 32, 3, dtype=torch.uint8)
    with _quiet():
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
    graph = program.model_proto
    graph.graph.name = "classifier"
    for part in (*graph.graph.node, *graph.graph.value_info, *graph.graph.initializer):
        part.ClearField("metadata_props")  # the exporter's notes on our source code
        part.ClearField("doc_string")
    batch = graph.graph.input[0].type.tensor_type.shape.dim[0]
    if not batch.dim_param:
        raise RuntimeError(f"the exporter fixed the batch to {batch.dim_value} images")
    onnx.checker.check_model(graph, full_check=True)
    return graph


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter, which prints its progress and warns of its own internals."""
    level = logging.getLogger("torch.onnx").level
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.getLogger("torch.onnx").setLevel(level)
