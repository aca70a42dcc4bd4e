"""Providers: what can run a model file on this machine, each a name and a way to make a session."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from onnxruntime import InferenceSession, SessionOptions

from export.graph import INPUT, OUTPUT

BATCH = 250
ERRORS_ONLY = 3  # without a GPU, ONNX Runtime's search for one is a warning


class ProviderError(RuntimeError):
    """A provider cannot run a model file; the message names it and gives its reason."""


@dataclass(frozen=True)
class Provider:
    """An execution provider of ONNX Runtime.

    Attributes:
        name: ONNX Runtime's.
        session: makes one from a model file's bytes.
    """

    name: str
    session: Callable[[bytes], InferenceSession]

    def logits(self, model: bytes, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Logits, float32 [N, 10], by a model file's bytes of ``pixels``, uint8 [N, 32, 32, 3].

        Raises:
            ProviderError: it cannot load or run the model.
        """
        batches = (pixels[start : start + BATCH] for start in range(0, len(pixels), BATCH))
        try:
            session = self.session(model)
            return np.concatenate([session.run([OUTPUT], {INPUT: batch})[0] for batch in batches])
        except Exception as error:  # ONNX Runtime's have no base class of their own
            raise ProviderError(f"{self.name} cannot run the model: {error}") from error


def _standard(name: str) -> Provider:
    def session(model: bytes) -> InferenceSession:
        options = SessionOptions()
        options.log_severity_level = ERRORS_ONLY
        return InferenceSession(model, options, providers=[name])

    return Provider(name, session)


CPU = _standard("CPUExecutionProvider")
CUDA = _standard("CUDAExecutionProvider")


def others(model: bytes) -> list[Provider]:
    """The providers beside the CPU that run ``model`` on this machine."""
    if not torch.cuda.is_available() or CUDA.name not in onnxruntime.get_available_providers():
        return []
    onnxruntime.preload_dlls()
    # Where CUDA does not start, ONNX Runtime falls back to the CPU without an error.
    return [CUDA] if CUDA.session(model).get_providers()[0] == CUDA.name else []
