"""The calibration of probabilities, fitted on training images that no member has seen.

Only how far an image's logits are from its largest one matters for its probabilities. Each of these
distances is divided by a temperature (Guo et al., 2017, arXiv:1706.04599) and raised to an exponent. A
temperature alone is not enough for networks that learned with smoothed labels: it leaves them too sure
wherever they are not quite sure. The order of an image's classes stays (as in all the functions of
Rahimi et al., 2020, arXiv:2003.06820). The test images play no part in the fit. They
prompted the exponent, as only 81 % of the bundled file's answers around 0.90 were right, and were looked
at again while it was made; cross-validation on held-out images decided for it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from export import reliability
from export.ensemble import Ensemble, calibrate
from export.member import Member
from export.provider import BATCH
from training import data
from training.data import Images
from training.errors import ExplainedError
from training.evaluate import logits

Float = TypeVar("Float", np.float32, np.float64)

TEMPERATURES = 0.05, 20.0
DIGITS = 4  # of a temperature; further ones depend on the processor's rounding
EXPONENTS = np.arange(5, 31) / 10  # finer steps would be within the noise
# Standard deviation of the exponent's logarithm, around 0, before the images are seen. Without it, the
# few errors among some hundred images may ask for any exponent. In cross-validation on the held-out
# images of `accurate`, the likelihood was then lower than by a temperature alone for 100 and 200 images;
# with it, it was higher for 100, 200, 500 and 900.
SPREAD = 0.35


class CalibrationError(ExplainedError):
    """Checkpoints whose held-out images cannot give a calibration; the message says why."""


@dataclass(frozen=True)
class Calibration:
    """A temperature and an exponent, and where they come from.

    Attributes:
        temperature, exponent: both 1 if they were not fitted.
        origin: whose held-out images they were fitted on, or why they were not.
        val_images: the number of these images; 0 if there was no fit.
        val_ece_before, val_ece_after: the expected calibration error on these images, a fraction,
            without and with the calibration; None if there was no fit.
    """

    temperature: float
    exponent: float
    origin: str
    val_images: int = 0
    val_ece_before: float | None = None
    val_ece_after: float | None = None


def of(members: Sequence[Member], trials: Sequence[Member]) -> Calibration:
    """Find the calibration of an ensemble of ``members``.

    It is fitted on the images that all ``trials`` held out; trials are runs of the members' recipes on
    fewer images. Without trials it is fitted on the images that all members held out; if there are
    none, or they are not on this machine, it changes nothing and ``origin`` says why.

    Raises:
        CalibrationError: the trials are not one for each member in the same order, are of other
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
    except CalibrationError as error:
        return Calibration(1.0, 1.0, f"not calibrated: {error}")
    return _fit(members, images)


def uncalibrated(
    logits: NDArray[np.float32], temperature: float, exponent: float
) -> NDArray[np.float32]:
    """Logits, float32 [N, 10], to which ``calibrate`` gives the probabilities of ``logits``.

    The largest is 0.
    """
    return -temperature * _distances(logits) ** (1 / exponent)


def fit(logits: NDArray[np.float32], labels: NDArray[np.int64]) -> tuple[float, float]:
    """The likeliest temperature and exponent, for ``logits``, [N, 10], of ``labels``, [N] in 0..9."""
    distances = _distances(logits.astype(np.float64))
    fits = []
    for exponent in EXPONENTS.tolist():
        likelihood, temperature = _fit_temperature(distances, labels, exponent)
        prior = -((np.log(exponent) / SPREAD) ** 2) / 2
        fits.append((len(labels) * likelihood + prior, temperature, exponent))
    _, temperature, exponent = max(fits)
    return temperature, exponent


def _fit_temperature(
    distances: NDArray[np.float64], labels: NDArray[np.int64], exponent: float
) -> tuple[float, float]:
    """The likelihood (the mean of its logarithm) of ``labels`` at the best temperature, and that.

    For one exponent, the likelihood as a function of the scale has one maximum, where the mean logit
    that the probabilities expect equals the mean logit of the labels. Bisection finds it between the
    ends of ``TEMPERATURES``.
    """
    wide = -(distances**exponent)
    of_labels = wide[np.arange(len(labels)), labels].mean()
    low, high = np.log(TEMPERATURES)
    for _ in range(24):  # to six digits
        middle = (low + high) / 2
        scale = np.exp(middle * exponent)
        weights = np.exp(wide / scale)
        expected = ((weights * wide).sum(1) / weights.sum(1)).mean()
        low, high = (middle, high) if expected > of_labels else (low, middle)
    likelihood = of_labels / scale - np.log(weights.sum(1)).mean()
    return likelihood, float(f"{np.exp(middle):.{DIGITS}g}")


def _distances(logits: NDArray[Float]) -> NDArray[Float]:
    """How far each image's logits are from its largest one."""
    distances: NDArray[Float] = logits.max(1, keepdims=True) - logits
    return distances


def _fit(members: Sequence[Member], images: Images) -> Calibration:
    ensemble = Ensemble([member.classifier() for member in members])
    values, labels = logits(ensemble, images.pixels, BATCH), images.labels.numpy()
    if not values.isfinite().all():
        raise CalibrationError(
            f"the logits of {', '.join(map(str, members))} are no finite numbers: a network that "
            "diverged"
        )
    temperature, exponent = fit(values.numpy(), labels)
    after = calibrate(values, temperature, exponent)
    return Calibration(
        temperature,
        exponent,
        origin="held-out training images of " + ", ".join(map(str, members)),
        val_images=len(images),
        val_ece_before=reliability.measure(values.numpy(), labels).error,
        val_ece_after=reliability.measure(after.numpy(), labels).error,
    )


def _held_out(members: Sequence[Member]) -> Images:
    """The training images that no member saw: the smallest split, which all others contain."""
    share = min(member.recipe.data.validation for member in members)
    dataset = data.load_present()
    images = data.split(dataset.train, share)[1]
    if not len(images):
        raise CalibrationError("all training images were trained on, none was held out")
    for member in members:
        source = member.checkpoint.run["data"]
        if source != dataset.source:
            raise CalibrationError(
                f"the images that {member} held out are from {source}, but the data set here is "
                f"{dataset.source}"
            )
    return images


def _check_alike(members: Sequence[Member], trials: Sequence[Member]) -> None:
    if len(members) != len(trials):
        raise CalibrationError(
            f"{len(trials)} checkpoints to take a calibration from for {len(members)} checkpoints; "
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
            raise CalibrationError(
                f"{trial} is of another recipe than {member}: {', '.join(differing)} differ; "
                f"right would be the same but for data.validation"
            )
        if not trial.checkpoint.finished:
            raise CalibrationError(
                f"{trial} is not finished: epoch {trial.checkpoint.epoch} of {trial.recipe.epochs}"
            )
