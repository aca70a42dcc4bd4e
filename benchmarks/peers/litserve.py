"""LitServe with batching: one process answers HTTP, another runs the model."""

# mypy: disable-error-code="misc"

import litserve as ls
import numpy as np
from fastapi import Request

from benchmarks import peers

MAX_BATCH_SIZE = 64
BATCH_TIMEOUT = 0.01  # seconds


class Classifier(ls.LitAPI):
    """Classifies an image."""

    def setup(self, device: str) -> None:
        """Open the model."""
        self.run = peers.engine()

    def decode_request(self, request: Request) -> peers.Images:
        """The pixels of a form's image."""
        return peers.pixels(request["image"].file)  # LitServe hands over the form

    def batch(self, inputs: list[peers.Images]) -> peers.Images:
        """Images as one array."""
        return np.stack(inputs)

    def predict(self, images: peers.Images) -> peers.Logits:
        """The logits of a batch."""
        return self.run(images)

    def unbatch(self, output: peers.Logits) -> list[peers.Logits]:
        """The logits of each image."""
        return list(output)

    def encode_response(self, logits: peers.Logits) -> dict[str, str | float]:
        """The answer."""
        return peers.answer(logits)


if __name__ == "__main__":
    api = Classifier(max_batch_size=MAX_BATCH_SIZE, batch_timeout=BATCH_TIMEOUT, api_path="/classify")
    ls.LitServer(api, accelerator="cpu").run(
        host="127.0.0.1", port=peers.port(), generate_client_file=False
    )
