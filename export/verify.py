"""Verification: a model file is one of ours and computes here what it says it does."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError
from onnx import ModelProto

from export import graph, member, metadata, parity, reliability
from export.ensemble import ROUNDED, Ensemble, rounded
from export.graph import GraphError
from export.parity import ELSEWHERE, LIMITS, PYTORCH, Finding, Parity, ParityError, percent
from export.provider import BATCH, CPU, others
from training.data import ROOT_VARIABLE
from training.evaluate import logits


@dataclass(frozen=True)
class Verification:
    """What a model file says of itself, and what was found.

    Attributes:
        metadata: texts; numbers, lists and objects are JSON.
        accuracy: on the test images here, beside that in the metadata.
        parity: with PyTorch, where checkpoints were given, and of each other provider with the CPU.
        ece: expected calibration error on the test images here, a fraction.
    """

    metadata: dict[str, str]
    accuracy: Finding
    parity: list[tuple[Parity, list[Finding]]]
    ece: float

    def check(self) -> None:
        """Raise ParityError where something is outside its limit."""
        findings = [("", self.accuracy)] + [
            (f" on {report.provider}", finding) for report, part in self.parity for finding in part
        ]
        failed = [f"{f.what}{on} {f.measured} (limit: {f.limit})" for on, f in findings if not f.passed]
        if failed:
            raise ParityError(f"the model file does not compute what it should: {', '.join(failed)}")


def verify(path: Path, checkpoints: Sequence[Path] = ()) -> Verification:
    """Check a model file's graph and metadata and run it on the test images by every provider here.

    On the CPU its accuracy must be that in its metadata, which was measured on perhaps another
    processor, by the limits for other providers; other providers are compared with the CPU. Where the
    data set is not there, the images are the bundled sample's, whose accuracy is in the metadata too.

    Args:
        path: the model file.
        checkpoints: that it says it was made from, in the same order, to compare with PyTorch.

    Raises:
        GraphError: no model file, not one of ours, changed since, or not made from these checkpoints.
        CheckpointError, RecipeError: a checkpoint that cannot be used.
        DataError: a data set that is present but damaged.
        ProviderError: a provider cannot run the file.
    """
    model = read(path)
    graph.check(model)
    values = metadata.read(model)
    images, source = parity.test_images()
    pixels, content = images.pixels.numpy(), path.read_bytes()
    found = CPU.logits(content, pixels)
    precision = values["precision"]
    compared: list[tuple[Parity, list[Finding]]] = []
    if checkpoints:
        ensemble = _ensemble(values, checkpoints)
        in_pytorch = logits(ensemble, images.pixels, BATCH).numpy()
        report = parity.compare(in_pytorch, found, images, source, PYTORCH, CPU.name)
        compared.append((report, report.findings(LIMITS[precision])))
        if precision == "fp16":  # in which the CPU provider does not compute
            in_half = logits(rounded(ensemble), images.pixels, BATCH).numpy()
            report = parity.compare(in_pytorch, in_half, images, source, PYTORCH, ROUNDED)
            compared.append((report, report.findings(LIMITS[precision])))
    for other in others(content):
        report = parity.compare(
            found, other.logits(content, pixels), images, source, CPU.name, other.name
        )
        compared.append((report, report.findings(ELSEWHERE[precision])))
    return Verification(
        values,
        _accuracy(values, parity.accuracy(found, images), source),
        compared,
        reliability.measure(found, images.labels.numpy()).error,
    )


def read(path: Path) -> ModelProto:
    """Read a model file, without other files that it may refer to.

    Raises:
        GraphError: missing or not ONNX.
    """
    if not path.is_file():
        raise GraphError(f"no model file at {path}")
    try:
        return onnx.load(path, load_external_data=False)
    except DecodeError as error:
        raise GraphError(f"{path}: not an ONNX file: {error}") from error


def _accuracy(values: dict[str, str], measured: float, source: str) -> Finding:
    what, recorded = f"accuracy on the test images of {source}", json.loads(values["parity"])
    if recorded["source"] == source:
        right = recorded["accuracy"]
    elif source == "sample" and "sample_accuracy" in values:
        right = float(values["sample_accuracy"])
    else:
        raise GraphError(
            f"the file's accuracy is of the test images of {recorded['source']}, and here are only "
            f"those of {source}; set {ROOT_VARIABLE} to a folder with cifar-10-batches-py"
        )
    margin = ELSEWHERE[values["precision"]].accuracy_loss
    limit = f"{percent(right)} as in the metadata, +- {percent(margin)}"
    return Finding(what, percent(measured), limit, round(abs(measured - right), 9) <= margin)


def _ensemble(values: dict[str, str], checkpoints: Sequence[Path]) -> Ensemble:
    facts = json.loads(values.get("members", "[]")) or [values]
    digests = [fact["checkpoint_sha256"] for fact in facts]
    members = [member.load(path, fact["views"]) for path, fact in zip(checkpoints, facts, strict=False)]
    given = [part.digest for part in members]
    if given != digests or len(checkpoints) != len(digests):
        raise GraphError(
            f"made from the checkpoints {', '.join(d[:12] for d in digests)}, not from these: "
            f"{', '.join(d[:12] for d in given)}"
        )
    return Ensemble([part.classifier() for part in members], float(values.get("temperature", "1")))
