"""Celery messages built by hand: identical to what Celery would send, at a tenth of the cost.

A message only carries a job id; everything else about the job is in SQL. `tests/unit/test_messages.py` compares every
key with Celery's own messages at the pinned versions.

Redis keys (in the broker's database; `queue` is `ModelEntry.queue`)
| name                           | type    | lifetime                   | writer                  | reader      |
|--------------------------------|---------|----------------------------|-------------------------|-------------|
| {queue}, {queue}\\x06\\x16{step} | list    | until claimed              | dispatch, Celery        | GPU workers |
| {queue}:bell                   | list    | until the queue is empty   | dispatch, GPU workers   | GPU workers |
| /{db}.celery.pidbox            | channel | -                          | API, Celery, Flower     | all workers |
"""

import json
import os
import socket
from base64 import b64encode
from collections.abc import Sequence
from uuid import UUID, uuid4

from domain.jobs import external_id

GENERATE = "celeriac.generate"
PRIORITY_STEPS = (0, 3, 6, 9)  # one list per step and queue; 0 is served first
MAX_RINGS = 64  # more would only wake workers needlessly

_SEPARATOR = "\x06\x16"
_NO_ARGUMENTS: tuple[object, ...] = ((), {}, {"callbacks": None, "errbacks": None, "chain": None, "chord": None})
_BODY = b64encode(json.dumps(_NO_ARGUMENTS).encode()).decode()
_HOSTNAME = socket.gethostname()
_HEADERS: dict[str, object] = {
    "lang": "py",
    "task": GENERATE,
    "shadow": None,
    "eta": None,
    "expires": None,
    "group": None,
    "group_index": None,
    "retries": 0,
    "timelimit": [None, None],
    "parent_id": None,
    "argsrepr": "()",
    "kwargsrepr": "{}",
    "ignore_result": True,
    "replaced_task_nesting": 0,
    "stamped_headers": None,
    "stamps": {},
}


def bell_key(queue: str) -> str:
    """The list that wakes a waiting worker: one element per message, because a blocked pop takes one each."""
    return f"{queue}:bell"


def priority_key(queue: str, priority: int) -> str:
    """The list that holds the messages of this Celery priority, 0 (first) to 9."""
    step = max(step for step in PRIORITY_STEPS if step <= max(priority, 0))
    return f"{queue}{_SEPARATOR}{step}" if step else queue


def priority_keys(queue: str) -> list[str]:
    """All lists of one queue, in the order in which they are served."""
    return [priority_key(queue, step) for step in PRIORITY_STEPS]


def generate_message(job_id: UUID, queue: str, *, priority: int = 0) -> str:
    """The message of `generate` for this job, to be pushed to `priority_key(queue, priority)`."""
    task_id = external_id(job_id)
    headers = {**_HEADERS, "id": task_id, "root_id": task_id, "origin": f"gen{os.getpid()}@{_HOSTNAME}"}
    properties: dict[str, object] = {
        "correlation_id": task_id,
        "reply_to": "",
        "delivery_mode": 2,
        "delivery_info": {"exchange": "", "routing_key": queue},
        "priority": priority,
        "body_encoding": "base64",
        "delivery_tag": str(uuid4()),  # unique per message: the key under which kombu keeps unacked messages
    }
    return json.dumps(
        {
            "body": _BODY,
            "content-encoding": "utf-8",
            "content-type": "application/json",
            "headers": headers,
            "properties": properties,
        }
    )


def revoke_channel(database: int) -> str:
    """The channel of all workers' remote control. Pub/sub ignores databases, so the name has the database number."""
    return f"/{database}.celery.pidbox"


def revoke_message(job_ids: Sequence[UUID]) -> str:
    """The broadcast of `celery control revoke --terminate`, so that workers learn of cancellations at once. `is_stored`
    tells them that these are in SQL already."""
    task_ids = [external_id(job_id) for job_id in job_ids]
    command = {
        "method": "revoke",
        "arguments": {"task_id": task_ids, "terminate": True, "signal": "SIGTERM", "is_stored": True},
        "destination": None,
        "pattern": None,
        "matcher": None,
    }
    properties: dict[str, object] = {
        "delivery_mode": 2,
        "delivery_info": {"exchange": "celery.pidbox", "routing_key": ""},
        "priority": 0,
        "body_encoding": "base64",
        "delivery_tag": str(uuid4()),
    }
    return json.dumps(
        {
            "body": b64encode(json.dumps(command).encode()).decode(),
            "content-encoding": "utf-8",
            "content-type": "application/json",
            "headers": {"clock": 1, "expires": 0},
            "properties": properties,
        }
    )
