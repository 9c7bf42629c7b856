"""The token ids of prompts whose answers are known: who asks the same again is not tokenized again.

Only what the response cache has answered is kept, so that requests of which each is new neither pay for this nor push
anything out. A tenant finds its own prompts only, or else it could tell by the time what others have asked.
"""

from collections import OrderedDict
from collections.abc import Sequence
from uuid import UUID
from weakref import WeakKeyDictionary

from text.models import ModelView

MAX_PROMPTS = 256  # of a model

MAX_TOKENS = 2_048  # of a prompt; so a model takes some twenty megabytes at most


class KnownPrompts:
    """Bound to one event loop. Forgets a model's prompts when the model is loaded anew."""

    def __init__(self) -> None:
        self._by_view: WeakKeyDictionary[ModelView, OrderedDict[tuple[UUID, bytes], list[int]]] = WeakKeyDictionary()

    def find(self, view: ModelView, tenant_id: UUID, request_hash: bytes) -> list[int] | None:
        prompts = self._by_view.get(view)
        found = None if prompts is None else prompts.get((tenant_id, request_hash))
        if prompts is not None and found is not None:
            prompts.move_to_end((tenant_id, request_hash))
        return found

    def note(self, view: ModelView, tenant_id: UUID, request_hash: bytes, token_ids: Sequence[int]) -> None:
        """Not if the prompt is long, or if the model's chat template may write the date into it."""
        if len(token_ids) > MAX_TOKENS or not view.template_ignores("strftime_now"):
            return
        prompts = self._by_view.setdefault(view, OrderedDict())
        prompts.setdefault((tenant_id, request_hash), list(token_ids))
        if len(prompts) > MAX_PROMPTS:
            prompts.popitem(last=False)
