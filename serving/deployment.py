"""A model that serves, and its replacement by a newer file without losing a request."""

import asyncio
import functools
import logging
import os
import shutil
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from serving.batching import Batcher
from serving.engine import RUNS
from serving.errors import ModelError, StartError
from serving.files import replacing
from serving.model import Model
from serving.settings import KEPT_MODEL, Settings

logger = logging.getLogger("serving")

LOOK_SECONDS = 1.0  # between two looks at the model file


@dataclass(frozen=True)
class FileState:
    """What changes when a file is replaced or written."""

    device: int
    inode: int
    size: int
    modified_ns: int

    @classmethod
    def of(cls, path: Path) -> "FileState | None":
        """The state of a file, through links; None where there is none."""
        try:
            found = path.stat()
        except OSError:
            return None
        return cls(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


class Deployment:
    """One version of the model with its own engine and queue.

    A request is computed and answered by one deployment as a whole: while a newer one takes new
    requests, the older one finishes those that it has.

    Attributes:
        model: the model.
        batcher: shares the engine's runs among requests.
        file: the state that the model's file had.
    """

    def __init__(self, path: Path, settings: Settings, metrics: Any) -> None:
        """Load a file, check it and run it once.

        Args:
            path: the file.
            settings: the service's.
            metrics: the module `serving.metrics`, which only workers import.

        Raises:
            StartError: the file or the provider is not usable.
        """
        self.file = FileState.of(path)
        self.model = Model(
            path,
            settings.provider,
            settings.threads,
            runs=RUNS,
            max_batch_size=settings.max_batch_size,
        )
        model = self.model
        logger.info("%s on %s: %s", self, model.provider, model.provider_reason)
        if FileState.of(path) != self.file:
            raise ModelError(f"{path} changed while it was loaded.")
        self._metrics = metrics
        # Not a method of this: in a circle of references a model that was replaced would stay in memory
        # until Python looks for such, which it hardly does (serving.service freezes what is there).
        self.batcher = Batcher(
            functools.partial(_run, model, metrics),
            max_batch_size=model.batch_size,
            chunk_size=model.chunk_size,
            waited=metrics.queue_seconds.observe,
            threads=model.runs,
        )

    def __str__(self) -> str:
        return f"{self.model.name} {self.model.version}"

    def start(self) -> None:
        """Begin to serve; needs a running event loop."""
        self.batcher.start()
        self._metrics.serves(self.model)


def _run(model: Model, metrics: Any, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """A run of the engine, counted."""
    began = time.perf_counter()
    logits = model.logits(images)
    metrics.ran(model, logits, time.perf_counter() - began)
    return logits


def deploy(settings: Settings, metrics: Any) -> Deployment:
    """Deploy the model file, and keep a copy of it for a worker that starts when it is usable no more.

    Raises:
        StartError: it is not usable.
    """
    deployment = Deployment(settings.model, settings, metrics)
    if KEPT_MODEL in os.environ:
        try:
            _keep(settings.model, Path(os.environ[KEPT_MODEL]), deployment.file)
        except OSError as error:
            logger.warning("no copy of the model file is kept: %s", error)
    return deployment


def deploy_first(settings: Settings, metrics: Any) -> Deployment:
    """Deploy what a worker that starts has to serve: the model file, or the copy of one that passed.

    The copy where the file is not usable any more, and where nobody watches it: all workers then serve
    the one that the service began with.

    Raises:
        StartError: the model file is not usable, and there is no copy.
    """
    kept = Path(os.environ.get(KEPT_MODEL, ""))
    if kept.is_file() and not settings.watch_model:
        return Deployment(kept, settings, metrics)
    try:
        return deploy(settings, metrics)
    except StartError as refusal:
        if not kept.is_file():
            raise
        logger.error(
            "the last model file that passed serves on; the present one is refused: %s", refusal
        )
        return Deployment(kept, settings, metrics)


def _keep(path: Path, kept: Path, state: FileState | None) -> None:
    """Copy a file, unless it has changed from that state.

    Raises:
        OSError: it has, or it cannot be copied.
    """
    with path.open("rb") as file, replacing(kept) as copy:
        shutil.copyfileobj(file, copy)
        if FileState.of(path) != state:
            raise OSError(f"{path} changed while it was copied")


async def replacements(path: Path, known: FileState | None) -> AsyncIterator[None]:
    """Yield each time when another file than the `known` one, and then the last, lies at `path`.

    Only once two looks have found the same, so that a file that is still being copied is left alone.
    """
    before = known
    while True:
        await asyncio.sleep(LOOK_SECONDS)
        now = await asyncio.to_thread(FileState.of, path)
        if now is not None and now == before and now != known:
            known = now
            yield
        before = now
