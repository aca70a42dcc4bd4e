"""What Prometheus reads at /metrics.

BentoML's own request metrics are off: their labels are raw paths, a new series for each that a scanner
tries, and their buckets begin at 5 ms. To be imported in a worker only: prometheus_client decides at its
import that the workers' figures are added up, by PROMETHEUS_MULTIPROC_DIR, which BentoML has set by
then; where they are it reads only when the first of them is made.
"""

import logging
import os
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

FILE_BYTES = 2**18  # more than all figures of a kind take, whose labels are bounded


def _take_room(folder: Path) -> None:
    """Write the files that prometheus_client maps into memory, which it would leave without room.

    Where the disk is full then, the first look at a new page would kill the worker.
    """
    try:
        for kind in ("counter", "histogram", "gauge_livemax", "gauge_livesum"):
            # Whole from the first moment: an empty one would fail who reads all of them just then.
            with replacing(folder / f"{kind}_{os.getpid()}.db") as file:
                file.write(bytes(FILE_BYTES))
    except OSError:
        for path in folder.glob(f"*_{os.getpid()}.db"):
            path.unlink()
        raise


if METRICS_FOLDER in os.environ:
    # BentoML has one for all servers of a user, and each that starts empties it.
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = os.environ[METRICS_FOLDER]
    try:
        _take_room(Path(os.environ[METRICS_FOLDER]))
    except OSError as error:
        logger.warning("this worker's figures are not in /metrics: there is no room for them: %s", error)
        values.ValueClass = values.MutexValue

MILLISECONDS = (1, 2, 3, 5, 7.5, 10, 15, 20, 30, 50, 75, 100, 150, 200, 300, 500)
SECONDS = (*(value / 1000 for value in MILLISECONDS), 1, 2, 5, 10, 30, 60, 120, 300)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
TENTHS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1)

# The routes by which requests are told apart; all others are one.
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
    "Requests refused for want of room for them, or for their bytes or files",
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
killed = Counter("cifar10_killed_workers", "Workers that were killed or crashed")
swaps = Counter(
    "cifar10_model_swaps",
    "New model files that came while serving, by what became of them, in each worker",
    ["outcome"],
)
# At 0 from the start, as a rate does not see a series' first step: of swaps, and of answers for which
# somebody is paged.
for outcome in ("done", "refused"):
    swaps.labels(outcome)
for name in (*ROUTES, PROTOCOL, INFER, OTHER):
    for status in ("200", "500", "503", "504"):
        requests.labels(name, status)


def leave() -> None:
    """As this worker ends: drop its gauges."""
    if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
        mark_process_dead(os.getpid())


def serves(model: Model) -> None:
    """Tell which model is served; its classes begin at 0, so that each has its series."""
    model_info.labels(model.name, model.version, model.provider).set(1)
    for label in model.classes:
        predictions.labels(label)


def retired(model: Model) -> None:
    """Tell that a model is served no more."""
    model_info.labels(model.name, model.version, model.provider).set(0)


def ran(model: Model, logits: npt.NDArray[np.float32], seconds: float) -> None:
    """Count a run of the engine that gave ``logits``, float32 [N, classes]."""
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
    """All figures of all workers in Prometheus' text format; workers that have ended have no gauges."""
    registry = REGISTRY
    if folder := os.environ.get("PROMETHEUS_MULTIPROC_DIR"):
        _count_the_killed(Path(folder))
        registry = CollectorRegistry()
        MultiProcessCollector(registry)
    return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)


def _count_the_killed(folder: Path) -> None:
    """Drop the gauges of workers that ended without a word, and count these; their counts stay."""
    for file in folder.glob("gauge_live*_*.db"):
        kind, _, process = file.stem.rpartition("_")
        if not psutil.pid_exists(int(process)):
            with suppress(FileNotFoundError):  # another worker was first
                file.unlink()
                if kind == "gauge_livesum":  # each has one, and another of the other kind
                    killed.inc()


def route(path: str) -> str:
    """The label of a request's path: one of few, whatever clients ask for."""
    if path in ROUTES:
        return path
    if is_protocol(path):
        return INFER if path.endswith("/infer") else PROTOCOL
    return OTHER
