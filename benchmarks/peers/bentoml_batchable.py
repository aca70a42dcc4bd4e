"""BentoML with adaptive batching, behind a service that takes one image per request."""

from typing import Any

import bentoml
import numpy as np
from PIL.Image import Image

from benchmarks.peers import model


@bentoml.service
class Model:
    """Runs batches."""

    def __init__(self) -> None:
        self.run = model.load()

    @bentoml.api(batchable=True, max_batch_size=32, max_latency_ms=1000)
    def logits(self, images: np.ndarray) -> np.ndarray:
        """Logits, float32 [N, classes], of ``images``, uint8 [N, 32, 32, 3]."""
        return self.run(images)


@bentoml.service
class Classifier:
    """Classifies an image."""

    model = bentoml.depends(Model)

    @bentoml.api
    async def classify(self, image: Image) -> dict[str, Any]:
        """Classify one image."""
        logits = await self.model.to_async.logits(model.pixels(image)[np.newaxis])
        return model.answer(logits[0])
