"""BentoML with an image as the argument."""

from typing import Any

import bentoml
import numpy as np
from PIL.Image import Image

from benchmarks.peers import net


@bentoml.service
class Classifier:
    """Classifies an image."""

    def __init__(self) -> None:
        self.run = net.load()

    @bentoml.api
    def classify(self, image: Image) -> dict[str, Any]:
        """Classify one image."""
        return net.answer(self.run(net.pixels(image)[np.newaxis])[0])
