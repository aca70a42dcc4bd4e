"""The HTTP endpoints."""

# BentoML ships without types: its decorators and base classes are Any.
# mypy: disable-error-code="untyped-decorator"

import asyncio
import contextlib
import functools
import gc
import logging
import os
import tempfile
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import bentoml
import numpy as np
import numpy.typing as npt
from bentoml.exceptions import BentoMLConfigException
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from serving import inference_protocol
from serving.access_log import open_access_log, request_id
from serving.address import check_address
from serving.deployment import Deployment, deploy, deploy_first, file_state, keep, replacements
from serving.drain import Drain
from serving.errors import (
    InternalError,
    ModelError,
    NotReadyError,
    OverloadedError,
    RequestError,
    RequestTimeoutError,
    SettingsError,
    StartError,
)
from serving.forms import SPOOLED_BYTES
from serving.limits import Budget
from serving.middleware import (
    GONE,
    OPEN_PATHS,
    Admission,
    ErrorShape,
    Observed,
    Reception,
)
from serving.model import Model
from serving.openapi import openapi_document
from serving.predictions import top_predictions
from serving.readers import SHORT_BYTES, Readers
from serving.requests import (
    ClassifyBatchForm,
    ClassifyForm,
    SubmissionForm,
    read_file,
    read_image,
    read_images,
)
from serving.responses import Answers, Classification, Csv, answer_response, error_body, error_response
from serving.settings import Settings, server_folder
from serving.submission import read_submission
from serving.tracing import prepare_tracing, send_last_spans, tracing_options
from serving.uvicorn_server import (
    ConnectionLimits,
    bypass,
    connections_that_fit,
    keep_idle_connections,
    limit_connections,
    running_server,
    separate_requests,
)

logger = logging.getLogger("serving")
logger.setLevel(logging.INFO)  # of loggers other than its own BentoML shows warnings only

try:
    SETTINGS = Settings.from_environment()
except SettingsError as error:
    raise BentoMLConfigException(str(error)) from None

if folder := server_folder():
    # What it leaves goes with the server's folder. Not by TMPDIR: Python would try to write there first,
    # and no worker could start while the disk is full.
    tempfile.tempdir = str(folder)

# Large submissions in memory at a time: one that the engine works on, and one that is read meanwhile.
LARGE_FILES = 2

REPORTS = 8  # of the metrics that wait at a time: each takes milliseconds, and anyone may ask for one

drain = Drain(SETTINGS.stop_timeout)
waiting = Budget(
    SETTINGS.max_waiting,
    "queue",
    f"The queue is full (at most {SETTINGS.max_waiting} wait); try again shortly.",
)
uploads = Budget(
    SETTINGS.max_upload_bytes,
    "uploads",
    f"The uploads under way reach their limit of {SETTINGS.max_upload_bytes} bytes; try again shortly.",
)
reports = Budget(REPORTS, "reports", "Too many ask for the metrics at once; try again shortly.")


def endpoint(
    function: Callable[["Classifier", Request], Awaitable[Response]],
) -> Callable[[Request], Awaitable[Response]]:
    """Turn a function of this worker's classifier and a request into a request handler.

    Whatever the function raises becomes an answer in the shape of errors.
    """

    @functools.wraps(function)
    async def answer(request: Request) -> Response:
        classifier: Classifier = pages.state.classifier
        try:
            async with asyncio.timeout(SETTINGS.request_timeout):
                return await function(classifier, request)
        except RequestError as error:
            if isinstance(error, OverloadedError) and request.url.path not in OPEN_PATHS:
                classifier.metrics.shed.labels(error.lacking).inc()
            return error_response(error)
        except TimeoutError:
            return error_response(
                RequestTimeoutError(f"The request took over {SETTINGS.request_timeout:g} seconds.")
            )
        except ClientDisconnect:
            return Response(status_code=GONE)  # nobody is there to read it
        except (FloatingPointError, ModelError) as error:  # of the model: where it was run tells no more
            logger.error("%s (%s) failed: %s", request.url.path, request_id.get(), error)
            return error_response(InternalError())
        except Exception:
            logger.exception("%s (%s) failed", request.url.path, request_id.get())
            return error_response(InternalError())

    return answer


@endpoint
async def get_model(classifier: "Classifier", request: Request) -> JSONResponse:
    """The model's metadata, and the execution provider that runs it and why."""
    model = classifier.model
    running = {"provider": model.provider, "provider_reason": model.provider_reason}
    return JSONResponse({**model.metadata, **running})


@endpoint
async def get_openapi(classifier: "Classifier", request: Request) -> Response:
    """The OpenAPI document, which the page at / shows."""
    return Response(_document(classifier.model.version), media_type="application/json")


@endpoint
async def get_metrics(classifier: "Classifier", request: Request) -> Response:
    """The metrics, in Prometheus' text format."""
    _check_folder()
    with reports.share():
        return await asyncio.get_running_loop().run_in_executor(
            classifier.reporter, classifier.metrics.exposition
        )


@endpoint
async def get_v2(classifier: "Classifier", request: Request) -> JSONResponse:
    """The server's metadata in the Open Inference Protocol."""
    return JSONResponse(inference_protocol.server_metadata(classifier.model))


@endpoint
async def get_v2_live(classifier: "Classifier", request: Request) -> JSONResponse:
    """Report that the process is alive."""
    return JSONResponse({"live": True})


@endpoint
async def get_v2_ready(classifier: "Classifier", request: Request) -> JSONResponse:
    """Report whether requests are taken, by the server or by the model that the path names."""
    named = {}
    if "name" in request.path_params:
        inference_protocol.check_named(classifier.model, request.path_params)
        named = {"name": classifier.model.name}
    await classifier.__is_ready__()
    return JSONResponse({**named, "ready": True})


@endpoint
async def get_v2_model(classifier: "Classifier", request: Request) -> JSONResponse:
    """The model's input and output tensors."""
    inference_protocol.check_named(classifier.model, request.path_params)
    return JSONResponse(inference_protocol.model_metadata(classifier.model))


@endpoint
async def post_v2_infer(classifier: "Classifier", request: Request) -> Response:
    """Run the model on the request's tensors."""
    inference_protocol.check_named(classifier.model, request.path_params)
    waiting.check()
    body = await request.body()
    with waiting.share():
        read = classifier.readers.short if len(body) <= SHORT_BYTES else classifier.readers.long
        inference = await read(
            inference_protocol.read,
            body,
            request.headers.get(inference_protocol.JSON_LENGTH),
            SETTINGS.max_batch_images,
        )
        deployment = classifier.deployment
        inference_protocol.check_named(deployment.model, request.path_params)
        if len(inference.images) == 1:
            logits = (await deployment.batcher.one(inference.images[0]))[np.newaxis]
        else:
            logits = await _bulk(deployment, inference.images)
    return inference_protocol.respond(inference, logits, deployment.model)


@endpoint
async def post_classify(classifier: "Classifier", request: Request) -> Response:
    """Classify one image."""
    waiting.check()  # before the body too, so that nobody sends one in vain
    content, top_k = await read_image(request)
    with waiting.share():
        image = await classifier.readers.image(content)
        deployment = classifier.deployment
        logits = await deployment.batcher.one(image)
    return answer_response(_classification(deployment.model, logits, top_k))


@endpoint
async def post_classify_batch(classifier: "Classifier", request: Request) -> Response:
    """Classify several images; the answer to a bad one is its error."""
    waiting.check()
    contents, top_k = await read_images(request, SETTINGS.max_batch_images)
    with waiting.share():
        decoded = await classifier.readers.images(contents)
        images = [image for image in decoded if not isinstance(image, RequestError)]
        deployment = classifier.deployment
        logits = iter(await _bulk(deployment, np.stack(images)) if images else ())
    return answer_response(
        [
            error_body(image.code, str(image))
            if isinstance(image, RequestError)
            else _classification(deployment.model, next(logits), top_k)
            for image in decoded
        ]
    )


@endpoint
async def post_submission(classifier: "Classifier", request: Request) -> Response:
    """Label a pickle of images."""
    waiting.check()
    async with read_file(request) as upload:
        # Files that are on disk wait there for their turn in memory.
        room = classifier.large_files if upload.on_disk else contextlib.nullcontext()
        with waiting.share():
            async with room:
                submission = await classifier.readers.long(
                    read_submission, upload.file, SETTINGS.max_rows
                )
                labels = (await _bulk(classifier.deployment, submission.images)).argmax(axis=1)
    return Response(submission.csv(labels.tolist()), media_type="text/csv")


# BentoML's own endpoints are all POST and one level deep, so these are mounted beside them.
pages = Starlette(
    routes=[
        Route("/model", get_model),
        Route("/docs.json", get_openapi),
        Route("/metrics", get_metrics),
        Route("/v2", get_v2),
        Route("/v2/health/live", get_v2_live),
        Route("/v2/health/ready", get_v2_ready),
    ]
)
for path in ("/v2/models/{name}", "/v2/models/{name}/versions/{version}"):
    pages.router.routes += [
        Route(path, get_v2_model),
        Route(f"{path}/ready", get_v2_ready),
        Route(f"{path}/infer", post_v2_infer, methods=["POST"]),
    ]


@bentoml.service(
    name="cifar10",
    # A little later than our own limit, which answers in our shape.
    traffic={"timeout": SETTINGS.request_timeout + 5},
    workers=SETTINGS.workers,
    logging={"access": {"enabled": False}},  # serving.access_log has its own
    metrics={"enabled": False},  # serving.metrics says why
    tracing=tracing_options(SETTINGS.tracing),
)
class Classifier:
    """Classifies images into the classes of CIFAR-10."""

    def __init__(self) -> None:
        from serving import metrics  # in workers only, see there

        self.metrics = metrics
        # A full garbage collection looks at every object while all requests wait: a tenth of a second on
        # slow cores. The libraries' objects stay for good, so it need not look at them; the model, which
        # is loaded after this, may be replaced.
        gc.collect()
        gc.freeze()
        self.deployment = deploy_first(SETTINGS, metrics)
        self.background: list[asyncio.Task[None]] = []
        self.retiring: set[asyncio.Task[None]] = set()
        pages.state.classifier = self
        self.readers = Readers(SETTINGS.threads, SETTINGS.max_image_pixels)
        # One thread, as each report holds up all else while it reads the figures of all workers.
        self.reporter = ThreadPoolExecutor(1, "reporter")
        self.large_files = asyncio.Semaphore(LARGE_FILES)

    @bentoml.on_deployment
    @staticmethod
    def prepare() -> None:
        """Set up what workers share, before any starts; end `bentoml serve` if they could not serve."""
        from serving import supervisor  # imports circus, which workers do without

        try:
            check_address()
            prepare_tracing(SETTINGS.tracing)
            # Only the workers measure which provider "auto" means.
            provider = "cpu" if SETTINGS.provider == "auto" else SETTINGS.provider
            state = file_state(SETTINGS.model)
            Model(SETTINGS.model, provider, SETTINGS.threads)
            supervisor.prepare(SETTINGS.stop_timeout)
            if not SETTINGS.watch_model:
                keep(SETTINGS.model, state)
        except StartError as error:
            raise BentoMLConfigException(str(error)) from None
        # A Bento's workers start in the Bento's folder, not in the one that the path is relative to.
        os.environ["SERVING_MODEL"] = str(SETTINGS.model.absolute())

    @bentoml.on_startup
    async def start(self) -> None:
        """Start the engine's threads and set up the server, before the first request."""
        self.deployment.start()
        loop = asyncio.get_running_loop()
        self.background.append(loop.create_task(self.metrics.beat()))
        if SETTINGS.watch_model:
            self.background.append(loop.create_task(self._replace()))
        if SETTINGS.access_log:
            open_access_log()
        server = running_server()
        if server is not None:  # in a test without a server there is none
            drain.listen(server)
            keep_idle_connections(server)
            separate_requests(server)
            connections = connections_that_fit(
                SETTINGS.max_connections, SETTINGS.max_upload_bytes // SPOOLED_BYTES
            )
            # If all of them could wait for answers, health checks would find none that may be closed.
            waiting.take(max(0, SETTINGS.max_waiting - connections + 1))
            limits = ConnectionLimits(
                connections,
                SETTINGS.head_timeout,
                SETTINGS.body_timeout,
                self.metrics.evicted.inc,
            )
            limit_connections(server, limits)
            if not SETTINGS.tracing:  # only BentoML's own way makes spans
                bypass(server, BYPASSING, bypass_app())

    @bentoml.on_shutdown
    async def stop(self) -> None:
        """Stop the threads, drop the gauges and send the last spans, after the last request."""
        for task in self.background:
            task.cancel()
        await self.deployment.batcher.stop()
        self.readers.stop()
        self.reporter.shutdown(wait=False, cancel_futures=True)
        self.metrics.leave()
        if SETTINGS.tracing:
            await send_last_spans()

    @property
    def model(self) -> Model:
        """The model that answers new requests."""
        return self.deployment.model

    async def __is_ready__(self) -> bool:
        """Return True if new requests are taken; for BentoML's /readyz.

        Raises:
            NotReadyError: they are not.
        """
        if drain.stopping:
            raise NotReadyError("The service is stopping.")
        _check_folder()
        if waiting.spent:
            raise NotReadyError("The queue is full; try again shortly.")
        return True

    # BentoML describes these in the schema for its client. Without tracing, the first two are bypassed.
    @bentoml.api(input_spec=ClassifyForm, output_spec=Classification)
    async def classify(self, request: Request) -> Response:
        """Classify one image."""
        return await post_classify(request)

    @bentoml.api(input_spec=ClassifyBatchForm, output_spec=Answers)
    async def classify_batch(self, request: Request) -> Response:
        """Classify several images; the answer to a bad one is its error."""
        return await post_classify_batch(request)

    @bentoml.api(input_spec=SubmissionForm, output_spec=Csv)
    async def submission(self, request: Request) -> Response:
        """Label a pickle of images."""
        return await post_submission(request)

    async def _replace(self) -> None:
        """Let each new model file that passes the checks take over."""
        async for _ in replacements(SETTINGS.model, lambda: self.deployment.file):
            try:
                new = await asyncio.to_thread(deploy, SETTINGS, self.metrics)
                new.start(self.deployment)
            except Exception as error:
                self.metrics.swaps.labels("refused").inc()
                logger.error(
                    "%s goes on; the new model file is refused: %s",
                    self.deployment,
                    error,
                    exc_info=not isinstance(error, StartError),
                )
            else:
                self._hand_over(new)

    def _hand_over(self, new: Deployment) -> None:
        """Let a new deployment take new requests, and the old one finish those that it has."""
        old, self.deployment = self.deployment, new
        self.metrics.swaps.labels("done").inc()
        logger.info("%s took over from %s", new, old)
        # Not awaited: meanwhile a yet newer file may take over, such as the one before this.
        finishing = asyncio.get_running_loop().create_task(old.batcher.finish())
        self.retiring.add(finishing)
        finishing.add_done_callback(self.retiring.discard)


def _check_folder() -> None:
    """Raise `NotReadyError` if somebody has removed the folder in which uploads and figures are kept."""
    if not Path(tempfile.gettempdir()).is_dir():
        raise NotReadyError("The folder of the server's own files is gone; restart the service.")


async def _bulk(deployment: Deployment, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    return np.concatenate([logits async for logits in deployment.batcher.many(images)])


@functools.lru_cache(maxsize=1)  # it takes as long as ten classifications
def _document(version: str) -> bytes:
    document = openapi_document(
        service.openapi_spec.asdict(), version, with_key=SETTINGS.api_key is not None
    )
    return bytes(JSONResponse(document).body)


def _classification(model: Model, logits: npt.NDArray[np.float32], top_k: int) -> dict[str, Any]:
    return {
        "predictions": top_predictions(logits, model.classes, top_k),
        "model": {"name": model.name, "version": model.version},
    }


service: Any = Classifier  # the decorator has made a BentoML service of the class
service.mount_asgi_app(pages)

LAYERS = [  # the outermost first
    Middleware(Observed, drain=drain),
    Middleware(ErrorShape),
    Middleware(Admission, drain=drain, api_key=SETTINGS.api_key),
    Middleware(
        Reception,
        max_bytes=SETTINGS.max_body_bytes,
        seconds=SETTINGS.body_timeout,
        uploads=uploads,
    ),
]
for layer, _, options in LAYERS:
    service.add_asgi_middleware(layer, **options)

# These go through our middleware only. BentoML's way adds a router, a context, a bound signature and
# background tasks, which they do not need, and a timer that outlives the answer until the timeout.
BYPASSING = {"/classify": post_classify, "/classify_batch": post_classify_batch}


def bypass_app() -> ASGIApp:
    """Return the application that answers the paths of `BYPASSING`."""

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        response = await BYPASSING[scope["path"]](Request(scope, receive))
        await response(scope, receive, send)

    app: ASGIApp = answer
    for layer, _, options in reversed(LAYERS):
        app = layer(app, **options)
    return app
