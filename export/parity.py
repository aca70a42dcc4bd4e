"""Parity: whether a model file computes what its source does, within the limits of its precision."""

import math
import sys
from dataclasses import dataclass
from typing import Literal, NamedTuple

from training.data import Source
from training.errors import ExplainedError
from training.tables import percent

Precision = Literal["fp32", "fp16", "int8"]

PYTORCH = "PyTorch"


class ParityError(ExplainedError):
    """A model file that does not compute what it should; the message gives figures and limits."""


class Finding(NamedTuple):
    """A measurement and its limit, as text, and whether it is within the limit (``passed``)."""

    what: str
    measured: str
    limit: str
    passed: bool


@dataclass(frozen=True)
class Limits:
    """How far a model file may be from its reference; the attributes are as in ``Parity``."""

    max_scaled_difference: float
    top1_agreement: float
    accuracy_loss: float


# fp32 against PyTorch; fp16 and int8 against fp32; all on the CPU provider.
LIMITS: dict[Precision, Limits] = {
    "fp32": Limits(1e-4, 1.0, 0.0),
    "fp16": Limits(math.inf, 0.995, 0.001),
    "int8": Limits(math.inf, 0.99, 0.003),
}
# Other providers and other processors against the CPU provider: they may compute fp32 in a shorter type
# (TF32 on a GPU, say).
ELSEWHERE = LIMITS | {"fp32": LIMITS["fp16"]}


@dataclass(frozen=True)
class Parity:
    """How a model file compares with its reference.

    Attributes:
        reference: ``PyTorch``, ``fp32`` (the fp32 file on the same provider; for ``PyTorch, rounded`` on
            the CPU's) or a provider's name.
        images: the number of test images; ``source`` is as in ``DataSet``.
        max_scaled_difference: the largest absolute difference from the reference's logits, divided by
            the largest absolute value of these.
        top1_agreement: the fraction of images with the same most probable class.
        accuracy: the model file's on these images, as a fraction.
        accuracy_loss: the reference's accuracy minus ``accuracy``.
        provider: the name of the one that runs it, or ``PyTorch, rounded``; ``software`` is what that is
            a part of, with its version.
    """

    reference: str
    images: int
    source: Source
    max_scaled_difference: float
    top1_agreement: float
    accuracy: float
    accuracy_loss: float
    provider: str
    software: str

    def findings(self, limits: Limits) -> list[Finding]:
        """The figures beside their limits; NaN is outside any limit."""
        bounded = limits.max_scaled_difference < math.inf
        limit = f"at most {limits.max_scaled_difference:.0e}" if bounded else "finite"
        return [
            Finding(
                "scaled difference of logits",
                f"{self.max_scaled_difference:.2e}",
                limit,
                self.max_scaled_difference <= min(limits.max_scaled_difference, sys.float_info.max),
            ),
            Finding(
                "top-1 agreement",
                percent(self.top1_agreement),
                f"at least {percent(limits.top1_agreement)}",
                self.top1_agreement >= limits.top1_agreement,
            ),
            Finding(
                "accuracy lost",
                percent(self.accuracy_loss),
                f"at most {percent(limits.accuracy_loss)}",
                self.accuracy_loss <= limits.accuracy_loss,
            ),
        ]

    def check(self, limits: Limits) -> None:
        """Raise ParityError if a figure is outside its limit."""
        failed = [finding for finding in self.findings(limits) if not finding.passed]
        if failed:
            figures = ", ".join(f"{f.what} {f.measured} (limit: {f.limit})" for f in failed)
            raise ParityError(
                f"the model file on {self.provider} differs from {self.reference} on {self.images} test "
                f"images: {figures}"
            )
