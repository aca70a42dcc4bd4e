"""The base class of errors that the user can fix, and the text of a validation error in them."""

from pydantic import ValidationError


class ExplainedError(Exception):
    """An error whose message says what is wrong and how to fix it; commands print only that."""


def first_of(error: ValidationError) -> str:
    """The first problem of a validation error, as ``place: what is wrong``."""
    first = error.errors(include_input=False)[0]
    place = ".".join(map(str, first["loc"]))
    return f"{place}: {first['msg'].removeprefix('Value error, ')}"
