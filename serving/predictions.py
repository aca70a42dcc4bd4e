"""From logits to what a person reads: labels, indices and probabilities."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt


def softmax(logits: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    """Probabilities along the last axis: float64, each in [0, 1], summing to 1."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    exponentials = np.exp(shifted)
    probabilities: npt.NDArray[np.float64] = exponentials / exponentials.sum(axis=-1, keepdims=True)
    return probabilities


def top_predictions(
    logits: npt.NDArray[np.float32], classes: Sequence[str], top_k: int
) -> list[dict[str, Any]]:
    """The `top_k` most probable classes of one image, most probable first.

    Args:
        logits: float32 [classes] of one image.
        classes: label of each index.
        top_k: how many to return, 1 to len(classes).
    """
    probabilities = softmax(logits).tolist()
    # Stable, so that equal probabilities always come in the order of their indices.
    order = sorted(range(len(probabilities)), key=probabilities.__getitem__, reverse=True)[:top_k]
    return [
        {"label": classes[index], "index": index, "probability": probabilities[index]} for index in order
    ]
