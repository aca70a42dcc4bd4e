"""What those errors have in common that are the user's to mend."""

from pydantic import ValidationError


class ExplainedError(Exception):
    """Its message says what is wrong and what would be right; a command line prints no more."""


def first_of(error: ValidationError) -> str:
    """The first thing that is wrong: where, and what."""
    first = error.errors(include_input=False)[0]
    place = ".".join(map(str, first["loc"]))
    return f"{place}: {first['msg'].removeprefix('Value error, ')}"
