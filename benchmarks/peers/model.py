"""What peers share: the model, in plain ONNX Runtime or the service's engine, pixels, and answers."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

MODEL = "PEER_MODEL"  # the model file
ENGINE = "PEER_ENGINE"  # "plain": ONNX Runtime's CPU provider with its defaults; "service": our engine
TOP = 5

Run = Callable[[NDArray[np.uint8]], NDArray[np.float32]]


def load() -> Run:
    """Load the model and engine that the environment names.

    Returns:
        A function of images, uint8 [N, 32, 32, 3], that gives logits, float32 [N, classes].
    """
    path = Path(os.environ[MODEL])
    if os.environ[ENGINE] == "service":
        import loky

        from serving.engine import RUNS, Engine

        return Engine(path, "auto", loky.cpu_count(), RUNS).run
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(images: NDArray[np.uint8]) -> NDArray[np.float32]:
        logits: NDArray[np.float32] = session.run(["logits"], {"images": images})[0]
        return logits

    return run


def pixels(image: Image.Image) -> NDArray[np.uint8]:
    """The pixels, uint8 [32, 32, 3], of an image of any size."""
    return np.asarray(image.convert("RGB").resize((32, 32)))


def answer(logits: NDArray[np.float32]) -> dict[str, Any]:
    """The most probable classes of one image."""
    exponentials = np.exp(logits - logits.max())
    probabilities = exponentials / exponentials.sum()
    best = probabilities.argsort()[::-1][:TOP]
    return {"predictions": [{"index": int(i), "probability": float(probabilities[i])} for i in best]}
