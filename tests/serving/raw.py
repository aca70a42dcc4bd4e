"""HTTP over raw sockets, for what a client library would not do."""

import socket

PATIENCE = 60.0  # seconds that a test waits for what must come


def connected(url: str) -> socket.socket:
    """A connection to the server at `url`."""
    host, port = url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), PATIENCE)


def last(head: bytes) -> bytes:
    """The head of a request, changed to close the connection after it."""
    return head.replace(b"Host", b"Connection: close\r\nHost")


def post(path: str, length: int | None, media_type: str = "image/png") -> bytes:
    """The head of a POST whose body has `length` bytes or, without a length, is chunked."""
    of_body = "Transfer-Encoding: chunked" if length is None else f"Content-Length: {length}"
    return f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Type: {media_type}\r\n{of_body}\r\n\r\n".encode()
