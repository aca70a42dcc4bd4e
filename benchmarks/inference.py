"""Images per second and memory of the service's engine, beside other ways to run its models.

By default it measures the network of the bundled model, with that file's views, and those of two
reports, B1 and A3, all with random weights. The engines, by batch size: the service's with each provider
and precision of this machine, plain ONNX Runtime (its CPU provider, default options, float32), eager
PyTorch as the reports' own scripts ran it, the same in bfloat16, and OpenVINO's own runtime as the
limit; on a GPU, in fp16, also the service's session with IOBinding and compiled PyTorch. Then it times
all of ``python -m serving submit``, from the process's start to the CSV, and the engine's part of it.
Measurements take turns in rounds, so that a change in the machine's speed affects all of them, and each
has a process of its own.

``python -m benchmarks.inference`` measures and writes ``benchmarks/inference.json``; ``--markdown``
prints that file as tables. The committed files were measured on four machines, with other options:

- ``inference.json``, for the README: ``--rounds 2``;
- ``inference-intel.json``: ``--models fast B1 A3 --rounds 2``;
- ``inference-avx2.json``: ``--models accurate --seconds 2``;
- ``inference-h200.json``: ``--models accurate --seconds 0.5 --rounds 1``, only the engines that run on a
  GPU, and no submissions.
"""

import argparse
import json
import pickle
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median, median_low
from typing import Any, ClassVar

import numpy as np
import onnx
from pydantic import BaseModel, ConfigDict
from rich.console import Console
from rich.progress import track

from benchmarks import stored
from benchmarks.engines import SUBMISSION_BATCH, Variant
from benchmarks.program import output
from benchmarks.server import environment
from benchmarks.stored import BenchmarkError
from export import graph, metadata, quantize
from export.ensemble import Ensemble, half
from export.metadata import CONTRACT
from export.provider import others
from serving.providers import obstacle
from serving.settings import BUNDLED_MODEL
from training import data, recipe
from training.evaluate import Classifier
from training.initial import initial_network
from training.model import CLASSES
from training.recipe import Recipe, Views
from training.tables import markdown_table

BATCH_SIZES = (1, 8, 32, 128, 512)
PYTORCH_BATCH = 128
MODELS = ("accurate", "B1", "A3")
PACKAGES = ("numpy", "onnxruntime", "onnxruntime-gpu", "openvino", "torch")

CONSOLE = Console(stderr=True)
REFERENCE = ("onnxruntime", "fp32")  # the ratios are multiples of its rates
NAMES = {
    "service:cpu": "service, CPU provider",
    "service:openvino": "service, OpenVINO provider",
    "service:cuda": "service, CUDA provider",
    "service:tensorrt": "service, TensorRT provider",
    "bound:cuda": "CUDA provider, IOBinding",
    "onnxruntime": "plain ONNX Runtime",
    "openvino": "OpenVINO's own runtime",
    "pytorch:fp32": "eager PyTorch",
    "pytorch:bf16": "eager PyTorch",
    "compiled:fp16": "compiled PyTorch",
}


class Rates(BaseModel):
    """Images per second of an engine with a model in a precision, by batch size, one number per round.

    ``memory`` is the process's peak memory in RAM in each round, in MiB.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    engine: str
    precision: str
    rates: dict[int, list[float]]
    memory: list[float]

    @classmethod
    def begin(cls, model: str, engine: str, precision: str) -> "Rates":
        """Start without measurements; ``pytorch:bf16`` runs the fp32 network, but is listed as bf16."""
        precision = "bf16" if engine == "pytorch:bf16" else precision
        return cls(
            model=model,
            engine=engine,
            precision=precision,
            rates={size: [] for size in BATCH_SIZES},
            memory=[],
        )


class Submissions(BaseModel):
    """Seconds for a pickle of ``rows`` images, one number per round.

    ``submit`` is for the whole command, ``engine_alone`` for the engine's part of it, after a warm-up;
    ``engine`` names the provider that both use.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    engine: str
    precision: str
    rows: int
    submit: list[float]
    engine_alone: list[float]


class Figures(stored.Figures):
    """The contents of ``inference.json``: ``n`` rounds of ``seconds`` per batch size."""

    benchmark: ClassVar[str] = "inference"

    n: int
    seconds: float
    rates: list[Rates]
    submissions: list[Submissions]


@dataclass(frozen=True)
class Model:
    """A recipe's network with some views, and its model file in each precision."""

    name: str
    views: Views
    files: dict[str, Path]


# -- models -----------------------------------------------------------------------------------------


@contextmanager
def built(names: Sequence[str], precisions: Sequence[str]) -> Iterator[list[Model]]:
    """Build the networks of recipes with random weights, in fp32 and in ``precisions``.

    Raises:
        RecipeError: no such recipe.
    """
    with tempfile.TemporaryDirectory() as folder:
        yield [
            _built(name, precisions, Path(folder) / f"{number}")
            for number, name in enumerate(track(names, "building models", console=CONSOLE))
        ]


def _built(name: str, precisions: Sequence[str], folder: Path) -> Model:
    chosen = _recipe(name)
    network = initial_network(chosen.model, chosen, 0, data.load_sample().train)
    classifier = Ensemble([Classifier(network, chosen).eval()])
    graphs = {"fp32": graph.build(classifier)}
    if "fp16" in precisions:
        graphs["fp16"] = graph.build(half(classifier))
    if "int8" in precisions:
        graphs["int8"] = quantize.int8(graphs["fp32"])
    described = {"contract": CONTRACT, "name": name, "classes": json.dumps(CLASSES)}
    folder.mkdir()
    files = {}
    for precision, content in graphs.items():
        own = {"version": metadata.version(content), "precision": precision}
        onnx.helper.set_model_props(content, described | own)
        files[precision] = folder / f"{precision}.onnx"
        onnx.save(content, files[precision])
    return Model(name, chosen.views, files)


def _recipe(name: str) -> Recipe:
    """Load a recipe by name; the bundled model's recipe gets the views of the bundled file."""
    chosen = recipe.load(name)
    bundled = metadata.read(onnx.load(BUNDLED_MODEL))
    if name != bundled.name:
        return chosen
    return chosen.model_copy(update={"views": bundled.members[0].views})


# -- measuring --------------------------------------------------------------------------------------


def engines(precision: str, file: Path) -> list[str]:
    """The engines that can run ``file``, which is of ``precision``, on this machine.

    Raises:
        ProviderError: a provider that is present cannot run the file.
    """
    providers = ["cpu", *(other.short_name for other in others(file.read_bytes()))]
    if precision == "fp16":
        found = [f"service:{name}" for name in providers if name in ("cuda", "tensorrt")]
        return [*found, "bound:cuda", "compiled:fp16"] if "cuda" in providers else found
    found = [f"service:{name}" for name in providers]
    if stored.version_of("openvino"):
        found.append("openvino")
    return ["onnxruntime", *found, "pytorch:fp32", "pytorch:bf16"] if precision == "fp32" else found


def plan(models: Sequence[Model]) -> list[tuple[Variant, Rates]]:
    """Combine every engine with every model's file in every precision, without measurements yet."""
    return [
        (Variant(file, model.name, model.views), Rates.begin(model.name, engine, precision))
        for model in models
        for precision, file in model.files.items()
        for engine in engines(precision, file)
    ]


def measure(turns: Sequence[tuple[Variant, Rates]], seconds: float) -> None:
    """Measure a round and add it to the rates."""
    sizes = [str(size) for size in BATCH_SIZES]
    arguments = ["--batch-sizes", *sizes, "--seconds", str(seconds)]
    for variant, rates in track(turns, "measuring engines", console=CONSOLE):
        found = apart(rates.engine, variant, *arguments)
        for size, rate in found["rates"].items():
            rates.rates[int(size)].append(rate)
        rates.memory.append(found["memory"])


def apart(engine: str, variant: Variant, *arguments: str) -> dict[str, Any]:
    """Run a measurement in a process of its own and return what it found.

    Raises:
        BenchmarkError: the process failed.
    """
    file, recipe_name, views = variant
    given = ("--file", str(file), "--recipe", recipe_name, "--views", views, *arguments)
    printed = output(f"{engine} with {file.name}", "-m", "benchmarks.engines", engine, *given)
    found: dict[str, Any] = json.loads(printed.splitlines()[-1])
    return found


def plan_submissions(
    turns: Sequence[tuple[Variant, Rates]], rows: int
) -> list[tuple[Variant, Submissions]]:
    """The first model's files that the service's engine runs, none measured yet.

    The engine chooses its provider, as it does unless one is named.
    """
    first = turns[0][1].model
    precisions = {
        rates.precision: variant
        for variant, rates in turns
        if rates.model == first and rates.engine.startswith("service:")
    }
    return [
        (
            variant,
            Submissions(
                model=first,
                engine="service:auto",
                precision=precision,
                rows=rows,
                submit=[],
                engine_alone=[],
            ),
        )
        for precision, variant in precisions.items()
    ]


def measure_submissions(turns: Sequence[tuple[Variant, Submissions]]) -> None:
    """Add a round: time ``python -m serving submit`` on a pickle of images, and the engine alone."""
    pixels = data.load_sample().test.pixels.numpy()
    rows = turns[0][1].rows
    content = {b"data": np.resize(pixels, (rows, *pixels.shape[1:])), b"ids": np.arange(rows)}
    with tempfile.TemporaryDirectory() as folder:
        images = Path(folder) / "test.pkl"
        images.write_bytes(pickle.dumps(content))
        for variant, times in track(turns, "measuring submissions", console=CONSOLE):
            times.submit.append(_submit(images, variant.file))
            found = apart(times.engine, variant, "--rows", str(rows))
            times.engine_alone.append(found["seconds"])


def _submit(file: Path, model_file: Path) -> float:
    """Seconds from the process's start to the CSV."""
    csv = file.with_suffix(".csv")
    command = ("-m", "serving", "submit", str(file), str(csv), "--model", str(model_file))
    began = time.perf_counter()
    output("python -m serving submit", *command, env=environment())
    return time.perf_counter() - began


# -- figures ----------------------------------------------------------------------------------------


def markdown(figures: Figures) -> str:
    """The figures as Markdown tables, with a note on what they show and where they were measured."""
    compared = any((rates.engine, rates.precision) == REFERENCE for rates in figures.rates)
    lower = " (the lower of two)" * (figures.n == 2)
    ratios = f", and in brackets as multiples of plain ONNX Runtime in the same round{lower}" * compared
    measured = [pace for rates in figures.rates for pace in rates.rates.values()]
    spread = median(max(pace) / min(pace) for pace in measured)
    repeated = f" (the highest is {spread:.2f} times the lowest, in the median)" * (figures.n > 1)
    of_memory = min(len(rates.memory) for rates in figures.rates)
    of_engines = (
        f"Images per second by batch size{ratios}: medians of n={figures.n} interleaved measurements of "
        f"{figures.seconds:g} s{repeated}, each in a process of its own, whose peak memory (RSS"
        f"{f', n={of_memory}' * (of_memory != figures.n)}) is the last column."
    )
    if not figures.submissions:
        return f"{_engines_table(figures)}\n\n{textwrap.fill(f'{of_engines} {figures.place}', 120)}"
    of_submissions = (
        "`python -m serving submit`, from the process's start to the CSV; its engine alone (warm, in "
        f"batches of {SUBMISSION_BATCH}); float32 PyTorch alone (in batches of {PYTORCH_BATCH}); "
        f"*ratio* is PyTorch's time, computed from the table above, divided by submit's. Both tables: "
        f"{figures.place}"
    )
    tables = (_engines_table(figures), of_engines, _submissions_table(figures), of_submissions)
    return "\n\n".join(part if part.startswith("|") else textwrap.fill(part, 120) for part in tables)


def _engines_table(figures: Figures) -> str:
    sizes = [f"{size}" for size in figures.rates[0].rates]
    rows = [["model", "engine", "precision", *sizes, "memory (MiB)"]]
    references = {
        rates.model: rates.rates
        for rates in figures.rates
        if (rates.engine, rates.precision) == REFERENCE
    }
    for rates in figures.rates:
        cells = []
        for size, measured in rates.rates.items():
            cell = f"{median(measured):,.0f}"
            if rates.model in references:
                pairs = zip(measured, references[rates.model][size], strict=True)
                # Of two rounds the lower: one that met a pause of the machine would flatter.
                cell += f" ({median_low(pace / reference for pace, reference in pairs):.2g})"
            cells.append(cell)
        engine = NAMES[rates.engine]
        rows.append([rates.model, engine, rates.precision, *cells, f"{median(rates.memory):,.0f}"])
    return markdown_table(rows)


def _submissions_table(figures: Figures) -> str:
    rows = [
        ["model", "precision", "images", "submit (s)", "engine alone (s)", "eager PyTorch (s)", "ratio"]
    ]
    eager = {
        rates.model: median(rates.rates[PYTORCH_BATCH])
        for rates in figures.rates
        if rates.engine == "pytorch:fp32"
    }
    for times in figures.submissions:
        submit, alone = median(times.submit), median(times.engine_alone)
        row = [times.model, times.precision, f"{times.rows:,}", f"{submit:.1f}", f"{alone:.1f}", "", ""]
        if times.model in eager:
            pytorch = times.rows / eager[times.model]
            row[-2:] = f"{pytorch:.1f}", f"{pytorch / submit:.1f}"
        rows.append(row)
    return markdown_table(rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return stored.main(Figures, _parser(), _measure, markdown, arguments)


def _measure(options: argparse.Namespace) -> Iterator[Figures]:
    """Yield the figures so far after each round."""
    if options.rounds < 1 or options.rows < 1:
        raise BenchmarkError("--rounds and --rows have to be at least 1")
    begun = stored.begin(PACKAGES)
    with built(options.models, options.precisions) as models:
        turns = [turn for turn in plan(models) if turn[1].engine in options.engines]
        if not turns:
            raise BenchmarkError(f"none of these engines runs here: {', '.join(options.engines)}")
        submissions = plan_submissions(turns, options.rows)
        for n in range(1, options.rounds + 1):
            measure(turns, options.seconds)
            if submissions:
                measure_submissions(submissions)
            yield Figures(
                **begun,
                n=n,
                seconds=options.seconds,
                rates=[rates for _, rates in turns],
                submissions=[times for _, times in submissions],
            )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.inference",
        description="Images per second and memory of the service's engine beside other engines, and the "
        "time of a submission.",
    )
    parser.add_argument(
        "--models",
        nargs="+",
        default=MODELS,
        metavar="MODEL",
        help="recipes, whose networks get random weights (default: %(default)s)",
    )
    precisions = ["int8"] if obstacle("cuda") else ["int8", "fp16"]
    parser.add_argument(
        "--precisions",
        nargs="*",
        choices=["int8", "fp16"],
        default=precisions,
        help="beside fp32; fp16 is for CUDA (default: those for this machine)",
    )
    parser.add_argument(
        "--engines",
        nargs="+",
        choices=NAMES,
        default=list(NAMES),
        metavar="ENGINE",
        help="those to measure, and submissions only if the service's is among them; of %(choices)s "
        "(default: all that run here)",
    )
    parser.add_argument(
        "--seconds", type=stored.seconds, default=1.0, help="of each batch size (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument(
        "--rows", type=int, default=10_000, help="images of a submission (default: %(default)s)"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
