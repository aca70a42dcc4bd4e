"""The version of a model file, by its bytes."""

import hashlib
from collections.abc import Iterator

METADATA = 14  # the number of the field metadata_props in ONNX's ModelProto
BYTES = 2  # the wire type of a field whose length precedes it


def version(content: bytes) -> str:
    """Return twelve hex digits that change with a model file's graph and weights, not its metadata.

    `export` puts them into the metadata. The bytes are read without the package onnx, which the service
    does not need otherwise: https://protobuf.dev/programming-guides/encoding/
    """
    digest = hashlib.sha256()
    for field in _without_metadata(memoryview(content)):
        digest.update(field)
    return digest.hexdigest()[:12]


def _without_metadata(content: memoryview) -> Iterator[memoryview]:
    end = 0
    while end < len(content):
        begin = end
        tag, end = _number(content, begin)
        value, end = _number(content, end)  # of a ModelProto's field: a number or a length
        if tag & 7 == BYTES:
            end += value
        if tag >> 3 != METADATA:
            yield content[begin:end]


def _number(content: memoryview, at: int) -> tuple[int, int]:
    """Return a number of variable length (varint), and where it ends."""
    number = shift = 0
    while content[at] & 0x80:
        number |= (content[at] & 0x7F) << shift
        shift += 7
        at += 1
    return number | content[at] << shift, at + 1
