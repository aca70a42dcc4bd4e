"""LitServe with batching."""

import sys
from typing import Any

import litserve
import numpy as np
from fastapi import Request
from numpy.typing import NDArray
from PIL import Image

from benchmarks.peers import model

Pixels = NDArray[np.uint8]
Logits = NDArray[np.float32]


class Classifier(litserve.LitAPI):
    """The steps of a request."""

    def setup(self, device: str) -> None:
        """Load the model, in a worker."""
        self.run = model.load()

    def decode_request(self, request: Request) -> Pixels:
        """The pixels of the image in a form."""
        return model.pixels(Image.open(request["image"].file))  # LitServe hands over the form

    def batch(self, inputs: list[Pixels]) -> Pixels:
        """Stack several requests' pixels into one array."""
        return np.stack(inputs)

    def predict(self, batch: Pixels) -> Logits:
        """Run the model."""
        return self.run(batch)

    def unbatch(self, output: Logits) -> list[Logits]:
        """Split the logits into each request's own."""
        return list(output)

    def encode_response(self, output: Logits) -> dict[str, Any]:
        """The answer of a request."""
        return model.answer(output)


if __name__ == "__main__":
    api = Classifier(max_batch_size=32, batch_timeout=0.005, api_path="/classify")
    server = litserve.LitServer(api, accelerator="cpu")
    server.run(host="127.0.0.1", port=int(sys.argv[1]), generate_client_file=False, log_level="warning")
