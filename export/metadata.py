"""A model file's metadata: what the service, and anyone who finds the file, can learn about it."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated, Literal

import onnx
from onnx import ModelProto, TensorProto
from pydantic import BaseModel, ConfigDict, Field, Json, ValidationError
from pydantic_core import ErrorDetails

import serving.version
from export import reliability
from export.calibration import Calibration
from export.graph import OPSET, GraphError
from export.member import Member
from export.parity import Parity, Precision
from export.reliability import Bins
from serving.openvino import FULL_PRECISION
from training.data import Source
from training.model import CLASSES, parameter_count
from training.recipe import Views

CONTRACT = "1"

Positive = Annotated[float, Field(gt=0)]


class Part(BaseModel):
    """The keys that are read from a file's metadata, or from an object in them; others are ignored."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)


class Origin(Part):
    """A checkpoint that a model file was made from; for the attributes see ``Member.facts``."""

    name: str
    seed: int
    views: Views
    commit: str
    checkpoint_sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Calibrated(Part):
    """A ``Calibration``, and errors without and with it on ``test_images`` test images."""

    origin: str
    val_images: int
    val_ece_before: float | None
    val_ece_after: float | None
    test_images: int
    test_ece_before: float
    test_ece_after: float


class Measured(Part):
    """The part of a ``Parity`` that is read; the attributes are the same."""

    images: int
    source: Source
    accuracy: float


class Description(Part):
    """What a model file says about itself.

    If it was made from one checkpoint, ``members`` is built from the file's own keys.
    """

    contract: Literal["1"]
    name: Annotated[str, Field(min_length=1)]
    version: Annotated[str, Field(min_length=1)]
    precision: Precision
    classes: Json[list[str]]
    parameters: int
    members: Annotated[Json[list[Origin]], Field(min_length=1)]
    temperature: Positive
    exponent: Positive = 1.0  # which files of earlier versions do not have
    calibration: Json[Calibrated]
    parity: Json[Measured]
    sample_accuracy: float


def write(
    model: ModelProto,
    members: Sequence[Member],
    precision: Precision,
    full_precision: bool,
    calibration: Calibration,
    with_pytorch: Parity,
    parity: Parity,
    others: Sequence[Parity],
    sample_accuracy: float,
    test_reliability: tuple[Bins, Bins],
) -> None:
    """Set a model file's metadata: strings as they are, everything else as JSON.

    Args:
        model: changed in place; the metadata it already has are replaced.
        members: what it was made from. The facts of a single member become keys of the file; those of
            several become objects in the list ``members``.
        precision: fp32, fp16 or int8.
        full_precision: whether the file asks providers not to compute in a shorter type.
        calibration: the calibration that is folded into the graph.
        with_pytorch: the comparison of the fp32 graph with PyTorch.
        parity: the same for fp32; for another precision, the comparison with the fp32 graph.
        others: the comparisons of this machine's other providers with the CPU.
        sample_accuracy: the accuracy on the test images of the bundled sample.
        test_reliability: the reliability on the test images, without and with the calibration.
    """
    before, after = test_reliability
    values: dict[str, object] = {
        "contract": CONTRACT,
        "name": "+".join(member.checkpoint.recipe_name for member in members),
        "version": version(model),
        "classes": list(CLASSES),
        "precision": precision,
        FULL_PRECISION: full_precision,
        "opset": OPSET,
        "parameters": sum(parameter_count(member.checkpoint.network()) for member in members),
    }
    if len(members) == 1:
        values |= members[0].facts()
    else:
        values["members"] = [member.facts() for member in members]
    found = asdict(calibration)
    values |= {key: found.pop(key) for key in ("temperature", "exponent")}
    values["calibration"] = found | {
        "bins": reliability.BINS,
        "test_images": parity.images,
        "test_ece_before": before.error,
        "test_ece_after": after.error,
    }
    values["parity"] = asdict(parity)
    values["pytorch_parity"] = asdict(with_pytorch)
    values["providers"] = [asdict(other) for other in others]
    values["sample_accuracy"] = sample_accuracy
    texts = {k: v if isinstance(v, str) else json.dumps(v) for k, v in values.items()}
    onnx.helper.set_model_props(model, texts)


def version(model: ModelProto) -> str:
    """Twelve hex digits that change with the graph and its weights, but not with the metadata.

    Another precision, calibration or choice of views therefore gives another version.
    """
    return serving.version.version(model.SerializeToString(deterministic=True))


def read(model: ModelProto) -> Description:
    """Read what a model file says about itself, and check it against the graph.

    Raises:
        GraphError: the file is not one of ours: a key is missing, a value is invalid, or values
            contradict each other or the graph.
    """
    texts = {entry.key: entry.value for entry in model.metadata_props}
    if not all(isinstance(text, str) for pair in texts.items() for text in pair):
        raise GraphError("the metadata are damaged: a text of them is not UTF-8")
    try:
        found = Description.model_validate({"members": json.dumps([texts])} | texts)
    except ValidationError as error:
        wrong = "; ".join(map(_told, error.errors()))
        raise GraphError(
            f"the metadata are not as `python -m export write` sets them: {wrong}"
        ) from error
    if found.classes != list(CLASSES):
        raise GraphError(
            f"classes {texts['classes']} in the metadata; right would be {json.dumps(CLASSES)}"
        )
    calibrated, compared = found.calibration.test_images, found.parity.images
    if calibrated != compared:
        raise GraphError(
            f"calibration.test_images {calibrated} in the metadata, and parity.images {compared}"
        )
    if (computed := _precision(model)) != found.precision:
        raise GraphError(
            f"precision {found.precision} in the metadata, but that of the graph is {computed}"
        )
    if (version_here := version(model)) != found.version:
        raise GraphError(
            f"version {found.version} in the metadata, but that of the graph is {version_here}: it was "
            f"changed after it was written"
        )
    return found


def _precision(model: ModelProto) -> Precision:
    if any(node.op_type == "QuantizeLinear" for node in model.graph.node):
        return "int8"
    halves = any(tensor.data_type == TensorProto.FLOAT16 for tensor in model.graph.initializer)
    return "fp16" if halves else "fp32"


def _told(details: ErrorDetails) -> str:
    given = "" if details["type"] == "missing" else f", got {str(details['input'])[:100]}"
    return f"{'.'.join(map(str, details['loc']))}: {details['msg']}{given}"
