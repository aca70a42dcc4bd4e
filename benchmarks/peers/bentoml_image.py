"""BentoML with an image as the argument."""

from typing import Any

import bentoml
import numpy as np
from PIL.Image import Image

from benchmarks.peers import model


@bentoml.service
class Classifier:
    """Classifies an image."""

    def __init__(self) -> None:
        self.run = model.load()

    @bentoml.api
    def classify(self, image: Image) -> dict[str, Any]:
        """Classify one image."""
        return model.answer(self.run(model.pixels(image)[np.newaxis])[0])
