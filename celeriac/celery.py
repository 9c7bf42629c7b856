"""Generation as a Celery task of your own application: `generate.delay(...)`, chains, groups, chords and links.

```python
from celeriac.celery import generate

app.conf.celeriac_url = "http://127.0.0.1:8000"

generate.delay("Once upon a time", max_tokens=50).get(timeout=60)
chain(fetch.s(url), generate.s(max_tokens=200), store.s()).delay()
```

A worker of yours runs the task twice, for milliseconds each time: once to submit the job, and once when it has ended,
to return its text. In between no worker slot is taken. How the second time comes about:

- With `app.conf.celeriac_callbacks = True`, Celeriac sends the task's message again. It is kept with the job in SQL
  until the broker has it, so it survives whatever is killed meanwhile. Celeriac needs the URL of your broker.
- By default, the task comes back by itself to look, after a second at first and later every few seconds. It needs
  nothing but HTTP.

The task's id is the job's idempotency key, so a task that is delivered twice is still one job.
"""

import atexit
import os
from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime
from typing import Any, NoReturn

from celery import Task, shared_task
from celery.backends.base import BaseBackend
from celery.exceptions import Ignore
from celery.result import AsyncResult
from celery.signals import task_revoked

from celeriac.client import ApiError, ApiUnreachable, Client, ClientError, JobSnapshot, QueueUpdate

TASK_NAME = "celeriac.celery.generate"  # not that of our own tasks, which workers may see on a shared broker
TASK_ID = "celery_task_id"  # in the job's metadata
POLL_SECONDS = (1.0, 1.0, 2.0, 3.0, 5.0)  # between two looks; the last one is repeated

STATE_BY_STATUS = {
    "queued": "PENDING",
    "in_progress": "STARTED",
    "completed": "SUCCESS",
    "failed": "FAILURE",
    "expired": "FAILURE",
    "cancelled": "REVOKED",
}

#: What a message of the task says to its worker, besides its arguments.
HEADERS = (
    "expires",
    "group",
    "group_index",
    "id",
    "ignore_result",
    "origin",
    "parent_id",
    "replaced_task_nesting",
    "retries",
    "root_id",
    "shadow",
    "stamped_headers",
    "stamps",
    "timelimit",
)
EMBEDDED = ("callbacks", "errbacks", "chain", "chord")

_clients: dict[tuple[int, str | None, str | None], Client] = {}


class GenerationError(Exception):
    """The job was refused, or did not complete. `args`: the message, the code, and the job's id if there is one."""

    def __init__(self, message: str, code: str = "", job_id: str | None = None) -> None:
        super().__init__(message, code, job_id)
        self.code = code
        self.job_id = job_id

    def __str__(self) -> str:
        return str(self.args[0])


class GenerationTaskResult(AsyncResult):
    """An AsyncResult whose `revoke` also cancels the job."""

    def revoke(self, *args: Any, **options: Any) -> None:
        cancel(self.app, self.id)
        super().revoke(*args, **options)


class Generation(Task):
    """The class of `generate`. Priorities are Celery's: for Redis, 0 is the highest; for RabbitMQ, the lowest."""

    abstract = True

    def AsyncResult(self, task_id: str, **options: Any) -> GenerationTaskResult:
        return GenerationTaskResult(
            task_id, app=self._get_app(), task_name=self.name, **{"backend": self.backend} | options
        )

    def apply_async(self, *args: Any, **options: Any) -> Any:
        result = super().apply_async(*args, **options)
        return self.AsyncResult(result.id) if type(result) is AsyncResult else result


@shared_task(bind=True, base=Generation, name=TASK_NAME, acks_late=True)
def generate(self: Any, prompt: Any = None, *, job_id: str | None = None, output: str = "text", **fields: Any) -> Any:
    """Generate text. `prompt` is a text to continue or the messages of a chat; in a chain, what the task before
    returned. Other arguments are those of `Client.submit`.

    Returns the text, or a list of texts if there are several choices; with `output="job"` the whole job as a dict.
    Raises GenerationError. `job_id` is set by the task itself when it comes back.
    """
    client = client_of(self.app)
    if self.request.called_directly or self.request.is_eager:
        return value_of(client.wait(client.submit(prompt, **fields).id), output)
    try:
        if job_id is None:
            fields = fields | {"metadata": {**(fields.get("metadata") or {}), TASK_ID: self.request.id}}
            fields.setdefault("priority", priority_of(self))
            fields.setdefault("deadline", deadline_of(self.request.expires))
            fields["celery"] = callback_of(self, output) if uses_callbacks(self.app) else None
            job = client.submit(prompt, idempotency_key=f"celery-{self.request.id}", **fields)
            if fields["celery"] is not None:  # the task goes on when that arrives, even if the job has ended already
                leave(self, job)
        else:
            job = client.get(job_id)
    except ClientError as exc:
        if isinstance(exc, ApiUnreachable) or exc.is_passing:
            come_back(self, self.request.args, self.request.kwargs)
        raise GenerationError(str(exc), getattr(exc, "code", ""), job_id) from None
    if not job.has_ended:
        self.update_state(state="STARTED" if job.status == "in_progress" else "QUEUED", meta=place_of(job))
        come_back(self, (), {"job_id": job.id, "output": output})
    return value_of(job, output)


def client_of(app: Any) -> Client:
    """The client of this process. `app.conf.celeriac_url` and `celeriac_key`, else the environment's, name the API.

    It has no patience: while the API is away, a task comes back later rather than wait in a worker's slot.
    """
    key = (os.getpid(), app.conf.get("celeriac_url"), app.conf.get("celeriac_key"))
    if key not in _clients:
        _clients[key] = client = Client(key[1], key[2], patience_seconds=0)
        atexit.register(client.close)
    return _clients[key]


def uses_callbacks(app: Any) -> bool:
    return bool(app.conf.get("celeriac_callbacks"))


def value_of(job: JobSnapshot, output: str) -> Any:
    """What the task returns. Raises GenerationError."""
    if job.status != "completed":
        error: Mapping[str, Any] = job.error or {}
        raise GenerationError(
            error.get("message") or f"{job.id} is {job.status}", error.get("code") or job.status, job.id
        )
    if output == "job":
        return dict(job.raw)
    return job.text if len(job.texts) < 2 else list(job.texts)


def place_of(job: JobSnapshot) -> dict[str, Any]:
    """What `AsyncResult.info` shows until the result is there."""
    return {"job_id": job.id, **asdict(QueueUpdate.of(job))}


def priority_of(task: Any) -> int:
    """The job's priority, in which higher is earlier: for Redis a message's priority counts down from 0."""
    priority = (task.request.delivery_info or {}).get("priority") or 0
    is_redis = task.app.connection_for_read().transport.driver_type == "redis"
    return max(-10, min(10, -priority if is_redis else priority))


def deadline_of(expires: datetime | str | None) -> str | None:
    return expires.isoformat() if isinstance(expires, datetime) else expires


def come_back(task: Any, args: Any, kwargs: Any) -> NoReturn:
    """Have the same message delivered again in a while, and leave this slot. The task's state stays as it is."""
    num_looks = task.request.retries
    seconds = POLL_SECONDS[min(num_looks, len(POLL_SECONDS) - 1)]
    task.signature_from_request(task.request, args, kwargs, countdown=seconds, retries=num_looks + 1).apply_async()
    raise Ignore


def leave(task: Any, job: JobSnapshot) -> NoReturn:
    """Leave this slot until Celeriac sends the task's message again."""
    task.update_state(state="QUEUED", meta=place_of(job))
    raise Ignore


def callback_of(task: Any, output: str) -> dict[str, Any]:
    """The message that continues this task, for `celery` of a job."""
    request = task.request
    headers = {name: request.get(name) for name in HEADERS}
    delivery = request.delivery_info or {}
    return {
        "queue": delivery.get("routing_key"),
        "headers": {name: value for name, value in headers.items() if value is not None},
        "kwargs": {"output": output},
        "embed": {name: request.get(name) for name in EMBEDDED},
        "reply_to": request.reply_to,
        "priority": delivery.get("priority"),
    }


def job_of(app: Any, task_id: str) -> JobSnapshot | None:
    """The job of a task; None if it has not been submitted."""
    page = client_of(app).jobs(limit=1, **{f"metadata[{TASK_ID}]": task_id})
    return next(iter(page), None)


def cancel(app: Any, task_id: str) -> None:
    job = job_of(app, task_id)
    if job is not None and not job.has_ended:
        client_of(app).cancel(job.id)


@task_revoked.connect(weak=False)
def _cancel_revoked(sender: Any = None, request: Any = None, **_: Any) -> None:
    """A worker has dropped the task's message, since it was revoked or has expired."""
    if getattr(sender, "name", None) == TASK_NAME and request is not None:
        try:
            cancel(sender.app, request.id)
        except (ApiError, ApiUnreachable):
            pass  # the job ends by itself


class CeleriacBackend(BaseBackend):
    """A result backend that reads the job table: `result_backend = "celeriac+http://127.0.0.1:8000"`.

    For applications without a backend of their own, and for `generate` only: it stores no other task's result, and
    chords need a backend that can.
    """

    def __init__(self, app: Any, url: str | None = None, **options: Any) -> None:
        super().__init__(app, url=url, **options)
        if url and app.conf.get("celeriac_url") is None:
            app.conf.celeriac_url = url

    def _get_task_meta_for(self, task_id: str) -> dict[str, Any]:
        job = job_of(self.app, task_id)
        if job is None:
            return {"status": "PENDING", "result": None}
        if not job.has_ended:
            return {"status": STATE_BY_STATUS[job.status], "result": place_of(job)}
        job = client_of(self.app).get(job.id)  # with its output, which lists leave out
        meta: dict[str, Any] = {"status": STATE_BY_STATUS[job.status], "task_id": task_id, "children": []}
        try:
            return meta | {"result": value_of(job, "text")}
        except GenerationError as exc:
            return meta | {"result": exc, "traceback": None}

    def _store_result(self, *_: Any, **__: Any) -> None:
        """The job table has it."""

    def _forget(self, task_id: str) -> None:
        """Jobs are deleted by the API, or when their time is up."""
