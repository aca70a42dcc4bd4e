"""Verification that a model file is one of ours and computes on this machine what it says it does."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from numpy.typing import NDArray
from onnx import ModelProto

from export import graph, member, metadata, reliability
from export.calibration import uncalibrated
from export.comparison import TestImages
from export.ensemble import Ensemble
from export.graph import GraphError
from export.metadata import Description
from export.parity import ELSEWHERE, LIMITS, PYTORCH, Finding, Parity, ParityError
from export.provider import CPU
from training.data import Source
from training.tables import percent

# Calibration errors vary more than the accuracy: an image near a bin's edge can fall into the next one.
ECE_MARGIN = 0.005


@dataclass(frozen=True)
class Verification:
    """What a model file says about itself, and what was measured here.

    Attributes:
        metadata: what the file says about itself.
        measured: accuracy and expected calibration errors on the test images here, beside those in the
            metadata.
        parity: comparisons and their findings: of the CPU with PyTorch, if checkpoints were given, and
            of each other provider with the CPU.
    """

    metadata: Description
    measured: list[Finding]
    parity: list[tuple[Parity, list[Finding]]]

    def check(self) -> None:
        """Raise ParityError if a measurement is outside its limit."""
        findings = [("", finding) for finding in self.measured] + [
            (f" on {report.provider}", finding) for report, part in self.parity for finding in part
        ]
        failed = [f"{f.what}{on} {f.measured} (limit: {f.limit})" for on, f in findings if not f.passed]
        if failed:
            raise ParityError(f"the model file does not compute what it should: {', '.join(failed)}")


def verify(path: Path, checkpoints: Sequence[Path]) -> Verification:
    """Check a model file's graph and metadata, and run it on the test images by every provider here.

    On the CPU its accuracy and calibration errors are compared with those in its metadata, perhaps of
    another processor: the accuracy by the limit for other providers, the errors by ``ECE_MARGIN`` and
    only on the same images. Other providers are compared with the CPU. The images are those that the
    metadata name or, if that data set is not here, the bundled sample's, whose accuracy they have too.

    Args:
        path: the model file.
        checkpoints: those it says it was made from, in the same order, to compare it with PyTorch.

    Raises:
        GraphError: the file is missing, not one of ours, was changed after it was written, or was not
            made from these checkpoints.
        CheckpointError, RecipeError: a checkpoint cannot be used.
        DataError: a data set that is present, or that ``CIFAR10_ROOT`` names, cannot be read.
        ParityError: the logits are not finite; for figures outside a limit see ``Verification.check``.
        ProviderError: a provider cannot run the file.
        OSError: the file cannot be read.
    """
    model = read(path)
    graph.check(model)
    values = metadata.read(model)
    test, content = TestImages.load(values.parity.source), path.read_bytes()
    found = CPU.logits(content, test.pixels)
    if not np.isfinite(found).all():
        raise ParityError("the model file gives logits that are no finite numbers")
    compared: list[tuple[Parity, list[Finding]]] = []
    if checkpoints:
        limits = LIMITS[values.precision]
        ensemble = _ensemble(values, checkpoints)
        in_pytorch = test.in_pytorch(ensemble)
        report = test.compare(in_pytorch, found, PYTORCH, CPU.name)
        compared.append((report, report.findings(limits)))
        if values.precision == "fp16":
            report = test.compare_rounded(in_pytorch, ensemble, PYTORCH)
            compared.append((report, report.findings(limits)))
    for report in test.compare_others(found, content):
        compared.append((report, report.findings(ELSEWHERE[values.precision])))
    without = uncalibrated(found, values.temperature, values.exponent)
    errors = values.calibration
    measured = [
        _accuracy(values, test.accuracy(found), test.source),
        _calibration_error(values, "expected calibration error", found, errors.test_ece_after, test),
        _calibration_error(
            values, "the same without calibration", without, errors.test_ece_before, test
        ),
    ]
    return Verification(values, measured, compared)


def read(path: Path) -> ModelProto:
    """Read a model file, but no other files that it may refer to.

    Raises:
        GraphError: the file is missing or not ONNX.
        OSError: it cannot be read.
    """
    if not path.is_file():
        raise GraphError(f"no model file at {path}")
    try:
        return onnx.load(path, format="protobuf", load_external_data=False)
    except DecodeError as error:
        raise GraphError(f"{path}: not an ONNX file: {error}") from error


def _accuracy(values: Description, measured: float, source: Source) -> Finding:
    right = values.parity.accuracy if source == values.parity.source else values.sample_accuracy
    margin = ELSEWHERE[values.precision].accuracy_loss
    return _as_recorded(f"accuracy on the test images of {source}", measured, right, margin)


def _calibration_error(
    values: Description, what: str, logits: NDArray[np.float32], right: float, test: TestImages
) -> Finding:
    """The calibration error of logits, compared with ``right`` if that was measured on these images."""
    measured = reliability.measure(logits, test.labels).error
    if values.parity.source != test.source:
        return Finding(what, percent(measured), limit="", passed=True)
    return _as_recorded(what, measured, right, ECE_MARGIN)


def _as_recorded(what: str, measured: float, right: float, margin: float) -> Finding:
    limit = f"{percent(right)} as in the metadata, +- {percent(margin)}"
    return Finding(what, percent(measured), limit, round(abs(measured - right), 9) <= margin)


def _ensemble(values: Description, checkpoints: Sequence[Path]) -> Ensemble:
    if len(checkpoints) != len(values.members):
        raise GraphError(
            f"made from {len(values.members)} checkpoints, and {len(checkpoints)} are given; right "
            f"would be all of them, in the same order"
        )
    members = [
        member.load(path, fact.views) for path, fact in zip(checkpoints, values.members, strict=True)
    ]
    digests = [fact.checkpoint_sha256 for fact in values.members]
    given = [part.digest for part in members]
    if given != digests:
        raise GraphError(
            f"made from the checkpoints {', '.join(d[:12] for d in digests)}, not from these: "
            f"{', '.join(d[:12] for d in given)}"
        )
    return Ensemble([part.classifier() for part in members], values.temperature, values.exponent)
