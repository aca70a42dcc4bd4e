"""The providers that can run a model file on this machine, in sessions like the service's."""

from collections.abc import Iterator
from dataclasses import dataclass

import loky
import numpy as np
from numpy.typing import NDArray

from serving.errors import NoProviderError, ProviderError
from serving.providers import FULL_NAMES
from serving.sessions import open_session
from serving.settings import ProviderName

BATCH = 250


@dataclass(frozen=True)
class Provider:
    """A provider of the service; ``short_name`` is its setting's name for it."""

    short_name: ProviderName

    @property
    def name(self) -> str:
        """Its own name."""
        return FULL_NAMES[self.short_name]

    def logits(self, model: bytes, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Logits, float32 [N, 10], that a model file's bytes give for ``pixels``, uint8 [N, 32, 32, 3].

        Raises:
            ProviderError: the provider cannot load or run the model; the message names it and says why.
        """
        session = open_session(model, self.short_name, loky.cpu_count())
        batches = (pixels[start : start + BATCH] for start in range(0, len(pixels), BATCH))
        try:
            return np.concatenate([session.run(batch) for batch in batches])
        except Exception as error:  # onnxruntime has a dozen kinds of its own
            raise ProviderError(f"{self.name} does not run the model: {error}") from error


CPU = Provider("cpu")


def others(model: bytes) -> Iterator[Provider]:
    """The providers other than the CPU's that this machine has.

    Raises:
        ProviderError: a provider that is present cannot run ``model``.
    """
    names: tuple[ProviderName, ...] = ("openvino", "cuda", "tensorrt")
    for name in names:
        try:
            open_session(model, name, 1)
        except NoProviderError:
            continue
        yield Provider(name)
