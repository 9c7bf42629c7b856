"""Bodies whose answers are known: who sends the same bytes again is not read again.

Only what the response cache has answered is kept, and that for ten minutes at most, as in tasks/known_requests.py. A
tenant finds its own bodies only, and pushes out none of a tenant that has fewer. What a body means depends on the
model's files as well, and on which model is the default: of these, it is known how they were.
"""

import asyncio
from dataclasses import dataclass, replace
from typing import Any, Generic, NamedTuple, TypeVar
from uuid import UUID

from pydantic import BaseModel

from dialects.bodies import Model
from domain.shares import SharedMemory
from tasks.known_requests import KEEP_SECONDS
from text.models import ModelView

Translated = TypeVar("Translated")

MAX_BODIES = 256

MAX_BYTES = 4_096  # of a body, which takes up to 25 times that when it is read; so they take 25 megabytes at most


class Key(NamedTuple):
    kind: type[BaseModel]
    default_model: str | None
    content: bytes


@dataclass(frozen=True, slots=True)
class ReadBody(Generic[Model, Translated]):
    """A body and what it asks for, one generation or several, from the model as `view` shows it."""

    tenant_id: UUID
    key: Key
    body: Model
    generation: Translated
    view: ModelView
    ignored: tuple[str, ...]  # the fields that the answer names as ignored
    is_known: bool = False


class KnownBodies:
    """Bound to one event loop."""

    def __init__(self) -> None:
        self._read: SharedMemory[Key, ReadBody[Any, Any]] = SharedMemory(MAX_BODIES)

    def find(self, tenant_id: UUID, key: Key) -> ReadBody[Any, Any] | None:
        return (
            self._read.find(tenant_id, key) if len(key.content) <= MAX_BYTES else None
        )  # hashing takes time by length

    def note(self, read: ReadBody[Any, Any]) -> None:
        """Its answer was known. Not if the body is long."""
        if read.is_known or len(read.key.content) > MAX_BYTES:
            return
        if not self._read:
            asyncio.get_running_loop().call_later(KEEP_SECONDS, self._read.clear)
        self._read.keep(read.tenant_id, read.key, replace(read, is_known=True))
