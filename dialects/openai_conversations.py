"""Conversations: bodies, views, and what the items of a conversation are as messages."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Final, Literal, cast
from uuid import UUID

import orjson
from pydantic import Field, TypeAdapter, ValidationError

from dialects.fields import HINT_TREE, HintTree
from dialects.openai import Metadata, OpenAIModel
from dialects.openai_response_items import InputItem, listed_items, messages_of, with_summaries
from dialects.openai_response_objects import InputItemListView, ResponseView
from dialects.openai_response_requests import ResponseBody
from dialects.openai_views import View
from domain.errors import InvalidRequest
from domain.jobs import external_id
from storage.conversations import Conversation

MAX_ITEMS_AT_ONCE = 20  # as in OpenAI's API

Items = Annotated[list[InputItem], Field(max_length=MAX_ITEMS_AT_ONCE)]

#: Harmless fields are those of the same items in the input of a response.
CONVERSATION_HINTS: Final[HintTree] = {"items": HINT_TREE["input"]}

_ITEMS: TypeAdapter[list[InputItem]] = TypeAdapter(list[InputItem])


class NewConversationBody(OpenAIModel):
    items: Items | None = None
    metadata: Metadata | None = None


class ConversationMetadataBody(OpenAIModel):
    metadata: Metadata | None


class NewItemsBody(OpenAIModel):
    items: Annotated[list[InputItem], Field(min_length=1, max_length=MAX_ITEMS_AT_ONCE)]


class ConversationView(View):
    id: str
    object: Literal["conversation"]
    created_at: Annotated[int, Field(description="Seconds since 1970.")]
    metadata: dict[str, str]


class DeletedConversationView(View):
    id: str
    object: Literal["conversation.deleted"]
    deleted: bool


def conversation_view(conversation: Conversation) -> ConversationView:
    return {
        "id": external_id(conversation.id, "conv"),
        "object": "conversation",
        "created_at": int(conversation.created_at.timestamp()),
        "metadata": conversation.conversation_metadata,
    }


def whole_list(items: Sequence[Mapping[str, Any]]) -> InputItemListView:
    """A page that has all of `items`, at least one."""
    page = {"object": "list", "data": items, "first_id": items[0]["id"], "last_id": items[-1]["id"], "has_more": False}
    return cast(InputItemListView, page)


def context_of(items: Iterable[Mapping[str, Any]], key: bytes) -> list[dict[str, Any]]:
    """The messages of stored items, as the beginning of a prompt. Raises InvalidRequest for a compaction that `key`
    does not open, and for an item that cannot be read."""
    stored = list(items)
    try:
        valid = _ITEMS.validate_python(stored)
    except ValidationError as exc:
        number = next(step for step in exc.errors(include_url=False)[0]["loc"] if isinstance(step, int))
        raise InvalidRequest(
            f"the item {stored[number]['id']!r} of the conversation cannot be read; delete it", param="conversation"
        ) from None
    return messages_of(with_summaries(valid, key, place="conversation.items"), instructions=None, context=())


def readable(items: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those of the items that can be stored and read back."""
    return [item for item in items if _is_readable(item)]


def _is_readable(item: dict[str, Any]) -> bool:
    try:
        orjson.dumps(item)
        _ITEMS.validate_python([item])
    except (TypeError, ValueError):
        return False
    return True


def items_of_turn(job_id: UUID, body: ResponseBody, response: ResponseView) -> list[dict[str, Any]]:
    """What a response that has ended adds to its conversation: its input and its output, or nothing unless it is
    completed or incomplete. Logprobs are not kept."""
    if response["status"] not in ("completed", "incomplete"):
        return []
    return [*listed_items(job_id, body.input), *(_without_logprobs(item) for item in response["output"])]


def _without_logprobs(item: Mapping[str, Any]) -> dict[str, Any]:
    if item["type"] != "message":
        return dict(item)
    parts = [{name: value for name, value in part.items() if name != "logprobs"} for part in item["content"]]
    return {**item, "content": parts}
