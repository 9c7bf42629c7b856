"""Requests whose answers are known: who asks the same again is neither tokenized nor checked again.

Only what the response cache has answered is kept, and that for ten minutes at most, so that requests of which each is
new neither pay for this nor push anything out. A tenant finds its own requests only, or else it could tell by the time
what others have asked.
"""

import asyncio
from collections import OrderedDict
from typing import NamedTuple
from uuid import UUID
from weakref import WeakKeyDictionary

from domain.requests import GenerationRequest
from storage.job_accept import NewJob
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


Asked = tuple[UUID, bytes, bool | None]  # the tenant, the request's hash, and what it says of the cache


class KnownRequests:
    """Bound to one event loop. Forgets a model's requests when the model is loaded anew."""

    def __init__(self) -> None:
        self._by_view: WeakKeyDictionary[ModelView, OrderedDict[Asked, ReadyRequest]] = WeakKeyDictionary()

    def find(self, view: ModelView, asked: Asked) -> ReadyRequest | None:
        known = self._by_view.get(view)
        found = None if known is None else known.get(asked)
        if known is not None and found is not None:
            known.move_to_end(asked)
        return found

    def note(self, view: ModelView, asked: Asked, job: NewJob) -> None:
        """Not if the request is long, or if the model's chat template may write the date into its prompt."""
        known = self._by_view.setdefault(view, OrderedDict())
        if asked in known or not self._is_worth_keeping(view, job):
            return
        if not known:
            asyncio.get_running_loop().call_later(KEEP_SECONDS, known.clear)
        prepared = PreparedRequest(job.request, list(job.prompt_token_ids), None, job.max_tokens, job.seed)
        known[asked] = ReadyRequest(prepared, job.fingerprint, job.answer_key)
        if len(known) > MAX_REQUESTS:
            known.popitem(last=False)

    @staticmethod
    def _is_worth_keeping(view: ModelView, job: NewJob) -> bool:
        if len(job.prompt_token_ids) > MAX_TOKENS or not view.template_ignores("strftime_now"):
            return False
        return len(job.request.model_dump_json()) <= MAX_BYTES
