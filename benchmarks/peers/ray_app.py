"""Ray Serve with batching."""

import sys
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray
from PIL import Image
from ray import serve
from starlette.requests import Request

from benchmarks.peers import model


@serve.deployment(max_ongoing_requests=256)
class Classifier:
    """Classifies an image."""

    def __init__(self) -> None:
        self.run = model.load()

    @serve.batch(max_batch_size=32, batch_wait_timeout_s=0.005)
    async def logits(self, images: list[NDArray[np.uint8]]) -> list[NDArray[np.float32]]:
        """The logits for each of several requests."""
        return list(self.run(np.stack(images)))

    async def __call__(self, request: Request) -> dict[str, Any]:
        """Classify one image."""
        async with request.form() as form:
            image = form["image"]
            assert not isinstance(image, str)
            pixels = model.pixels(Image.open(image.file))
        return model.answer(await self.logits(pixels))


if __name__ == "__main__":
    ray.init(num_cpus=2, include_dashboard=False, configure_logging=False)
    serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[1]), "access_log": False})
    application: Any = Classifier  # the decorator has turned the class into a deployment
    serve.run(application.bind(), route_prefix="/classify", blocking=True)
