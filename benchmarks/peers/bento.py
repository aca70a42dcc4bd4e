"""BentoML with a PIL argument, and with its own batching (``batchable=True``)."""

# BentoML ships without types: its decorators are Any.
# mypy: disable-error-code="untyped-decorator"

import bentoml
import numpy as np
from PIL.Image import Image

from benchmarks import peers


@bentoml.service
class Single:
    """A request at a time."""

    def __init__(self) -> None:
        self.run = peers.engine()

    @bentoml.api
    def classify(self, image: Image) -> dict[str, str | float]:
        """Classify an image."""
        return peers.answer(self.run(peers.pixels(image)[np.newaxis])[0])


@bentoml.service
class Batched:
    """Requests in batches; each request brings a list."""

    def __init__(self) -> None:
        self.run = peers.engine()

    @bentoml.api(batchable=True)
    def classify(self, images: list[Image]) -> list[dict[str, str | float]]:
        """Classify images."""
        logits = self.run(np.stack([peers.pixels(image) for image in images]))
        return [peers.answer(row) for row in logits]
