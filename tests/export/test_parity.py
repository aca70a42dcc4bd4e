import math

import pytest

from export.parity import ELSEWHERE, LIMITS, Limits, Parity, ParityError


def report(difference: float, agreement: float, loss: float) -> Parity:
    return Parity("fp32", 1000, "sample", difference, agreement, 0.9, loss, "CPU", "1")


@pytest.mark.parametrize(
    ("limits", "difference", "agreement", "loss", "failing"),
    [
        (LIMITS["fp32"], 1e-6, 1.0, 0.0, ""),
        (LIMITS["fp32"], 1e-4, 1.0, 0.0, ""),
        (LIMITS["fp32"], 2e-4, 1.0, 0.0, "scaled difference of logits 2.00e-04"),
        (LIMITS["fp32"], 1e-6, 0.999, 0.0, "top-1 agreement 99.90 %"),
        (LIMITS["fp32"], math.nan, 1.0, 0.0, "scaled difference of logits nan"),
        (LIMITS["fp16"], 1e-2, 0.995, 0.001, ""),
        (LIMITS["fp16"], math.nan, 1.0, 0.0, "scaled difference of logits nan"),
        (LIMITS["fp16"], math.inf, 1.0, 0.0, "scaled difference of logits inf"),
        (LIMITS["fp16"], 1e-2, 0.994, 0.0, "top-1 agreement 99.40 %"),
        (LIMITS["fp16"], 1e-2, 1.0, 0.002, "accuracy lost 0.20 %"),
        (LIMITS["int8"], 0.1, 0.99, 0.003, ""),
        (LIMITS["int8"], 0.1, 0.989, 0.0, "top-1 agreement 98.90 %"),
        (LIMITS["int8"], 0.1, 0.99, 0.004, "accuracy lost 0.40 %"),
        (ELSEWHERE["fp32"], 1e-2, 0.995, 0.001, ""),
        (ELSEWHERE["fp32"], 1e-2, 0.994, 0.0, "top-1 agreement 99.40 %"),
        (ELSEWHERE["fp16"], 1e-2, 0.994, 0.0, "top-1 agreement 99.40 %"),
        (ELSEWHERE["int8"], 0.1, 0.99, 0.003, ""),
    ],
)
def test_limits(limits: Limits, difference: float, agreement: float, loss: float, failing: str) -> None:
    if failing:
        with pytest.raises(ParityError, match=f"{failing} \\(limit: "):
            report(difference, agreement, loss).check(limits)
    else:
        report(difference, agreement, loss).check(limits)
