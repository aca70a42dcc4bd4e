"""Ray Serve with FastAPI as its ingress and ``serve.batch``."""

# mypy: disable-error-code="untyped-decorator"

import numpy as np
import ray
from fastapi import FastAPI, UploadFile
from ray import serve

from benchmarks import peers

MAX_BATCH_SIZE = 64
BATCH_TIMEOUT = 0.01  # seconds

app = FastAPI()


@serve.deployment(max_ongoing_requests=256)
@serve.ingress(app)
class Classifier:
    """Classifies an image."""

    def __init__(self) -> None:
        self.run = peers.engine()

    @serve.batch(max_batch_size=MAX_BATCH_SIZE, batch_wait_timeout_s=BATCH_TIMEOUT)
    async def logits(self, images: list[peers.Images]) -> list[peers.Logits]:
        """The logits of images that came together."""
        return list(self.run(np.stack(images)))

    @app.post("/classify")
    async def classify(self, image: UploadFile) -> dict[str, str | float]:
        """Classify an image."""
        return peers.answer(await self.logits(peers.pixels(image.file)))


if __name__ == "__main__":
    ray.init(include_dashboard=False)
    serve.start(http_options={"host": "127.0.0.1", "port": peers.port()})
    serve.run(Classifier.bind(), blocking=True)
