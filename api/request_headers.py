"""Looks single headers of a request up.

Starlette's look-ups raise and catch an exception for each header that is not there, and a request is asked for a dozen.
"""

from starlette.types import Scope


def header_of(scope: Scope, name: bytes) -> str | None:
    """The first header of this name, in lower case; None if there is none."""
    for given, value in scope["headers"]:
        if given == name:
            text: str = value.decode("latin-1")
            return text
    return None
