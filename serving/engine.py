"""The engine: a model file in inference sessions, on the provider asked for by name or the fastest."""

import contextlib
import fcntl
import json
import logging
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt

from serving.errors import NoProviderError, ProviderError
from serving.providers import CPU, FULL_NAMES, OPENVINO, obstacle
from serving.sessions import Session, open_session
from serving.settings import Provider, ProviderName

logger = logging.getLogger("serving")

TRIAL_SECONDS = 0.3  # of the runs that decide which provider is the faster

# How many times as fast as the CPU provider OpenVINO has to be, as it takes more memory and is slower
# than in the trial if the sizes of batches change, as they do in a service.
OPENVINO_GAIN = 1.1

# How many a server makes at a time. The threads of a run wait for each other at every layer, all the
# more while the server takes a core from one of them; two runs on half the threads each get more done.
RUNS = 2

# In a run on a CPU: with more it gets no faster per image, and the images only wait for each other.
IMAGES_PER_THREAD = 8


class Engine:
    """Runs a model file; safe to call from any thread.

    Attributes:
        provider: the provider that runs it, by its own name.
        reason: why that provider was chosen.
        runs: how many calls of `run` at a time make full use of the device.
        enough: batch size from which on a run is no faster per image; None if larger is always faster.
    """

    def __init__(
        self, path: Path, provider: Provider, threads: int, runs: int = 1, choice: Path | None = None
    ) -> None:
        """Open a session, and on a CPU another one for simultaneous runs.

        Args:
            path: a model file that keeps the contract.
            provider: its name, or "auto": CUDA where it works, else OpenVINO if it is clearly faster
                than the CPU provider in a few runs of this model, `runs` at a time.
            threads: how many threads a provider on the CPU uses.
            runs: how many calls of `run` the caller will make at a time.
            choice: a file in which processes that run the same model agree on what "auto" means; the
                first of them makes it. None: this process decides for itself.

        Raises:
            ProviderError: a provider that was asked for by name cannot be used here.
        """
        runs = min(runs, threads)
        if provider == "auto":
            best = _best(path, threads, runs) if choice is None else _agreed(choice, path, threads, runs)
            name, self._beside, self.reason = best
        else:
            name, self._beside = provider, _named(path, provider, threads, runs)
            self.reason = "asked for by name"
        self.provider = FULL_NAMES[name]
        self._pads = name in ("cuda", "tensorrt")
        self.runs = 1 if self._pads else runs
        self.enough = None if self._pads else _enough(threads, self.runs)
        self._alone = self._beside
        if self.runs > 1:
            self._alone = open_session(path, name, threads)
        self._running = 0
        self._lock = threading.Lock()

    def run(self, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Return the logits, float32 [N, classes], of RGB images, uint8 [N, 32, 32, 3] with any strides.

        A run that begins alone uses all threads; one that begins while others are under way shares them.
        """
        batch = np.ascontiguousarray(images)
        if self._pads:
            batch = _padded(batch)
        with self._lock:
            self._running += 1
            session = self._alone if self._running == 1 else self._beside
        try:
            return session.run(batch)[: len(images)]
        finally:
            with self._lock:
                self._running -= 1

    def warm_up(self, batch_size: int) -> None:
        """Run the batch sizes that will occur, so that no request waits for what a first run prepares.

        On a GPU these are the powers of two that batches are padded to, the largest first, so that the
        others reuse its memory. On a CPU only the given size is run, as a new one costs milliseconds.
        """
        largest = _bucket(batch_size) if self._pads else batch_size
        sizes = [largest >> shift for shift in range(largest.bit_length())] if self._pads else [largest]
        for size in sizes:
            for session in dict.fromkeys((self._alone, self._beside)):
                session.run(np.zeros((size, 32, 32, 3), np.uint8))


def _enough(threads: int, runs: int) -> int:
    """The batch size from which on a run on a CPU is no faster per image."""
    return IMAGES_PER_THREAD * (threads // runs)


def _bucket(count: int) -> int:
    """The power of two that `count` images are padded to."""
    return 1 << (count - 1).bit_length()


def _padded(batch: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Pad a batch for a GPU, which takes longer to prepare a new batch size than to run a larger one."""
    missing = _bucket(len(batch)) - len(batch)
    return np.pad(batch, [(0, missing), (0, 0), (0, 0), (0, 0)]) if missing else batch


def _named(path: Path, provider: ProviderName, threads: int, runs: int) -> Session:
    try:
        return open_session(path, provider, threads, runs)
    except ProviderError as error:
        raise ProviderError(f"{error} Or set SERVING_PROVIDER=cpu.") from error


def _agreed(choice: Path, path: Path, threads: int, runs: int) -> tuple[ProviderName, Session, str]:
    """Return what `_best` found in the first of the processes that share the file `choice`.

    In figures that are close, each might find another, and answer differently. One at a time, as they
    would slow each other's trial. If what was found first does not work here, another is found for the
    later ones; if the file cannot be used, this process decides for itself.
    """
    try:
        file = choice.open("a+b", buffering=0)
    except OSError:
        return _best(path, threads, runs)
    with file:
        with contextlib.suppress(OSError):  # on a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        try:
            name, reason = json.loads(file.read())
            return name, open_session(path, name, threads, runs), reason
        except ProviderError as error:
            logger.warning("%s Going on without it.", error)
        except ValueError:  # this process is the first, or an earlier one was killed while it wrote
            pass
        best = name, _, reason = _best(path, threads, runs)
        with contextlib.suppress(OSError):  # on a full disk
            file.truncate(0)
            file.write(json.dumps([name, reason]).encode())
        return best


def _best(path: Path, threads: int, runs: int) -> tuple[ProviderName, Session, str]:
    """Return the provider that "auto" means, a session with it and why.

    What does not start is left out, with a warning.
    """
    if not obstacle("cuda"):
        try:
            return "cuda", open_session(path, "cuda", threads, runs), "a GPU is here and CUDA works"
        except ProviderError as error:
            logger.warning("%s Going on without it.", error)
    cpu = open_session(path, "cpu", threads, runs)
    try:
        openvino = open_session(path, "openvino", threads, runs)
    except NoProviderError as lack:
        return "cpu", cpu, f"there is no other. {lack}"
    except ProviderError as error:
        logger.warning("%s Going on without it.", error)
        return "cpu", cpu, "there is no other that starts"
    count = _enough(threads, runs)
    cpu_rate, openvino_rate = _rates([cpu, openvino], count, runs)
    batches = f"{runs} batches of {count}" if runs > 1 else f"a batch of {count}"
    why = (
        f"in images/s at start, by {batches} at a time: {CPU} {cpu_rate:,.0f}, "
        f"{OPENVINO} {openvino_rate:,.0f}, which has to be {OPENVINO_GAIN} times as fast"
    )
    if openvino_rate > OPENVINO_GAIN * cpu_rate:
        return "openvino", openvino, why
    return "cpu", cpu, why


def _rates(sessions: Sequence[Session], count: int, runs: int) -> list[float]:
    """Return each session's images/s, by its fastest turn of `runs` batches of `count` at a time.

    They take turns, so that load slows all alike.
    """
    batches = [np.zeros((count, 32, 32, 3), np.uint8)] * runs
    seconds = [float("inf")] * len(sessions)
    with ThreadPoolExecutor(runs) as threads:
        for session in sessions:
            list(threads.map(session.run, batches))  # which prepares this size
        deadline = time.perf_counter() + TRIAL_SECONDS
        while True:
            for index, session in enumerate(sessions):
                began = time.perf_counter()
                list(threads.map(session.run, batches))
                seconds[index] = min(seconds[index], time.perf_counter() - began)
            if time.perf_counter() >= deadline:
                return [runs * count / fastest for fastest in seconds]
