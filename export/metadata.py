"""The model file's metadata: what serving, and whoever finds the file, can know about it."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict

import onnx
from onnx import ModelProto

from export import reliability
from export.graph import OPSET, GraphError
from export.member import Member
from export.parity import LIMITS, Parity
from export.reliability import Bins
from export.temperature import Temperature
from training.model import CLASSES, parameter_count

CONTRACT = "1"
REQUIRED = ("contract", "name", "version", "classes", "precision", "parity")


def write(
    model: ModelProto,
    members: Sequence[Member],
    precision: str,
    temperature: Temperature,
    with_pytorch: Parity,
    parity: Parity,
    providers: Sequence[Parity],
    sample_accuracy: float,
    test_reliability: tuple[Bins, Bins],
) -> None:
    """Set a model file's metadata: texts, numbers as decimals, lists and objects as JSON.

    Args:
        model: changed in place; metadata that it has is replaced.
        members: what it was made from. Of one, the facts are keys of the file; of several, they are
            objects in the list ``members``.
        precision: fp32, fp16 or int8.
        temperature: that is folded into the graph.
        with_pytorch: the result of the comparison of the fp32 graph with PyTorch.
        parity: that, or for another precision the comparison with the fp32 graph.
        providers: those of this machine's other providers with the CPU.
        sample_accuracy: on the test images of the bundled sample.
        test_reliability: on the test images, without and with the temperature.
    """
    del model.metadata_props[:]
    before, after = test_reliability
    values: dict[str, object] = {
        "contract": CONTRACT,
        "name": "+".join(member.checkpoint.recipe_name for member in members),
        "version": version(model),
        "classes": list(CLASSES),
        "precision": precision,
        "opset": OPSET,
        "parameters": sum(parameter_count(member.checkpoint.network()) for member in members),
    }
    if len(members) == 1:
        values |= members[0].facts()
    else:
        values["members"] = [member.facts() for member in members]
    values["temperature"] = temperature.value
    values["calibration"] = asdict(temperature) | {
        "bins": reliability.BINS,
        "test_images": parity.images,
        "test_ece_before": before.error,
        "test_ece_after": after.error,
    }
    values["parity"] = asdict(parity)
    values["pytorch_parity"] = asdict(with_pytorch)
    values["providers"] = [asdict(other) for other in providers]
    values["sample_accuracy"] = sample_accuracy
    texts = {k: v if isinstance(v, str) else json.dumps(v) for k, v in values.items()}
    onnx.helper.set_model_props(model, texts)


def version(model: ModelProto) -> str:
    """Twelve hex digits that change with the graph and its weights, not with the metadata.

    That of another precision, temperature or choice of views is another one.
    """
    bare = ModelProto()
    bare.CopyFrom(model)
    del bare.metadata_props[:]
    return hashlib.sha256(bare.SerializeToString(deterministic=True)).hexdigest()[:12]


def read(model: ModelProto) -> dict[str, str]:
    """A model file's metadata.

    Raises:
        GraphError: it is not of a file of ours: a key is missing, or its value is unknown or not that
            of the graph.
    """
    values = {entry.key: entry.value for entry in model.metadata_props}
    missing = [key for key in REQUIRED if not values.get(key)]
    if missing:
        raise GraphError(
            f"the metadata lacks {', '.join(missing)}; right would be {', '.join(REQUIRED)}, as "
            f"`python -m export write` sets them"
        )
    for key, known in {"contract": [CONTRACT], "precision": [*LIMITS]}.items():
        if values[key] not in known:
            raise GraphError(f"{key} {values[key]!r} in the metadata; known are {', '.join(known)}")
    kinds = {"classes": list, "parity": dict, "calibration": dict, "members": list}
    try:
        for key in values.keys() & kinds.keys():
            if not isinstance(json.loads(values[key]), kinds[key]):
                raise GraphError(f"{key} in the metadata is JSON of another kind: {values[key][:100]}")
    except ValueError as error:
        raise GraphError(f"{key} in the metadata is not JSON: {error}") from error
    if json.loads(values["classes"]) != list(CLASSES):
        raise GraphError(
            f"classes {values['classes']} in the metadata; right would be {json.dumps(CLASSES)}"
        )
    if (found := version(model)) != values["version"]:
        raise GraphError(
            f"version {values['version']} in the metadata, but that of the graph is {found}: it was "
            f"changed after it was written"
        )
    return values
