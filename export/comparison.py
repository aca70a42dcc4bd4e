"""Compare the logits that PyTorch and this machine's providers compute for the same test images."""

import importlib.metadata
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray

from export.ensemble import ROUNDED, Ensemble, rounded
from export.parity import Parity, ParityError
from export.provider import BATCH, CPU, others
from serving.providers import OPENVINO
from training import data, evaluate
from training.data import Images, Source


@dataclass(frozen=True)
class TestImages:
    """Test images from ``source``; their logits are float32 [N, 10]."""

    images: Images
    source: Source

    @classmethod
    def load(cls, wanted: Source | None = None) -> "TestImages":
        """Load the test images of the data set on this machine, else those of the bundled sample.

        The bundled sample is also taken where the data set is another one than ``wanted``.

        Raises:
            DataError: a data set that is present, or that ``CIFAR10_ROOT`` names, cannot be read.
        """
        dataset = data.load_present()
        if wanted not in (None, dataset.source):
            dataset = data.load_sample()
        return cls(dataset.test, dataset.source)

    @property
    def pixels(self) -> NDArray[np.uint8]:
        """RGB, uint8 [N, 32, 32, 3]."""
        return self.images.pixels.numpy()

    @property
    def labels(self) -> NDArray[np.int64]:
        """Classes, int64 [N] in 0..9."""
        return self.images.labels.numpy()

    def accuracy(self, logits: NDArray[np.float32]) -> float:
        """The fraction of the images that ``logits`` classify correctly."""
        return self._right(logits) / len(self.images)

    def in_pytorch(self, ensemble: Ensemble) -> NDArray[np.float32]:
        """The logits of ``ensemble`` for the images, computed by PyTorch on the CPU."""
        return evaluate.logits(ensemble, self.images.pixels, BATCH).numpy()

    def compare(
        self, expected: NDArray[np.float32], actual: NDArray[np.float32], reference: str, provider: str
    ) -> Parity:
        """Compare the ``actual`` logits of ``provider`` with the ``expected`` ones of ``reference``.

        Raises:
            ParityError: the ``expected`` ones are not finite.
        """
        if not np.isfinite(expected).all():
            raise ParityError(
                f"the logits of {reference} are no finite numbers: of a network that diverged"
            )
        largest = max(np.abs(expected).max(), np.finfo(np.float32).tiny)  # they may all be 0
        return Parity(
            reference=reference,
            images=len(self.images),
            source=self.source,
            max_scaled_difference=float(np.abs(actual - expected).max()) / float(largest),
            top1_agreement=float((actual.argmax(1) == expected.argmax(1)).mean()),
            accuracy=self.accuracy(actual),
            # From counts: rounding could put the difference of two fractions beyond a limit it is at.
            accuracy_loss=(self._right(expected) - self._right(actual)) / len(self.images),
            provider=provider,
            software=_software(provider),
        )

    def compare_rounded(
        self, expected: NDArray[np.float32], ensemble: Ensemble, reference: str
    ) -> Parity:
        """Compare ``expected`` with ``ensemble`` rounded to fp16 at each layer, as a GPU computes it.

        ONNX Runtime's CPU provider does not do that: it computes fp16 in float32 without overflows.
        """
        return self.compare(expected, self.in_pytorch(rounded(ensemble)), reference, ROUNDED)

    def compare_others(self, expected: NDArray[np.float32], model: bytes) -> Iterator[Parity]:
        """Compare the CPU's logits of a model file, ``expected``, with each other provider's here.

        Raises:
            ProviderError: a provider that is present cannot run ``model``.
        """
        for other in others(model):
            yield self.compare(expected, other.logits(model, self.pixels), CPU.name, other.name)

    def _right(self, logits: NDArray[np.float32]) -> int:
        return int((logits.argmax(1) == self.labels).sum())


def _software(provider: str) -> str:
    """What computes on a provider, with its version."""
    if provider == OPENVINO:
        return f"openvino {importlib.metadata.version('openvino')}"
    if provider == ROUNDED:
        return f"torch {torch.__version__}"
    return f"onnxruntime {onnxruntime.__version__}"
