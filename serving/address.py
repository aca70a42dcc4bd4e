"""The address that `bentoml serve` is to listen on, looked at before BentoML takes it.

BentoML would end with a traceback, and only after it has begun to start.
"""

import errno
import socket

import click

from serving.errors import StartError

REASONS = {
    errno.EADDRINUSE: "something else listens there; stop it, or choose another port",
    errno.EADDRNOTAVAIL: "this machine has no such address",
    errno.EACCES: "only root may, on most machines; choose a port from 1024 on",
}


def check_address() -> None:
    """Look whether the address that the command line names can be listened on.

    Raises:
        StartError: it cannot, and why.
    """
    context = click.get_current_context(silent=True)  # of `bentoml serve`, its environment included
    options = context.params if context else {}
    host, port = options.get("host"), options.get("port")
    if host is None or port is None:
        return  # BentoML's configuration has the rest
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.create_server((host, port), family=family).close()
    except (OSError, OverflowError) as error:
        reason = REASONS.get(getattr(error, "errno", 0), str(error))
        raise StartError(f"The service cannot listen on {host}, port {port}: {reason}") from None
