"""OpenTelemetry's spans of requests, which BentoML makes; its own variables say where they go."""

import asyncio
import os
from contextlib import suppress
from typing import Any

from bentoml._internal.configuration.containers import BentoMLContainer  # there is no public way

from serving.errors import StartError
from serving.middleware import OPEN_PATHS

SPANS_SECONDS = 2  # for a collector to take the last spans of a worker that ends


def tracing_options(share: float) -> dict[str, Any]:
    """Return BentoML's options for spans of a share, from 0 to 1, of the requests."""
    if not share:
        return {"excluded_urls": ".*"}  # BentoML makes spans even if they are sent nowhere
    return {
        "exporter_type": "otlp",
        "otlp": {"protocol": "http"},
        "sample_rate": share,
        "excluded_urls": sorted(OPEN_PATHS),
    }


def prepare_tracing(share: float) -> None:
    """Set up tracing as workers do, which would otherwise fail for ever, or hide what it reads.

    Raises:
        StartError: OpenTelemetry's variables cannot be used.
    """
    variables = [name for name in os.environ if name.startswith("OTEL_")]
    if not share:
        for name in variables:  # BentoML's workers would read them all the same
            del os.environ[name]
        return
    try:
        import opentelemetry.propagate  # noqa: F401, fails for what OTEL_PROPAGATORS may not name

        BentoMLContainer.tracer_provider.get().shutdown()
    except Exception as error:  # whatever OpenTelemetry and its plug-ins raise
        given = ", ".join(variables) or "no variables of its own"
        raise StartError(f"OpenTelemetry cannot be set up, with {given}: {error}") from error


async def send_last_spans() -> None:
    """Send the spans that still wait, if the collector takes them in time."""
    provider = BentoMLContainer.tracer_provider.get()
    with suppress(TimeoutError):
        await asyncio.wait_for(asyncio.to_thread(provider.force_flush), SPANS_SECONDS)
