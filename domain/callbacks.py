"""Celery callbacks: the message that continues a Celery task when its job has ended (docs/celery.md).

A client can have only one kind of task run, its own `celeriac.celery.generate`, in queues that the installation allows.
What that task carries (chain, group, chord, links) is read by the client's own workers alone.
"""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import orjson
from pydantic import Field, TypeAdapter, model_validator

from domain.jobs import Frozen

TASK_NAME = "celeriac.celery.generate"
URL_PREFIX = "celery://"  # of a callback among the deliveries; the queue follows
MAX_CALLBACK_BYTES = 65_536


class CeleryCallback(Frozen):
    """A message in Celery's protocol 2, without what the sender fills in.

    https://docs.celeryq.dev/en/stable/internals/protocol.html
    """

    queue: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.@-]{0,127}$", description="The queue of the task's workers.")
    headers: dict[str, Any] = Field(max_length=40, description="The task's headers, `id` above all.")
    kwargs: dict[str, Any] = Field(default_factory=dict, max_length=8)
    embed: dict[str, Any] = Field(default_factory=dict, max_length=4, description="callbacks, errbacks, chain, chord")
    reply_to: str | None = Field(default=None, max_length=255)
    priority: int | None = Field(default=None, ge=0, le=255)

    @model_validator(mode="after")
    def _bounded(self) -> "CeleryCallback":
        if not isinstance(self.headers.get("id"), str):
            raise ValueError("headers has no id; send the id of the task")
        if (size := len(orjson.dumps(self.model_dump()))) > MAX_CALLBACK_BYTES:
            raise ValueError(
                f"it has {size} bytes, the maximum is {MAX_CALLBACK_BYTES}; shorten the chain or its arguments"
            )
        return self

    @property
    def task_id(self) -> str:
        return str(self.headers["id"])

    def message(self, job_id: str) -> tuple[list[Any], dict[str, Any]]:
        """The body and the headers to publish."""
        body = [
            [],
            self.kwargs | {"job_id": job_id},
            {"callbacks": None, "errbacks": None, "chain": None, "chord": None} | self.embed,
        ]
        return body, self.headers | {
            "task": TASK_NAME,
            "lang": "py",
            "argsrepr": "()",
            "kwargsrepr": f"{{'job_id': {job_id!r}}}",
        }


CALLBACK = TypeAdapter(CeleryCallback)


def refusal_of_queue(queue: str, allowed: Sequence[str]) -> str | None:
    """Why callbacks may not be sent to this queue; None if they may. Our own queues are never allowed."""
    if queue.startswith(("celeriac.", "unacked")) or not any(fnmatchcase(queue, pattern) for pattern in allowed):
        return f"queue is {queue!r}, but callbacks are sent only to: {', '.join(allowed)}; see CELERIAC_CALLBACK_QUEUES"
    return None
