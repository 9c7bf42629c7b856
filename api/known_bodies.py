"""Bodies whose answers are known: who sends the same bytes again is not read again.

Only what the response cache has answered is kept, and that for ten minutes at most, as in tasks/known_requests.py. A
tenant finds its own bodies only. What a body means depends on the model's files as well, and on which model is the
default: of these, it is known how they were.
"""

import asyncio
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, Generic, TypeVar
from uuid import UUID

from pydantic import BaseModel

from dialects.bodies import Model
from tasks.known_requests import KEEP_SECONDS
from text.models import ModelView

Translated = TypeVar("Translated")

MAX_BODIES = 256

MAX_BYTES = 4_096  # of a body, which takes up to 25 times that when it is read; so they take 25 megabytes at most

Key = tuple[UUID, type[BaseModel], str | None, bytes]  # the tenant, the kind of body, the default model, the body


@dataclass(frozen=True, slots=True)
class ReadBody(Generic[Model, Translated]):
    """A body and what it asks for, one generation or several, from the model as `view` shows it."""

    key: Key
    body: Model
    generation: Translated
    view: ModelView
    ignored: tuple[str, ...]  # the fields that the answer names as ignored


class KnownBodies:
    """Bound to one event loop."""

    def __init__(self) -> None:
        self._read: OrderedDict[Key, ReadBody[Any, Any]] = OrderedDict()

    def find(self, key: Key) -> ReadBody[Any, Any] | None:
        found = self._read.get(key) if len(key[-1]) <= MAX_BYTES else None  # hashing takes time by length
        if found is not None:
            self._read.move_to_end(key)
        return found

    def note(self, read: ReadBody[Any, Any]) -> None:
        """Its answer was known. Not if the body is long."""
        if len(read.key[-1]) > MAX_BYTES:
            return
        if not self._read:
            asyncio.get_running_loop().call_later(KEEP_SECONDS, self._read.clear)
        self._read[read.key] = read
        if len(self._read) > MAX_BODIES:
            self._read.popitem(last=False)
