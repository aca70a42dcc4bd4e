"""What runs a model in the benchmark of inference: each measurement is a process of this module.

``python -m benchmarks.engines ENGINE --file FILE --recipe RECIPE`` prints a line of JSON. Imports are
inside the functions: what an engine does not need would count as its memory and, with its threads and
allocators, change its pace.
"""

import argparse
import json
import re
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

import loky
import numpy as np
from numpy.typing import NDArray

Run = Callable[[NDArray[np.uint8]], object]

WARM_UP = 0.2  # of a measurement's seconds, and at least a run, before its clock starts
MEBIBYTE = 2**20
SUBMISSION_BATCH = 64  # that of `python -m serving submit`


def serving(provider: str) -> Callable[[Path, str], Run]:
    """The service's engine."""

    def engine(file: Path, recipe: str) -> Run:
        from serving.engine import Engine

        return Engine(file, provider, loky.cpu_count()).run  # type: ignore[arg-type]

    return engine


def onnxruntime(file: Path, recipe: str) -> Run:
    """ONNX Runtime's CPU provider with its defaults."""
    import onnxruntime as ort

    session = ort.InferenceSession(file, providers=["CPUExecutionProvider"])
    return lambda images: session.run(["logits"], {"images": images})


def openvino(file: Path, recipe: str) -> Run:
    """OpenVINO's own runtime."""
    import openvino as ov

    threads = {"INFERENCE_NUM_THREADS": loky.cpu_count()}
    request = ov.Core().compile_model(file, "CPU", threads).create_infer_request()
    return lambda images: request.infer([images], share_inputs=True)


def pytorch(precision: str) -> Callable[[Path, str], Run]:
    """The network as the reports' scripts ran it: eager, in evaluation mode, without gradients."""

    def engine(file: Path, recipe: str) -> Run:
        import torch

        from training import model
        from training import recipe as recipes
        from training.evaluate import Classifier

        torch.set_num_threads(loky.cpu_count())
        parsed = recipes.load(recipe)
        classifier = Classifier(model.build(parsed.model), parsed).eval()
        half = precision == "bf16"

        def run(images: NDArray[np.uint8]) -> object:
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=half):
                return classifier(torch.from_numpy(images))

        return run

    return engine


# By name; the parts after a colon are the provider of the service, or the precision in PyTorch.
ENGINES: dict[str, Callable[[Path, str], Run]] = {
    **{f"service:{name}": serving(name) for name in ("cpu", "openvino", "cuda", "tensorrt")},
    "onnxruntime": onnxruntime,
    "openvino": openvino,
    "pytorch:fp32": pytorch("fp32"),
    "pytorch:bf16": pytorch("bf16"),
}


def measure(run: Run, batch_size: int, seconds: float) -> float:
    """Images per second of whole batches, at least one, until ``seconds`` have passed."""
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
    """Seconds for ``rows`` images by the batches of a submission, warm."""
    chunks = [min(SUBMISSION_BATCH, rows - start) for start in range(0, rows, SUBMISSION_BATCH)]
    images = np.random.default_rng(0).integers(0, 256, (SUBMISSION_BATCH, 32, 32, 3), np.uint8)
    run(images)
    began = time.perf_counter()
    for count in chunks:
        run(images[:count])
    return time.perf_counter() - began


def _peak_memory() -> float:
    """The most memory, in MiB, that the process has had in RAM."""
    status = Path("/proc/self/status")
    # getrusage would give what the process that started this one had, if that is more.
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
    parser.add_argument("--recipe", required=True, help="of the same network, for PyTorch")
    parser.add_argument("--batch-sizes", type=int, nargs="*", default=[])
    parser.add_argument("--seconds", type=float, default=1.0, help="a batch size")
    parser.add_argument("--rows", type=int, help="instead: seconds for a submission of as many images")
    options = parser.parse_args()
    run = ENGINES[options.engine](options.file, options.recipe)
    if options.rows is not None:
        print(json.dumps({"seconds": submission_seconds(run, options.rows)}))
        return
    rates = {size: measure(run, size, options.seconds) for size in options.batch_sizes}
    print(json.dumps({"rates": rates, "memory": _peak_memory()}))


if __name__ == "__main__":
    main()
