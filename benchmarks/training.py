"""Images per second of the training job, for the reports' recipes beside a plain PyTorch loop.

The plain loop is like the reports': a DataLoader with two workers, torchvision transforms image by
image, the default memory format, and float32, or on a GPU the recipe's mixed precision. Both train the
recipe's network with its batch size; the job's steps are compiled on a GPU, as in a run. A third
measurement is the training job without augmentation. Recipes of ours have no plain loop, and are
measured with the size of images that they begin with. Measurements take turns in rounds, so that a
change in the machine's speed affects all of them, and each has a process of its own: otherwise the job's
memory settings would serve the plain loop too.

``python -m benchmarks.training`` measures and writes ``benchmarks/training.json``; ``--markdown`` prints
that file as a table. The committed files are of ``--seconds 3 --rounds 3``: ``training.json``, for the
README, of ``--recipes A1 A2 A3 B1 B2 C1 D1 E1``, and ``training-avx2.json``, on another machine, of
``--recipes A1 fast accurate B2 D1``.
"""

import argparse
import multiprocessing
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from statistics import median
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from PIL import Image
from pydantic import BaseModel, ConfigDict
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from benchmarks import stored
from benchmarks.stored import BenchmarkError
from training import data, device, model, optimizer, recipe
from training.capture import WARM_UPS
from training.data import Images
from training.learner import Learner
from training.processes import Processes
from training.recipe import ON_NORMALISED, Recipe
from training.tables import markdown_table

PACKAGES = ("torch", "torchvision")
OURS = ("fast", "accurate")
WARM_UP = 0.2  # fraction of a measurement's seconds, before its clock starts
LEAST_STEPS = 3  # of a measurement, however long they take


class Rates(BaseModel):
    """Images per second of a recipe's training, one number per round, and the precisions.

    For a recipe that is not a report's, ``plain`` is empty.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    recipe: str
    batch_size: int
    precision: str
    plain_precision: str
    job: list[float]
    plain: list[float]
    job_without_augmentation: list[float]

    @property
    def ratio(self) -> float | None:
        """The training job's median divided by the plain loop's, or None if that was not measured."""
        return median(self.job) / median(self.plain) if self.plain else None

    @property
    def kept(self) -> float:
        """The training job's median divided by its own without augmentation."""
        return median(self.job) / median(self.job_without_augmentation)


class Figures(stored.Figures):
    """The contents of ``training.json``: ``n`` rounds of ``seconds`` per measurement."""

    benchmark: ClassVar[str] = "training"

    n: int
    seconds: float
    rates: list[Rates]


# -- the training job -------------------------------------------------------------------------------


def job(recipe: Recipe, dataset: data.DataSet) -> Iterator[int]:
    """Make steps of ``python -m training run`` without end; yields the number of images of each.

    Only whole batches are used, and whatever is compiled is compiled before the first step.
    """
    images, _ = data.split(dataset.train, recipe.data.validation)
    learner = Learner(recipe, 0, images, Processes())
    for epoch in learner.to_compile([0]):
        learner.compile(epoch)
    while True:
        for batch in learner.batches(0):
            if batch.count == recipe.batch_size:
                learner.learn(batch, lambda base_lr: base_lr)
                yield batch.count


def job_without_augmentation(recipe: Recipe, dataset: data.DataSet) -> Iterator[int]:
    """As ``job``, with the images left as they are."""
    return job(recipe.model_copy(update={"augment": ()}), dataset)


# -- the plain loop ---------------------------------------------------------------------------------


class PILImages(Dataset[tuple[Tensor, int]]):
    """Images as torchvision's CIFAR10 gives them: PIL images passed through ``transform``."""

    def __init__(self, images: Images, transform: Callable[[Image.Image], Tensor]) -> None:
        self.pixels, self.labels = images.pixels.numpy(), images.labels.tolist()
        self.transform = transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.pixels[index])), self.labels[index]


def plain(recipe: Recipe, dataset: data.DataSet) -> Iterator[int]:
    """As ``job``, for a loop like the one in PyTorch's tutorial."""
    images, _ = data.split(dataset.train, recipe.data.validation)
    loader = DataLoader(
        PILImages(images, transform(recipe)),
        batch_size=recipe.batch_size,
        shuffle=True,
        num_workers=2,
        drop_last=True,
        multiprocessing_context="fork",  # as in a script on Linux; in a pool's process it is another
    )
    place = device.choose()
    dtype = plain_precision(recipe, place)
    network = model.build(recipe.model).to(place)
    (sgd_or_adam,) = optimizer.build(recipe.optimizer, network)
    scaler = torch.amp.GradScaler(place.type, enabled=dtype == torch.float16)
    running_loss = 0.0
    network.train()
    while True:
        for inputs, labels in loader:
            inputs, labels = inputs.to(place), labels.to(place)
            sgd_or_adam.zero_grad()
            with torch.autocast(place.type, dtype=dtype, enabled=dtype != torch.float32):
                loss = F.cross_entropy(network(inputs), labels)
            scaler.scale(loss).backward()
            scaler.step(sgd_or_adam)
            scaler.update()
            running_loss += loss.item()
            yield len(labels)


def plain_precision(recipe: Recipe, place: torch.device) -> torch.dtype:
    """The recipe's mixed precision on a GPU, float32 on a CPU, where the reports' had no effect."""
    return device.precision(recipe.amp, place) if place.type == "cuda" else torch.float32


def transform(recipe: Recipe) -> transforms.Compose:
    """A recipe's augmentation and normalisation as torchvision transforms of one PIL image.

    Raises:
        BenchmarkError: torchvision lacks an operation.
    """
    on_pixels = [_transform(part) for part in recipe.augment if part.op not in ON_NORMALISED]
    on_normalised = [_transform(part) for part in recipe.augment if part.op in ON_NORMALISED]
    normalize = transforms.Normalize(recipe.data.mean, recipe.data.std)
    return transforms.Compose([*on_pixels, transforms.ToTensor(), normalize, *on_normalised])


def _transform(part: recipe.Augmentation) -> Any:
    match part:
        case recipe.HorizontalFlip():
            return transforms.RandomHorizontalFlip(part.p)
        case recipe.RandomCrop():
            mode = "constant" if part.border == "black" else "reflect"
            return transforms.RandomCrop(32, padding=part.padding, padding_mode=mode)
        case recipe.ColorJitter():
            return transforms.ColorJitter(part.brightness, part.contrast, part.saturation, part.hue)
        case recipe.Rotation():
            return transforms.RandomRotation(part.degrees)
        case recipe.Translate():
            return transforms.RandomAffine(0, translate=(part.fraction, part.fraction))
        case recipe.Sharpness():
            return transforms.RandomAdjustSharpness(part.factor, part.p)
        case recipe.AutoAugment():
            return transforms.AutoAugment(transforms.AutoAugmentPolicy.CIFAR10)
        case recipe.RandomErasing():
            return transforms.RandomErasing(part.p, part.scale, part.ratio, part.value)
        case _:
            raise BenchmarkError(f"torchvision has no {part.op}: a plain loop cannot train the recipe")


# -- measuring --------------------------------------------------------------------------------------

Loop = Callable[[Recipe, data.DataSet], Iterator[int]]


def measure(loop: Loop, recipe: Recipe, seconds: float) -> float:
    """Images per second of a loop's steps on the data set, after a warm-up."""
    steps = loop(recipe, data.load())
    # On a GPU the step after the first WARM_UPS is captured as a graph, which must not count.
    _pace(steps, WARM_UP * seconds, WARM_UPS + 1 if torch.cuda.is_available() else 1)
    return _pace(steps, seconds, LEAST_STEPS)


def _pace(steps: Iterator[int], seconds: float, at_least: int) -> float:
    """Images per second over whole steps, for at least ``seconds`` and ``at_least`` steps."""
    _synchronise()
    began, elapsed, images, count = time.perf_counter(), 0.0, 0, 0
    while count < at_least or elapsed < seconds:
        images += next(steps)
        count += 1
        elapsed = time.perf_counter() - began
    _synchronise()
    return images / (time.perf_counter() - began)


def _synchronise() -> None:
    """Wait for the GPU, if there is one, which works asynchronously."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _apart(loop: Loop, recipe: Recipe, seconds: float) -> float:
    """Run ``measure`` in a process of its own."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([Learner.__module__])  # only once, since its imports take seconds
    with ProcessPoolExecutor(1, context) as pool:
        try:
            return pool.submit(measure, loop, recipe, seconds).result()
        except BrokenProcessPool as error:
            raise BenchmarkError("a measurement was killed, perhaps for want of memory") from error
        except BaseException:  # such as SIGTERM: the pool would wait for the measurement
            for process in multiprocessing.active_children():
                process.kill()
            raise


def compare(name: str, chosen: Recipe, dataset: data.DataSet, seconds: float, rounds: int) -> Rates:
    """Measure the recipe ``chosen``, named ``name``, in ``rounds`` of ``seconds`` per measurement.

    Raises:
        BenchmarkError: ``dataset``, which each process loads for itself, has too few images for a batch,
            or a measurement was killed, perhaps for want of memory.
    """
    images = len(data.split(dataset.train, chosen.data.validation)[0])
    if images < chosen.batch_size:
        raise BenchmarkError(f"{images} images are fewer than a batch of {chosen.batch_size}")
    paces: dict[Loop, list[float]] = {job: [], job_without_augmentation: []}
    if chosen.report is not None:
        paces[plain] = []
    for _ in range(rounds):
        for loop, measured in paces.items():
            measured.append(_apart(loop, chosen, seconds))
    place = device.choose()
    return Rates(
        recipe=name,
        batch_size=chosen.batch_size,
        precision=_name(device.precision(chosen.amp, place)),
        plain_precision=_name(plain_precision(chosen, place)),
        job=paces[job],
        plain=paces.get(plain, []),
        job_without_augmentation=paces[job_without_augmentation],
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# -- figures ----------------------------------------------------------------------------------------


def markdown(figures: Figures) -> str:
    """The figures as a Markdown table, with a note on what they show and where they were measured."""
    header = "recipe|batch|precision (plain)|training job|plain loop|ratio|without augmentation|kept"
    rows = [header.split("|")]
    for rates in figures.rates:
        precisions, beside = rates.precision, ["", ""]
        if rates.ratio is not None:
            precisions += f" ({rates.plain_precision})"
            beside = [f"{median(rates.plain):,.0f}", f"{rates.ratio:.2f}"]
        rows.append(
            [
                *(rates.recipe, str(rates.batch_size), precisions, f"{median(rates.job):,.0f}", *beside),
                *(f"{median(rates.job_without_augmentation):,.0f}", f"{100 * rates.kept:.0f} %"),
            ]
        )
    known = [rates.recipe for rates in figures.rates if rates.recipe in recipe.names()]
    begins = {name: recipe.load(name).resolution for name in known}
    sizes = "".join(
        f" {name} is measured with the images of {stages[0].size} pixels that it begins with."
        for name, stages in begins.items()
        if stages
    )
    text = (
        f"Images per second, medians of n={figures.n} interleaved measurements of {figures.seconds:g} "
        "s; *kept* is the training job's speed as a share of its speed without augmentation."
        f"{sizes} {figures.place}"
    )
    return f"{markdown_table(rows)}\n\n{textwrap.fill(text, 120)}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return stored.main(Figures, _parser(), _measure, markdown, arguments)


def _measure(options: argparse.Namespace) -> Iterator[Figures]:
    """Yield the figures so far after each recipe."""
    if options.rounds < 1:
        raise BenchmarkError("--rounds has to be at least 1")
    chosen = {name: recipe.load(name) for name in options.recipes}
    dataset = data.load()  # downloaded now, if it has to be
    begun = stored.begin(PACKAGES)
    rates: list[Rates] = []
    for name, part in chosen.items():
        rates.append(compare(name, part, dataset, options.seconds, options.rounds))
        print(f"{name}: {median(rates[-1].job):,.0f} images/s", file=sys.stderr)
        yield Figures(**begun, n=options.rounds, seconds=options.seconds, rates=rates)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.training",
        description="Images per second of the training job beside a plain PyTorch loop, and beside "
        "itself without augmentation. CIFAR10_ROOT names the data set, as for python -m training.",
    )
    reports = [name for name in recipe.names() if recipe.load(name).report is not None]
    parser.add_argument(
        "--recipes",
        nargs="+",
        default=[*reports, *OURS],
        metavar="RECIPE",
        help="default: all of the reports, and the fastest of ours",
    )
    parser.add_argument(
        "--seconds", type=stored.seconds, default=10.0, help="of a measurement (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    return parser


if __name__ == "__main__":
    sys.exit(main())
