"""Requests whose answers are known: who asks the same again is neither tokenized nor checked again.

Only what the response cache has answered is kept, and that for ten minutes at most, so that requests of which each is
new neither pay for this nor push anything out. A tenant finds its own requests only, or else it could tell by the time
what others have asked, and pushes out nothing of a tenant that has asked less.
"""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple
from uuid import UUID
from weakref import WeakKeyDictionary, WeakValueDictionary, ref

from domain.job_options import JobOptions
from domain.requests import GenerationRequest, JobRequest
from domain.shares import SharedMemory
from storage.job_accept import NewJob, written_once
from tasks.prepare import PreparedRequest
from text.models import ModelView

KEEP_SECONDS = 600.0  # then all are forgotten, since what a user has asked may have been erased

MAX_REQUESTS = 256  # of a model

MAX_TOKENS = 2_048  # of a prompt

MAX_BYTES = 16_384  # of a request as JSON; so a model takes some thirty megabytes at most


class ReadyRequest(NamedTuple):
    """What was made of a request."""

    prepared: PreparedRequest
    fingerprint: bytes | None
    answer_key: bytes | None

    @property
    def is_same_again(self) -> bool:
        """Whether nothing was drawn for it that matters: to a greedy request, the seed does not."""
        request = self.prepared.request
        return isinstance(request, GenerationRequest) and request.params.temperature == 0


class ReadyJob(NamedTuple):
    """A job to be committed, and what it was made of."""

    new_job: NewJob
    request: JobRequest  # as it was asked for
    view: ModelView  # that it was prepared by


class AskedAgain(NamedTuple):
    """What is known of a request that is the very object that was answered before, with the same options."""

    request: "ref[JobRequest]"
    options: JobOptions
    view: ModelView
    asked: bytes
    ready: ReadyRequest
    written: bytes


Asked = tuple[bytes, bool | None]  # the request's hash, and what it says of the cache


class KnownRequests:
    """Bound to one event loop. Forgets a model's requests when the model is loaded anew, or its entry has changed."""

    def __init__(self) -> None:
        self._by_view: WeakKeyDictionary[ModelView, SharedMemory[Asked, ReadyRequest]] = WeakKeyDictionary()
        self._met: WeakValueDictionary[int, JobRequest] = WeakValueDictionary()  # by their ids
        self._again: dict[int, AskedAgain] = {}  # by the ids of requests, as long as api/known_bodies.py has them

    def find(self, view: ModelView, tenant_id: UUID, asked: Asked) -> ReadyRequest | None:
        known = self._by_view.get(view)
        return None if known is None else known.find(tenant_id, asked)

    def find_again(self, view: ModelView, request: JobRequest, options: JobOptions) -> AskedAgain | None:
        """Without the request's hash, whose making takes longer than all that follows."""
        again = self._again.get(id(request))
        if again is None or again.request() is not request or again.view is not view:
            return None
        return again if again.options == _without_key(options) else None

    def note(self, job: ReadyJob, options: JobOptions) -> None:
        """Its answer was known. Not if the request is long, or if the model's chat template may write the date into its
        prompt."""
        new_job, request, view = job
        if self.find_again(view, request, options) is not None:
            return
        known = self._by_view.get(view)
        if known is None:
            known = self._by_view[view] = SharedMemory(MAX_REQUESTS)
        asked = new_job.request_hash, options.use_cache
        ready = known.find(new_job.tenant_id, asked)
        if ready is None:
            if not _is_worth_keeping(view, new_job):
                return
            if not known:
                asyncio.get_running_loop().call_later(KEEP_SECONDS, known.clear)
            ready = _ready_as(new_job)
            known.keep(new_job.tenant_id, asked, ready)
        if self._met.get(id(request)) is not request:  # its body may not be remembered: then it never comes again
            self._met[id(request)] = request
        elif ready.is_same_again:
            gone = ref(request, _forgetting(self._again, id(request)))
            written = written_once(new_job)
            self._again[id(request)] = AskedAgain(
                gone, _without_key(options), view, new_job.request_hash, ready, written
            )


def _forgetting(again: dict[int, AskedAgain], name: int) -> Callable[["ref[JobRequest]"], None]:
    return lambda gone: _forget(again, name, gone)


def _forget(again: dict[int, AskedAgain], name: int, gone: "ref[JobRequest]") -> None:
    """Unless the request was noted again meanwhile."""
    if name in again and again[name].request is gone:
        del again[name]


def _without_key(options: JobOptions) -> JobOptions:
    return options if options.idempotency_key is None else replace(options, idempotency_key=None)


def _ready_as(job: NewJob) -> ReadyRequest:
    prepared = PreparedRequest(job.request, list(job.prompt_token_ids), None, job.max_tokens, job.seed)
    return ReadyRequest(prepared, job.fingerprint, job.answer_key)


def _is_worth_keeping(view: ModelView, job: NewJob) -> bool:
    if len(job.prompt_token_ids) > MAX_TOKENS or not view.template_ignores("strftime_now"):
        return False
    return len(job.request.model_dump_json()) <= MAX_BYTES
