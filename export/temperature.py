"""The temperature that calibrates probabilities, fitted on training images that no member has seen.

Logits are divided by it (Guo et al., 2017, arXiv:1706.04599). The test images play no part in the fit.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from export import reliability
from export.ensemble import Ensemble
from export.member import Member
from export.provider import BATCH
from training import data
from training.data import Images
from training.errors import ExplainedError
from training.evaluate import logits

RANGE = 0.05, 20.0
DIGITS = 4  # further digits depend on the processor's rounding


class TemperatureError(ExplainedError):
    """Checkpoints whose held-out images cannot give a temperature; the message says why."""


@dataclass(frozen=True)
class Temperature:
    """A temperature and where it comes from.

    Attributes:
        value: the temperature; 1 if none was fitted.
        origin: whose held-out images it was fitted on, or why none was fitted.
        val_images: the number of these images; 0 if none was fitted.
        val_ece_before, val_ece_after: the expected calibration error on these images, a fraction,
            without and with the temperature; None if none was fitted.
    """

    value: float
    origin: str
    val_images: int = 0
    val_ece_before: float | None = None
    val_ece_after: float | None = None


def of(members: Sequence[Member], trials: Sequence[Member]) -> Temperature:
    """Find the temperature for an ensemble of ``members``.

    It is fitted on the images that all ``trials`` held out; trials are runs of the members' recipes on
    fewer images. Without trials it is fitted on the images that all members held out; if there are
    none, or they are not on this machine, it is 1 and ``origin`` says why.

    Raises:
        TemperatureError: the trials are not one for each member in the same order, are of other
            recipes or unfinished, held nothing out, or their images are not on this machine; or the
            logits are not finite.
        CheckpointError: the weights do not fit the recipe's network.
        DataError: a data set that is present, or that ``CIFAR10_ROOT`` names, cannot be read.
    """
    if trials:
        _check_alike(members, trials)
        return _fit(trials, _held_out(trials))
    try:
        images = _held_out(members)
    except TemperatureError as error:
        return Temperature(1.0, f"not calibrated: {error}")
    return _fit(members, images)


def fit(logits: NDArray[np.float32], labels: NDArray[np.int64]) -> float:
    """The temperature T at which ``logits``, [N, 10], make ``labels``, [N] in 0..9, most likely.

    As a function of 1/T the likelihood has one maximum, where the mean logit that the probabilities
    expect equals the mean logit of the labels. Bisection finds it between the ends of ``RANGE``.
    """
    wide = logits.astype(np.float64)
    wide -= wide.max(1, keepdims=True)
    of_labels = wide[np.arange(len(labels)), labels].mean()
    low, high = np.log(RANGE)
    for _ in range(60):
        middle = (low + high) / 2
        weights = np.exp(wide / np.exp(middle))
        expected = ((weights * wide).sum(1) / weights.sum(1)).mean()
        low, high = (middle, high) if expected > of_labels else (low, middle)
    return float(f"{np.exp(middle):.{DIGITS}g}")


def _fit(members: Sequence[Member], images: Images) -> Temperature:
    ensemble = Ensemble([member.classifier() for member in members])
    values, labels = logits(ensemble, images.pixels, BATCH).numpy(), images.labels.numpy()
    if not np.isfinite(values).all():
        raise TemperatureError(
            f"the logits of {', '.join(map(str, members))} are no finite numbers: a network that "
            "diverged"
        )
    temperature = fit(values, labels)
    return Temperature(
        value=temperature,
        origin="held-out training images of " + ", ".join(map(str, members)),
        val_images=len(images),
        val_ece_before=reliability.measure(values, labels).error,
        val_ece_after=reliability.measure(values / temperature, labels).error,
    )


def _held_out(members: Sequence[Member]) -> Images:
    """The training images that no member saw: the smallest split, which all others contain."""
    share = min(member.recipe.data.validation for member in members)
    dataset = data.load_present()
    images = data.split(dataset.train, share)[1]
    if not len(images):
        raise TemperatureError("all training images were trained on, none was held out")
    for member in members:
        source = member.checkpoint.run["data"]
        if source != dataset.source:
            raise TemperatureError(
                f"the images that {member} held out are from {source}, but the data set here is "
                f"{dataset.source}"
            )
    return images


def _check_alike(members: Sequence[Member], trials: Sequence[Member]) -> None:
    if len(members) != len(trials):
        raise TemperatureError(
            f"{len(trials)} checkpoints to take a temperature from for {len(members)} checkpoints; "
            f"right would be one for each, in the same order"
        )
    for member, trial in zip(members, trials, strict=True):
        mine, its = (part.recipe.model_dump(exclude={"title", "report"}) for part in (member, trial))
        for part, described in ((member, mine), (trial, its)):
            described["data"].pop("validation")
            # The trial's teacher must have held out these images too, so it is another one.
            (described["distillation"] or {}).pop("teacher", None)
            run = part.checkpoint.run
            described |= {"--limit": run["limit"], "data set": run["data"]}
        differing = [key for key in mine if mine[key] != its[key]]
        if differing:
            raise TemperatureError(
                f"{trial} is of another recipe than {member}: {', '.join(differing)} differ; "
                f"right would be the same but for data.validation"
            )
        if not trial.checkpoint.finished:
            raise TemperatureError(
                f"{trial} is not finished: epoch {trial.checkpoint.epoch} of {trial.recipe.epochs}"
            )
