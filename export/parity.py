"""Parity: the model file computes what PyTorch computed from the checkpoint."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from export.graph import INPUT, OUTPUT
from training import data
from training.data import Images
from training.evaluate import Classifier, logits

MAX_SCALED_DIFFERENCE = 1e-4
BATCH = 250


class ParityError(RuntimeError):
    """The model file and PyTorch disagree; the message gives the figures and the limits."""


@dataclass(frozen=True)
class Parity:
    """How a model file compares with PyTorch.

    Attributes:
        images: how many test images; ``source`` is ``cifar10`` or ``sample``.
        max_scaled_difference: largest absolute difference of two logits over the largest logit.
        top1_agreement: fraction of images with the same most probable class.
        accuracy: of the model file on these images, as a fraction.
        provider: ONNX Runtime's execution provider; ``onnxruntime`` is its version.
    """

    images: int
    source: str
    max_scaled_difference: float
    top1_agreement: float
    accuracy: float
    provider: str
    onnxruntime: str

    def to_json(self) -> str:
        """The figures as a JSON object."""
        return json.dumps(asdict(self))

    def check(self) -> None:
        """Raise ParityError where a figure is outside its limit."""
        # Written so that a NaN fails as well.
        if not (self.max_scaled_difference <= MAX_SCALED_DIFFERENCE and self.top1_agreement == 1):
            raise ParityError(
                f"the model file differs from PyTorch: scaled difference of logits "
                f"{self.max_scaled_difference:.2e} (limit {MAX_SCALED_DIFFERENCE:.0e}), top-1 "
                f"agreement {100 * self.top1_agreement:.2f} % (limit 100 %) on {self.images} images"
            )


def test_images() -> tuple[Images, str]:
    """The test images and their source: the data set where it is present, else the sample."""
    dataset = data.load() if data.present() else data.load_sample()
    return dataset.test, dataset.source


def compare(model_file: Path, classifier: Classifier, images: Images, source: str) -> Parity:
    """Run both on ``images`` on the CPU in float32 and measure how far they are apart."""
    expected = logits(classifier, images.pixels, BATCH).numpy()
    actual = run(model_file, images.pixels.numpy())
    top1 = actual.argmax(1)
    return Parity(
        images=len(images),
        source=source,
        max_scaled_difference=float(np.abs(actual - expected).max() / np.abs(expected).max()),
        top1_agreement=float((top1 == expected.argmax(1)).mean()),
        accuracy=float((top1 == images.labels.numpy()).mean()),
        provider="CPUExecutionProvider",
        onnxruntime=onnxruntime.__version__,
    )


def run(model_file: Path, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Logits, float32 [N, 10], of ``pixels``, uint8 [N, 32, 32, 3], by ONNX Runtime on the CPU."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors; without a GPU its search for one is a warning
    session = onnxruntime.InferenceSession(model_file, options, providers=["CPUExecutionProvider"])
    batches = (pixels[start : start + BATCH] for start in range(0, len(pixels), BATCH))
    return np.concatenate([session.run([OUTPUT], {INPUT: batch})[0] for batch in batches])
