"""The model that is served, and its replacement by a newer file without losing a request."""

import asyncio
import functools
import logging
import os
import shutil
import time
from collections.abc import AsyncIterator, Callable
from operator import attrgetter
from pathlib import Path
from types import ModuleType

import numpy as np
import numpy.typing as npt

from serving.batching import Batcher
from serving.engine import RUNS
from serving.errors import ModelError, StartError
from serving.files import replacing
from serving.model import Model
from serving.settings import KEPT_MODEL, Settings, server_folder

logger = logging.getLogger("serving")

LOOK_SECONDS = 1.0  # between two checks of the model file
RETRY_SECONDS = 300.0  # until a refused file is tried again: by then, memory may be free


# What changes when a file is replaced or written to, or who may read it changes.
FileState = tuple[int, ...]
_STATE = attrgetter("st_dev", "st_ino", "st_size", "st_mtime_ns", "st_mode", "st_uid", "st_gid")


def file_state(path: Path) -> FileState | None:
    """Return the state of a file, following links, or None if there is no file."""
    try:
        state: FileState = _STATE(path.stat())
    except OSError:
        return None
    return state


class Deployment:
    """One version of the model with its own engine and queue.

    Each request is computed and answered by a single deployment: while a newer one takes new requests,
    the older one finishes those that it has.

    Attributes:
        model: the model.
        batcher: shares the engine's runs among requests.
        file: the state of the model file when it was loaded.
    """

    def __init__(self, path: Path, settings: Settings, metrics: ModuleType) -> None:
        """Load a model file, check it and run it.

        Args:
            path: the model file.
            settings: the service's settings.
            metrics: the module `serving.metrics`, which only workers may import.

        Raises:
            StartError: the file or the provider cannot be used.
        """
        self.file = file_state(path)
        self.model = Model(
            path,
            settings.provider,
            settings.threads,
            runs=RUNS,
            max_batch_size=settings.max_batch_size,
            choices=server_folder(),
        )
        model = self.model
        logger.info("%s on %s: %s", self, model.provider, model.provider_reason)
        if file_state(path) != self.file:
            raise ModelError(f"{path} changed while it was loaded.")
        self._metrics = metrics
        # Not a bound method: in a reference cycle, a replaced model would stay in memory until a full
        # garbage collection, which hardly ever comes (serving.service freezes the objects at start).
        self.batcher = Batcher(
            functools.partial(_run, model, metrics),
            max_batch_size=model.batch_size,
            chunk_size=model.chunk_size,
            waited=metrics.queue_seconds.observe,
            threads=model.runs,
        )

    def __str__(self) -> str:
        return f"{self.model.name} {self.model.version}"

    def start(self, instead: "Deployment | None" = None) -> None:
        """Start the engine's threads and report the model as served; needs a running event loop.

        Args:
            instead: the deployment that this one replaces.

        Raises:
            RuntimeError: no thread can be started.
        """
        self.batcher.start()
        if instead is not None:
            self._metrics.retired(instead.model)
        self._metrics.serves(self.model)


def _run(model: Model, metrics: ModuleType, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Run the engine, and record the run in the metrics."""
    began = time.perf_counter()
    logits = model.logits(images)
    metrics.ran(model, logits, time.perf_counter() - began)
    return logits


def deploy(settings: Settings, metrics: ModuleType) -> Deployment:
    """Deploy the model file, and keep a copy for workers that start when it can no longer be used.

    Raises:
        StartError: the file or the provider cannot be used.
    """
    deployment = Deployment(settings.model, settings, metrics)
    if settings.watch_model:
        keep(settings.model, deployment.file)
    return deployment


def keep(path: Path, state: FileState | None) -> None:
    """Copy the file `path` for workers that start later; log it if that fails.

    Args:
        path: the model file, which has passed the checks.
        state: its state then; if it has changed, there is no new copy.
    """
    if KEPT_MODEL in os.environ:
        try:
            _copy(path, Path(os.environ[KEPT_MODEL]), state)
        except OSError as error:
            logger.warning("the model file is not copied for workers that start later: %s", error)


def deploy_first(settings: Settings, metrics: ModuleType) -> Deployment:
    """Deploy what a starting worker has to serve: the model file, or a copy of the last one that passed.

    The copy is used if the file can no longer be used. If the file is not watched, all workers use the
    copy that the supervisor made, so that they serve the model that the service began with.

    Raises:
        StartError: the model file cannot be used, and there is no usable copy.
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


def _copy(path: Path, kept: Path, state: FileState | None) -> None:
    """Copy the file `path` to `kept`, unless it is no longer in the given state.

    Raises:
        OSError: the file has changed, or it cannot be copied.
    """
    with path.open("rb") as file, replacing(kept) as copy:
        shutil.copyfileobj(file, copy)
        if file_state(path) != state:
            raise OSError(f"{path} changed while it was copied")


async def replacements(path: Path, served: Callable[[], FileState | None]) -> AsyncIterator[None]:
    """Yield once the file `path` has another state than that `served`.

    If it still has it after `RETRY_SECONDS`, yield again. Two checks in a row must find the same state,
    so that a file still being copied is left alone.
    """
    before = tried = served()
    again = 0.0
    while True:
        await asyncio.sleep(LOOK_SECONDS)
        try:
            now = await asyncio.to_thread(file_state, path)
        except RuntimeError:  # no thread can be started just now
            continue
        if now is None and before is not None:
            logger.warning("%s is gone; the model goes on, but the service could not start again", path)
        if now is not None and now == before != served() and (now != tried or time.monotonic() >= again):
            tried, again = now, time.monotonic() + RETRY_SECONDS
            yield
        before = now
