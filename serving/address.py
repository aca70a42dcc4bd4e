"""Check that `bentoml serve` can listen on its address, before BentoML tries to.

BentoML itself would fail with a traceback, and only once it has begun to start.
"""

import errno
import socket

import click
from bentoml._internal.configuration.containers import BentoMLContainer

from serving.errors import StartError

REASONS = {
    errno.EADDRINUSE: "something else listens there; stop it, or choose another port",
    errno.EADDRNOTAVAIL: "this machine has no such address",
    errno.EACCES: "only root may, on most machines; choose a port from 1024 on",
}


def check_address() -> None:
    """Raise `StartError`, with the reason, if the service cannot listen where `bentoml serve` says."""
    context = click.get_current_context(silent=True)  # of `bentoml serve`, with its environment
    if context is None:
        return
    defaults = BentoMLContainer.http
    host = context.params.get("host") or defaults.host.get()
    port = context.params.get("port") or defaults.port.get()
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.create_server((host, port), family=family).close()
    except (OSError, OverflowError) as error:
        reason = REASONS.get(getattr(error, "errno", 0), str(error))
        raise StartError(f"The service cannot listen on {host}, port {port}: {reason}") from None
