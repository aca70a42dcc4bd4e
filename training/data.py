"""CIFAR-10 as uint8 tensors, from the official files through torchvision or a small sample file."""

import hashlib
import io
import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from training.errors import ExplainedError
from training.files import locked

ROOT_VARIABLE = "CIFAR10_ROOT"
SAMPLE = Path(__file__).parent / "cifar10_sample.npz"
FOLDER = "cifar-10-batches-py"
VALIDATION_SEED = 10  # one split for all runs, whatever their seed, so that runs can be compared

# CIFAR-10, the bundled sample or, with a digest of its bytes, another file like the sample.
Source = Annotated[str, Field(pattern="^(cifar10|sample(-[0-9a-f]{12})?)$")]


class DataError(ExplainedError):
    """The data set is missing or damaged; the message says what to do."""


@dataclass(frozen=True)
class Images:
    """Labelled images: ``pixels`` uint8 [N, 32, 32, 3] RGB, ``labels`` int64 [N] in 0..9."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def first(self, count: int | None) -> "Images":
        """The first ``count`` images, or all if it is None."""
        return self if count is None else Images(self.pixels[:count], self.labels[:count])

    def to(self, device: torch.device) -> "Images":
        """The same images on ``device``."""
        return Images(self.pixels.to(device), self.labels.to(device))


@dataclass(frozen=True)
class DataSet:
    """Training and test images, and their source."""

    train: Images
    test: Images
    source: Source


def load() -> DataSet:
    """Load the data set that ``CIFAR10_ROOT`` names, else the one in the user's cache folder.

    ``CIFAR10_ROOT`` is a folder that holds the official ``cifar-10-batches-py`` (it is only read), or
    a sample file (``.npz``) like the bundled ``training/cifar10_sample.npz``. Without the variable
    torchvision downloads the files (170 MB, once, by one process while others wait for it). The MD5
    sums of the official files are checked in either case.

    Raises:
        DataError: the data set is missing, damaged or unreadable, or the download failed.
    """
    named = os.environ.get(ROOT_VARIABLE)
    if named and named.endswith(".npz"):
        return load_sample(Path(named))
    from torchvision.datasets import CIFAR10  # takes seconds to import, and most commands do without

    root = Path(named) if named else _cache_folder()
    try:
        with nullcontext() if named else _alone(root):
            parts = [CIFAR10(root, train=train, download=not named) for train in (True, False)]
    except (OSError, RuntimeError) as error:
        if not named:
            raise DataError(
                f"could neither read CIFAR-10 in {root} nor download it there: {error}. Fetch "
                "cifar-10-python.tar.gz by other means, unpack it, and set "
                f"{ROOT_VARIABLE} to the folder with {FOLDER} in it"
            ) from error
        if isinstance(error, OSError):
            raise DataError(
                f"could not read CIFAR-10 in {root / FOLDER}: {error}. Make its files readable, or set "
                f"{ROOT_VARIABLE} to another folder with {FOLDER} in it"
            ) from error
        found = (root / FOLDER).is_dir()
        problem = "is damaged (an MD5 sum differs or a file is missing)" if found else "is not there"
        raise DataError(
            f"CIFAR-10 {problem}: {root / FOLDER}. Put the official files there, set "
            f"{ROOT_VARIABLE} to a folder that has them, or unset it to download them"
        ) from error
    train, test = (Images(torch.from_numpy(p.data), torch.tensor(p.targets)) for p in parts)
    return DataSet(train, test, "cifar10")


def _alone(root: Path) -> AbstractContextManager[None]:
    """Let only one process at a time fill the cache folder, as several runs may start at once."""
    root.mkdir(parents=True, exist_ok=True)
    filled_by_nobody = not os.access(root, os.W_OK)
    return nullcontext() if filled_by_nobody else locked(root / ".lock")


def load_present() -> DataSet:
    """Load the data set that ``CIFAR10_ROOT`` or the cache folder has, else the bundled sample.

    Raises:
        DataError: as ``load``.
    """
    here = os.environ.get(ROOT_VARIABLE) or (_cache_folder() / FOLDER).is_dir()
    return load() if here else load_sample()


def load_sample(path: Path | None = None) -> DataSet:
    """Load a sample file: ``train_images``, ``train_labels``, ``test_images`` and ``test_labels``.

    Without ``path`` it is the bundled one, the only one whose source is ``sample``: a run on another
    file held other images out.

    Raises:
        DataError: it is missing, not such a file, or has arrays of other shapes or types.
    """
    path = path or SAMPLE
    try:
        content = path.read_bytes()
        bundled = path == SAMPLE or content == SAMPLE.read_bytes()
    except OSError as error:
        raise DataError(f"could not read the sample of CIFAR-10: {error}") from error
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            train, test = (_sample_part(arrays, part) for part in ("train", "test"))
    except Exception as error:  # NumPy and zipfile raise nearly anything for damaged or foreign bytes
        raise DataError(
            f"{path}: not a sample of CIFAR-10 as training/data.py describes: {error}"
        ) from error
    source = "sample" if bundled else f"sample-{hashlib.sha256(content).hexdigest()[:12]}"
    return DataSet(train, test, source)


def split(train: Images, fraction: float) -> tuple[Images, Images]:
    """Split training images into those to train on and a held-out ``fraction``, the ``val`` images.

    The split is random but always the same one; both parts keep the order of the data set.
    """
    count = round(len(train) * fraction)
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(VALIDATION_SEED))
    val, rest = order[:count].sort().values, order[count:].sort().values
    return (
        Images(train.pixels[rest], train.labels[rest]),
        Images(train.pixels[val], train.labels[val]),
    )


def _cache_folder() -> Path:
    caches = os.environ.get("XDG_CACHE_HOME")
    return (Path(caches) if caches else Path.home() / ".cache") / "cifar10"


def _sample_part(arrays: "np.lib.npyio.NpzFile", part: str) -> Images:
    pixels, labels = arrays[f"{part}_images"], arrays[f"{part}_labels"]
    if pixels.dtype != np.uint8 or pixels.shape[1:] != (32, 32, 3):
        raise ValueError(f"{part}_images is {pixels.dtype} {pixels.shape}, not uint8 [N, 32, 32, 3]")
    if not len(pixels):
        raise ValueError(f"{part}_images has no image")
    shape = pixels.shape[:1]
    if labels.dtype != np.int64 or labels.shape != shape or not ((labels >= 0) & (labels < 10)).all():
        raise ValueError(f"{part}_labels is not int64 [{len(pixels)}] in 0..9")
    return Images(torch.from_numpy(pixels), torch.from_numpy(labels))
