"""Servers as their own documentation would have them, each with the same model file.

A peer is a program of few lines that answers ``POST`` with an image in a form by the most probable class and
its probability. The environment says what it serves: ``PEER_MODEL`` is the file, ``PEER_ENGINE`` either
``onnxruntime``, a plain session with its defaults, or a provider with which the service's engine runs it, and
``PEER_PORT`` where to listen.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import IO

import loky
import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from PIL import Image

from serving.engine import Engine

Images = NDArray[np.uint8]
Logits = NDArray[np.float32]

PLAIN = "onnxruntime"
LABELS = "airplane automobile bird cat deer dog frog horse ship truck".split()


def port() -> int:
    """Where to listen."""
    return int(os.environ["PEER_PORT"])


def engine() -> Callable[[Images], Logits]:
    """What turns uint8 [N, 32, 32, 3] into logits float32 [N, 10]."""
    file, name = Path(os.environ["PEER_MODEL"]), os.environ["PEER_ENGINE"]
    if name != PLAIN:
        return Engine(file, name, loky.cpu_count()).run  # type: ignore[arg-type]
    session = ort.InferenceSession(file)

    def run(images: Images) -> Logits:
        logits: Logits = session.run(["logits"], {"images": images})[0]
        return logits

    return run


def pixels(image: IO[bytes] | Image.Image) -> Images:
    """uint8 [32, 32, 3] of an image or its file."""
    opened = image if isinstance(image, Image.Image) else Image.open(image)
    return np.asarray(opened.convert("RGB").resize((32, 32)))


def answer(logits: Logits) -> dict[str, str | float]:
    """The most probable class of logits float32 [10]."""
    exponentials = np.exp(logits - logits.max())
    best = int(logits.argmax())
    return {"label": LABELS[best], "probability": float(exponentials[best] / exponentials.sum())}
