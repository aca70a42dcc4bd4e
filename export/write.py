"""Checkpoints to model files, which are written only if they compute what they should."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

from export import graph, member, metadata, parity, quantize, reliability, temperature
from export.ensemble import ROUNDED, Ensemble, half, rounded
from export.graph import GraphError
from export.parity import ELSEWHERE, LIMITS, PYTORCH, Parity
from export.provider import BATCH, CPU, others
from export.reliability import Bins
from export.temperature import Temperature
from serving.files import check_replaceable
from training import data
from training.evaluate import logits
from training.files import replacing

PRECISIONS = tuple(LIMITS)


@dataclass(frozen=True)
class Written:
    """A model file that was written, and what was measured of it.

    Attributes:
        path, precision: the file and its precision.
        parity: with PyTorch or the fp32 file on the CPU, then of other providers with the CPU.
        temperature: folded into the graph.
        reliability: on the test images, without and with the temperature.
    """

    path: Path
    precision: str
    parity: list[Parity]
    temperature: Temperature
    reliability: tuple[Bins, Bins]


def write(
    checkpoints: Sequence[Path],
    files: dict[str, Path],
    views: str | None = None,
    temperature_from: Sequence[Path] = (),
) -> list[Written]:
    """Write the model files of a checkpoint, or of an ensemble of several.

    Args:
        checkpoints: runs' checkpoints.
        files: the file to write for each precision that is wanted.
        views: of each member, in the place of its recipe's.
        temperature_from: trials of the same recipes, whose held-out images give the temperature.

    Raises:
        CheckpointError, RecipeError: a checkpoint that cannot be used, is given twice, or whose run is
            not finished.
        TemperatureError: a trial that cannot give the temperature.
        DataError: a data set that is present but damaged.
        GraphError: a file's name does not end in ``.onnx``, or the graph does not keep the contract.
        ParityError, ProviderError: a file does not compute what it should, or a provider cannot run it.
            None of the files is written then.
        OSError: a file cannot be written there.
    """
    for path in files.values():
        if path.suffix != ".onnx":  # the last of several checkpoints, say, with the file forgotten
            raise GraphError(f"{path}: the model file comes last, and its name must end in .onnx")
    members = [member.load(path, views) for path in checkpoints]
    for path, part in zip(checkpoints, members, strict=True):
        part.checkpoint.check_finished(path)
    trials = [member.load(path, views) for path in temperature_from]
    member.check_different(members)
    member.check_different(trials)
    for path in files.values():
        make_place(path)
    fitted = temperature.of(members, trials)
    ensemble = Ensemble([part.classifier() for part in members], fitted.value)
    images, source = parity.test_images()
    pixels, labels = images.pixels.numpy(), images.labels.numpy()
    sample = data.load_sample().test

    fp32 = graph.build(ensemble)
    expected = CPU.logits(fp32.SerializeToString(), pixels)
    in_pytorch = logits(ensemble, images.pixels, BATCH).numpy()
    with_pytorch = parity.compare(in_pytorch, expected, images, source, PYTORCH, CPU.name)
    with_pytorch.check(LIMITS["fp32"])

    models: list[tuple[ModelProto, Written]] = []
    for precision, path in files.items():
        model, found, here = fp32, expected, with_pytorch
        if precision == "fp16":
            # ONNX Runtime's CPU provider computes fp16 in float32, where nothing overflows.
            in_half = logits(rounded(ensemble), images.pixels, BATCH).numpy()
            on_gpu = parity.compare(expected, in_half, images, source, "fp32", ROUNDED)
            on_gpu.check(LIMITS[precision])
        if precision != "fp32":
            model = graph.build(half(ensemble)) if precision == "fp16" else quantize.int8(fp32)
            found = CPU.logits(model.SerializeToString(), pixels)
            here = parity.compare(expected, found, images, source, "fp32", CPU.name)
            here.check(LIMITS[precision])
        content = model.SerializeToString()
        elsewhere = []
        for other in others(content):
            actual = other.logits(content, pixels)
            there = parity.compare(found, actual, images, source, CPU.name, other.name)
            there.check(ELSEWHERE[precision])
            elsewhere.append(there)
        bins = _reliability(found, labels, fitted.value)
        on_sample = here.accuracy
        if source != "sample":
            on_sample = parity.accuracy(CPU.logits(content, sample.pixels.numpy()), sample)
        metadata.write(model, members, precision, fitted, with_pytorch, here, elsewhere, on_sample, bins)
        models.append((model, Written(path, precision, [here, *elsewhere], fitted, bins)))

    with ExitStack() as stack:  # all are on the disk before the first takes its place
        for model, written in models:
            file = stack.enter_context(replacing(written.path))
            file.write(model.SerializeToString())
            file.flush()
    return [written for _, written in models]


def make_place(path: Path) -> None:
    """Make the folder of a file to be written.

    Raises:
        OSError: it cannot be made or written to, or something else than a file is at ``path``.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    check_replaceable(path)


def _reliability(
    logits: NDArray[np.float32], labels: NDArray[np.int64], temperature: float
) -> tuple[Bins, Bins]:
    """Of a file's logits, without and with the temperature that they were divided by."""
    return reliability.measure(logits * temperature, labels), reliability.measure(logits, labels)
