"""The metrics that Prometheus reads at /metrics.

BentoML's own request metrics are off: their labels are raw paths, so each one that a scanner tries makes
a new series, and their buckets begin at 5 ms. Import this module in workers only: when prometheus_client
is imported, it decides by PROMETHEUS_MULTIPROC_DIR, which BentoML has set by then, to add up the figures
of all workers. Which folder it names is read only when the first metric is made.
"""

import asyncio
import logging
import os
import signal
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import numpy.typing as npt
import psutil
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    REGISTRY,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
    values,
)
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead
from starlette.responses import Response

from serving.files import replacing
from serving.inference_protocol import is_protocol
from serving.model import Model
from serving.predictions import softmax
from serving.settings import METRICS_FOLDER

logger = logging.getLogger("serving")

FILE_BYTES = 2**18  # more than all figures of a kind can take, as their labels are bounded
BEAT_SECONDS = 5.0


def _take_room(folder: Path) -> None:
    """Write the files that prometheus_client maps into memory, so that they have their room on disk.

    prometheus_client would only set their size: if the disk was full later, the first access to a new
    page would kill the worker.
    """
    try:
        for kind in ("counter", "histogram", "gauge_livemax", "gauge_livemin", "gauge_livesum"):
            # Complete from the first moment: an empty one would fail a worker that reads them just then.
            with replacing(folder / f"{kind}_{os.getpid()}.db") as file:
                file.write(bytes(FILE_BYTES))
    except OSError:
        for path in folder.glob(f"*_{os.getpid()}.db"):
            path.unlink()
        raise


has_room = True  # whether this worker's figures are where all workers' are

if METRICS_FOLDER in os.environ:
    # BentoML's folder is shared by all servers of a user, and each of them empties it when it starts.
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = os.environ[METRICS_FOLDER]
    try:
        _take_room(Path(os.environ[METRICS_FOLDER]))
    except OSError as error:
        logger.warning("this worker's figures are not in /metrics: there is no room for them: %s", error)
        values.ValueClass = values.MutexValue
        has_room = False  # until `beat` finds some

MILLISECONDS = (1, 2, 3, 5, 7.5, 10, 15, 20, 30, 50, 75, 100, 150, 200, 300, 500)
SECONDS = (*(value / 1000 for value in MILLISECONDS), 1, 2, 5, 10, 30, 60, 120, 300)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
TENTHS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1)

# The paths that have a label of their own; `route` gives all others one of the three after them.
ROUTES = frozenset(
    {"/", "/classify", "/classify_batch", "/submission", "/model", "/docs.json", "/metrics"}
    | {"/healthz", "/livez", "/readyz"}
)
PROTOCOL, INFER, OTHER = "/v2", "/v2/infer", "other"

requests = Counter("cifar10_requests", "Requests answered", ["route", "status"])
request_seconds = Histogram(
    "cifar10_request_seconds",
    "From a request's headers to its answer's last byte",
    ["route"],
    buckets=SECONDS,
)
queue_seconds = Histogram("cifar10_queue_seconds", "Images' wait for the engine", buckets=SECONDS)
engine_seconds = Histogram("cifar10_engine_seconds", "A run of the engine", buckets=SECONDS)
batch_images = Histogram("cifar10_batch_images", "Images in a run of the engine", buckets=SIZES)
shed = Counter(
    "cifar10_shed_requests",
    "Requests, other than those of monitoring, refused for lack of room, by where there is none",
    ["lacking"],
)
evicted = Counter("cifar10_evicted_connections", "Connections closed because there were too many")
predictions = Counter("cifar10_predictions", "Images by their most probable class", ["label"])
confidence = Histogram(
    "cifar10_confidence", "Probability of an image's most probable class", buckets=TENTHS
)
model_info = Gauge(
    "cifar10_model_info",
    "1, with the model that is served in the labels",
    ["name", "version", "provider"],
    multiprocess_mode="livemax",
)
under_way = Gauge(
    "cifar10_requests_under_way", "Requests that are not answered yet", multiprocess_mode="livesum"
)
heartbeat = Gauge(
    "cifar10_heartbeat_timestamp_seconds",
    "When the worker that is longest silent was last seen at work",
    multiprocess_mode="livemin",
)
heartbeat.set(time.time())  # or a worker that is still starting would seem silent for ever
killed = Counter("cifar10_killed_workers", "Workers that were killed or crashed")
swaps = Counter(
    "cifar10_model_swaps",
    "New model files that came while serving, by what became of them, in each worker",
    ["outcome"],
)
# At 0 from the start, as a rate does not see the first step of a series: swaps, refusals, and the
# statuses whose rates matter for alerts.
for outcome in ("done", "refused"):
    swaps.labels(outcome)
for lacking in ("queue", "uploads", "disk"):
    shed.labels(lacking)
for name in (*ROUTES, PROTOCOL, INFER, OTHER):
    for status in ("200", "500", "503", "504"):
        requests.labels(name, status)


def leave() -> None:
    """Drop this worker's gauges, as it ends."""
    if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
        mark_process_dead(os.getpid())


async def beat() -> None:
    """Report every few seconds, for as long as the event loop runs, that it does.

    A worker whose figures had no room ends once there is room, as it cannot move them; another starts.
    """
    while True:
        heartbeat.set(time.time())
        await asyncio.sleep(BEAT_SECONDS)
        if not has_room:
            with suppress(OSError, RuntimeError):  # still no room, or no thread
                await asyncio.to_thread(_take_room, Path(os.environ[METRICS_FOLDER]))
                logger.warning(
                    "there is room for figures again: this worker ends, and another one starts"
                )
                signal.raise_signal(signal.SIGTERM)
                return


def serves(model: Model) -> None:
    """Report a model as served, and start the counts of its classes at 0, so that each has a series."""
    model_info.labels(model.name, model.version, model.provider).set(1)
    for label in model.classes:
        predictions.labels(label)


def retired(model: Model) -> None:
    """Report a model as no longer served."""
    model_info.labels(model.name, model.version, model.provider).set(0)


def ran(model: Model, logits: npt.NDArray[np.float32], seconds: float) -> None:
    """Record a run of the engine that took `seconds` and gave `logits`, float32 [N, classes]."""
    engine_seconds.observe(seconds)
    batch_images.observe(len(logits))
    probabilities = softmax(logits)
    counts = np.bincount(probabilities.argmax(axis=1), minlength=len(model.classes))
    for label, count in zip(model.classes, counts.tolist(), strict=True):
        if count:
            predictions.labels(label).inc(count)
    for probability in probabilities.max(axis=1).tolist():
        confidence.observe(probability)


def exposition() -> Response:
    """Return all workers' metrics in Prometheus' text format, without the gauges of ended workers."""
    registry = REGISTRY
    if folder := os.environ.get("PROMETHEUS_MULTIPROC_DIR"):
        if has_room:  # or the count would end with this worker
            _count_the_killed(Path(folder))
        registry = CollectorRegistry()
        MultiProcessCollector(registry)
    try:
        text = generate_latest(registry)
    except FileNotFoundError:  # the supervisor has just removed what an ended worker left
        text = generate_latest(registry)
    return Response(text, media_type=CONTENT_TYPE_LATEST)


def _count_the_killed(folder: Path) -> None:
    """Drop the gauges of workers that were killed or crashed, and count these; their counters stay."""
    for file in folder.glob("gauge_live*_*.db"):
        kind, _, process = file.stem.rpartition("_")
        if not psutil.pid_exists(int(process)):
            with suppress(FileNotFoundError):  # another worker was first
                file.unlink()
                if kind == "gauge_livesum":  # each worker has one file of each kind
                    killed.inc()


def route(path: str) -> str:
    """Return the label of a request's path: one of a few, whatever clients ask for."""
    if path in ROUTES:
        return path
    if is_protocol(path):
        return INFER if path.endswith("/infer") else PROTOCOL
    return OTHER
