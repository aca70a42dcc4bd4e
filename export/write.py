"""Write checkpoints as model files, but only if these compute what they should."""

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto

from export import calibration, graph, member, metadata, quantize, reliability
from export.calibration import Calibration, uncalibrated
from export.comparison import TestImages
from export.ensemble import Ensemble, half
from export.graph import GraphError
from export.member import Member
from export.parity import ELSEWHERE, LIMITS, PYTORCH, Parity, ParityError, Precision
from export.provider import CPU
from export.reliability import Bins
from serving.openvino import FULL_PRECISION
from training import data
from training.files import make_place, replacing
from training.recipe import Views

PRECISIONS = tuple(LIMITS)


@dataclass(frozen=True)
class Written:
    """A model file that was written, and what was measured with it.

    Attributes:
        path, precision: the file and its precision.
        full_precision: whether it asks providers not to compute in a shorter type.
        parity: the comparison with PyTorch (fp32) or the fp32 graph on the CPU, then those of the other
            providers with the CPU.
        calibration: the calibration that is folded into the graph.
        reliability: on the test images, without and with the calibration.
    """

    path: Path
    precision: Precision
    full_precision: bool
    parity: list[Parity]
    calibration: Calibration
    reliability: tuple[Bins, Bins]


def write(
    checkpoints: Sequence[Path],
    files: Mapping[Precision, Path],
    views: Views | None,
    calibration_from: Sequence[Path],
) -> list[Written]:
    """Write the model files of a checkpoint, or of an ensemble of several.

    Args:
        checkpoints: the checkpoints of finished runs.
        files: the file to write for each precision that is wanted.
        views: the views of every member, if not those of its recipe.
        calibration_from: trials of the same recipes, on whose held-out images the calibration
            is fitted; without any, on the runs' own, if they held images out.

    Raises:
        CheckpointError, RecipeError: a checkpoint cannot be used, is given twice, or its run is not
            finished.
        CalibrationError: the calibration cannot be fitted.
        DataError: a data set that is present, or that ``CIFAR10_ROOT`` names, cannot be read.
        GraphError: a file's name does not end in ``.onnx`` or is that of a checkpoint, or the graph does
            not keep the contract.
        ParityError, ProviderError: a file does not compute what it should, or a provider cannot run it.
            None of the files is written then.
        OSError: a file cannot be written.
    """
    for path in files.values():
        if path.suffix != ".onnx":  # perhaps the last of several checkpoints, and OUT.onnx was forgotten
            raise GraphError(f"{path}: the model file comes last, and its name must end in .onnx")
    members = [member.load(path, views) for path in checkpoints]
    for part in members:
        part.checkpoint.check_finished()
    trials = [member.load(path, views) for path in calibration_from]
    member.check_different(members)
    member.check_different(trials)
    for path in files.values():
        if path.exists() and any(map(path.samefile, [*checkpoints, *calibration_from])):
            raise GraphError(f"{path} is one of the checkpoints; right would be a file of another name")
        make_place(path)
    fitted = calibration.of(members, trials)
    reference = _Reference.build(members, fitted)
    made = []
    for precision, path in files.items():
        try:
            made.append(reference.in_precision(precision, path))
        except ParityError as error:
            others = " or ".join(f"--precision {each}" for each in files if each != precision)
            advice = f"; {others} writes another precision alone" if others else ""
            raise ParityError(f"{path} in {precision}: {error}{advice}") from error

    with ExitStack() as stack:  # all files are on the disk before the first takes its place
        for model, written in made:
            file = stack.enter_context(replacing(written.path))
            file.write(model.SerializeToString())
            file.flush()
            os.fsync(file.fileno())
    return [written for _, written in made]


@dataclass(frozen=True)
class _Reference:
    """The fp32 graph, with which the graphs of the other precisions are compared.

    Attributes:
        members, calibration, ensemble: what it was made from.
        test: the images for all comparisons.
        model, logits: the graph, and its logits for these images on the CPU, float32 [N, 10].
        parity: the comparison with PyTorch.
    """

    members: Sequence[Member]
    calibration: Calibration
    ensemble: Ensemble
    test: TestImages
    model: ModelProto
    logits: NDArray[np.float32]
    parity: Parity

    @classmethod
    def build(cls, members: Sequence[Member], calibration: Calibration) -> "_Reference":
        """Build the graph of the members' ensemble, and check that it computes what PyTorch does."""
        ensemble = Ensemble(
            [part.classifier() for part in members], calibration.temperature, calibration.exponent
        )
        test = TestImages.load()
        model = graph.build(ensemble)
        logits = CPU.logits(model.SerializeToString(), test.pixels)
        parity = test.compare(test.in_pytorch(ensemble), logits, PYTORCH, CPU.name)
        parity.check(LIMITS["fp32"])
        return cls(members, calibration, ensemble, test, model, logits, parity)

    def in_precision(self, precision: Precision, path: Path) -> tuple[ModelProto, Written]:
        """Make the model for a file, check that it computes what it should, and set its metadata."""
        test, model, logits, here = self.test, self.model, self.logits, self.parity
        if precision == "fp16":
            test.compare_rounded(logits, self.ensemble, "fp32").check(LIMITS[precision])
        if precision != "fp32":
            model = graph.build(half(self.ensemble)) if precision == "fp16" else quantize.int8(model)
            logits = CPU.logits(model.SerializeToString(), test.pixels)
            here = test.compare(self.logits, logits, "fp32", CPU.name)
            here.check(LIMITS[precision])
        others, full_precision = self._on_others(model, logits, precision)
        fitted = self.calibration  # which is in these logits already
        without = uncalibrated(logits, fitted.temperature, fitted.exponent)
        bins = reliability.measure(without, test.labels), reliability.measure(logits, test.labels)
        on_sample = here.accuracy
        if test.source != "sample":
            sample = TestImages(data.load_sample().test, "sample")
            on_sample = sample.accuracy(CPU.logits(model.SerializeToString(), sample.pixels))
        metadata.write(
            model,
            self.members,
            precision,
            full_precision,
            fitted,
            self.parity,
            here,
            others,
            on_sample,
            bins,
        )
        parity = [here, *others]
        return model, Written(path, precision, full_precision, parity, fitted, bins)

    def _on_others(
        self, model: ModelProto, logits: NDArray[np.float32], precision: Precision
    ) -> tuple[list[Parity], bool]:
        """Check this machine's other providers against the CPU's ``logits``.

        If one is beyond the limits, all have to keep them in full precision, for which the file must
        then ask (True): in bfloat16, a network that has learned little may exceed them, as it has many
        near ties.
        """
        limits = ELSEWHERE[precision]
        for full_precision in (False, True):
            onnx.helper.set_model_props(model, {FULL_PRECISION: json.dumps(full_precision)})
            others = list(self.test.compare_others(logits, model.SerializeToString()))
            if all(finding.passed for other in others for finding in other.findings(limits)):
                break
        for other in others:
            other.check(limits)
        return others, full_precision
