"""The engines of the inference benchmark; each measurement is a process that runs this module.

``python -m benchmarks.engines ENGINE --file FILE`` prints a line of JSON.
Imports are inside the functions: whatever an engine does not need would count as its memory and, with
its threads and allocators, change its speed.
"""

import argparse
import json
import re
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import loky
import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from serving.settings import Provider, ProviderName

Run = Callable[[NDArray[np.uint8]], NDArray[np.float32]]

WARM_UP = 0.2  # fraction of a measurement's seconds, and at least one run, before its clock starts
MEBIBYTE = 2**20
SUBMISSION_BATCH = 64  # as in `python -m serving submit`


class Variant(NamedTuple):
    """What an engine runs: a model file or, in PyTorch, a recipe's network with the same views."""

    file: Path
    recipe: str
    views: str


Engine = Callable[[Variant], Run]


def serving(provider: "Provider") -> Engine:
    """The service's engine."""

    def engine(variant: Variant) -> Run:
        from serving.engine import Engine

        return Engine(variant.file, provider, loky.cpu_count()).run

    return engine


def bound(provider: "ProviderName", device: str) -> Engine:
    """The service's session with its input and output kept in a device's memory (IOBinding).

    Each batch overwrites the last one of its size, and its logits are copied back.
    """

    def engine(variant: Variant) -> Run:
        from onnxruntime import OrtValue

        from serving.sessions import OnnxRuntimeSession

        session = OnnxRuntimeSession(variant.file, provider, loky.cpu_count()).session
        binding = session.io_binding()
        kept: dict[int, tuple[OrtValue, OrtValue]] = {}

        def run(images: NDArray[np.uint8]) -> NDArray[np.float32]:
            count = len(images)
            if count not in kept:
                logits = OrtValue.ortvalue_from_shape_and_type([count, 10], np.float32, device)
                kept[count] = OrtValue.ortvalue_from_numpy(images, device), logits
            inputs, outputs = kept[count]
            inputs.update_inplace(images)
            binding.bind_ortvalue_input("images", inputs)
            binding.bind_ortvalue_output("logits", outputs)
            session.run_with_iobinding(binding)
            found: NDArray[np.float32] = outputs.numpy()
            return found

        return run

    return engine


def onnxruntime(variant: Variant) -> Run:
    """ONNX Runtime's CPU provider with default options."""
    import onnxruntime as ort

    session = ort.InferenceSession(variant.file, providers=["CPUExecutionProvider"])

    def run(images: NDArray[np.uint8]) -> NDArray[np.float32]:
        logits: NDArray[np.float32] = session.run(["logits"], {"images": images})[0]
        return logits

    return run


def openvino(variant: Variant) -> Run:
    """OpenVINO's own runtime."""
    from serving.openvino import core

    threads = {"INFERENCE_NUM_THREADS": loky.cpu_count()}
    model = core().compile_model(variant.file, "CPU", threads)
    request = model.create_infer_request()

    def run(images: NDArray[np.uint8]) -> NDArray[np.float32]:
        logits: NDArray[np.float32] = request.infer([images], share_inputs=True)[0]
        return logits

    return run


def pytorch(precision: str, compiled: bool = False) -> Engine:
    """The network in evaluation mode, without gradients, on the GPU if there is one.

    It runs eagerly, as in the reports' scripts, or compiled, which on a GPU also captures its graph.
    """

    def engine(variant: Variant) -> Run:
        import torch

        from training import device
        from training import recipe as recipes
        from training.evaluate import Classifier
        from training.model import build

        device.limit_threads()
        place = device.choose()
        parsed = recipes.load(variant.recipe).model_copy(update={"views": variant.views})
        classifier: torch.nn.Module = Classifier(build(parsed.model), parsed).eval().to(place)
        if compiled:
            classifier.to(memory_format=torch.channels_last)
            classifier.compile(mode="reduce-overhead", dynamic=False)
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]

        def run(images: NDArray[np.uint8]) -> NDArray[np.float32]:
            half = torch.autocast(place.type, dtype, enabled=precision != "fp32")
            with torch.no_grad(), half:
                logits = classifier(torch.from_numpy(images).to(place))
            found: NDArray[np.float32] = logits.float().cpu().numpy()
            return found

        return run

    return engine


# By name; after a colon comes the provider or, for PyTorch, the precision.
ENGINES: dict[str, Engine] = {
    "service:auto": serving("auto"),
    "service:cpu": serving("cpu"),
    "service:openvino": serving("openvino"),
    "service:cuda": serving("cuda"),
    "service:tensorrt": serving("tensorrt"),
    "bound:cuda": bound("cuda", "cuda"),
    "onnxruntime": onnxruntime,
    "openvino": openvino,
    "pytorch:fp32": pytorch("fp32"),
    "pytorch:bf16": pytorch("bf16"),
    "compiled:fp16": pytorch("fp16", compiled=True),
}


def measure(run: Run, batch_size: int, seconds: float) -> float:
    """Images per second over whole batches, at least one, for ``seconds`` after a warm-up."""
    batch = np.random.default_rng(0).integers(0, 256, (batch_size, 32, 32, 3), np.uint8)
    _pace(run, batch, WARM_UP * seconds)
    return _pace(run, batch, seconds)


def _pace(run: Run, batch: NDArray[np.uint8], seconds: float) -> float:
    began, elapsed, images = time.perf_counter(), 0.0, 0
    while not images or elapsed < seconds:
        run(batch)
        images += len(batch)
        elapsed = time.perf_counter() - began
    return images / elapsed


def submission_seconds(run: Run, rows: int) -> float:
    """Seconds for ``rows`` images in the batches of a submission, after a warm-up run."""
    chunks = [min(SUBMISSION_BATCH, rows - start) for start in range(0, rows, SUBMISSION_BATCH)]
    images = np.random.default_rng(0).integers(0, 256, (SUBMISSION_BATCH, 32, 32, 3), np.uint8)
    run(images)
    began = time.perf_counter()
    for count in chunks:
        run(images[:count])
    return time.perf_counter() - began


def _peak_memory() -> float:
    """The process's peak memory in RAM, in MiB."""
    status = Path("/proc/self/status")
    # getrusage would give the memory of the process that started this one, if that was more.
    if status.exists():
        (line,) = re.findall(r"VmHWM:\s+(\d+) kB", status.read_text())
        return int(line) * 1024 / MEBIBYTE
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / MEBIBYTE


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engines", description=__doc__)
    parser.add_argument("engine", choices=ENGINES)
    parser.add_argument("--file", type=Path, required=True, help="a model file")
    parser.add_argument("--recipe", default="", help="of the same network, for PyTorch")
    parser.add_argument("--views", default="none", help="that the file averages, for PyTorch")
    parser.add_argument("--batch-sizes", type=int, nargs="*", default=[])
    parser.add_argument("--seconds", type=float, default=1.0, help="per batch size")
    parser.add_argument("--rows", type=int, help="instead, time a submission of this many images")
    options = parser.parse_args()
    run = ENGINES[options.engine](Variant(options.file, options.recipe, options.views))
    if options.rows is not None:
        print(json.dumps({"seconds": submission_seconds(run, options.rows)}))
        return
    rates = {size: measure(run, size, options.seconds) for size in options.batch_sizes}
    print(json.dumps({"rates": rates, "memory": _peak_memory()}))


if __name__ == "__main__":
    main()
