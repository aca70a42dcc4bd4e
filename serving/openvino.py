"""OpenVINO's own runtime; its plug-in for ONNX Runtime takes Intel's processors only.

It computes fp32 models in bfloat16 where the processor multiplies that natively, unless their metadata
ask for full precision.
"""

import functools
import sys
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

FULL_PRECISION = "full_precision"  # the metadata's key


@functools.cache
def core() -> Any:
    """Return OpenVINO's core, without its model converter, which reports each import to its makers.

    There is one for the process and to its end. Each core gives its thread a stack for signals and, when
    it goes, puts back the one that it found, even if that went with another core; the next signal then
    ends the process.
    """
    sys.modules.setdefault("openvino.tools.ovc", None)  # type: ignore[arg-type]  # so that it is skipped
    import openvino

    return openvino.Core()


class OpenVINOSession:
    """A model file, compiled by OpenVINO for the CPU; safe to call from any thread."""

    def __init__(self, model: Path | bytes, threads: int, runs: int = 1) -> None:
        """Compile a model file; arguments are as for `open_session`.

        Raises:
            ImportError, OSError, RuntimeError: OpenVINO cannot be loaded, or does not take the model.
        """
        options: dict[str, Any] = {
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": runs,
            # Threads bound to cores would meet those of other workers on the same cores.
            "ENABLE_CPU_PINNING": False,
        }
        # By its bytes, as OpenVINO would judge a path by its suffix.
        content = model if isinstance(model, bytes) else model.read_bytes()
        graph = core().read_model(content)
        place = ["framework", FULL_PRECISION]  # where OpenVINO keeps an ONNX file's metadata
        if graph.has_rt_info(place) and graph.get_rt_info(place).astype(str) == "true":
            options["INFERENCE_PRECISION_HINT"] = "f32"
        self._model = core().compile_model(graph, "CPU", options)
        self._idle: deque[Any] = deque()  # requests; each has memory of its own for one run at a time

    def run(self, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Return the logits as `Session.run` does.

        Raises:
            RuntimeError: the images have another size than the model's.
        """
        try:
            request = self._idle.pop()
        except IndexError:
            request = self._model.create_infer_request()
        try:
            logits: npt.NDArray[np.float32] = request.infer([images])[0]
        finally:
            self._idle.append(request)
        return logits
