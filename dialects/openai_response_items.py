"""The items of a response's input and of a conversation: as clients send them, as prompts and as lists."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal
from uuid import UUID

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, StringConstraints, Tag

from dialects.openai import MAX_PARTS, OpenAIModel, refuse
from domain.errors import InvalidRequest
from domain.jobs import external_id
from domain.requests import MAX_MESSAGES, MAX_PROMPT_CHARS
from domain.seals import opened
from domain.structured_output import MAX_ARGUMENT_CHARS, ToolName

PART_TYPES = ("input_text", "output_text", "text", "refusal")

Text = Annotated[str, StringConstraints(max_length=MAX_PROMPT_CHARS)]

ItemId = Annotated[str, StringConstraints(max_length=128)]

_USABLE_ID = re.compile(r"[A-Za-z0-9_-]{1,128}")

ItemStatus = Literal["in_progress", "completed", "incomplete"]

Phase = Literal["commentary", "final_answer"]


def _text_only(kind: str) -> str:
    if kind not in PART_TYPES:
        raise refuse(f"is {kind[:40]!r}; only text is supported")
    return kind


class ResponseContentPart(OpenAIModel):
    """A part as clients send it. It may come from an earlier answer, with fields that are not part of the prompt."""

    type: Annotated[str, AfterValidator(_text_only)]
    text: Text | None = None
    refusal: Text | None = None
    annotations: list[dict[str, Any]] | None = None
    logprobs: list[Any] | None = None


ResponseContent = Annotated[
    Annotated[Text, Tag("<text>")] | Annotated[list[ResponseContentPart], Field(max_length=MAX_PARTS), Tag("<parts>")],
    Discriminator(lambda value: "<text>" if isinstance(value, str) else "<parts>"),
]


class MessageItem(OpenAIModel):
    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: ResponseContent
    id: ItemId | None = None
    status: ItemStatus | None = None
    phase: Phase | None = None


class FunctionCallItem(OpenAIModel):
    type: Literal["function_call"]
    call_id: ItemId
    name: ToolName
    arguments: Annotated[str, StringConstraints(max_length=MAX_ARGUMENT_CHARS)]
    id: ItemId | None = None
    status: ItemStatus | None = None


class FunctionCallOutputItem(OpenAIModel):
    type: Literal["function_call_output"]
    call_id: ItemId
    name: str | None = None  # of the function, which is also in its call
    output: ResponseContent
    id: ItemId | None = None
    status: ItemStatus | None = None


class SummaryPart(OpenAIModel):
    type: Literal["summary_text"]
    text: Text


class ThoughtPart(OpenAIModel):
    type: Literal["reasoning_text"]
    text: Text


class ReasoningItem(OpenAIModel):
    """An item from an earlier answer. Models do not read their earlier reasoning, so it is left out of the prompt."""

    type: Literal["reasoning"]
    summary: Annotated[list[SummaryPart], Field(max_length=MAX_PARTS)] | None = None
    content: Annotated[list[ThoughtPart], Field(max_length=MAX_PARTS)] | None = None
    id: ItemId | None = None
    status: ItemStatus | None = None


class CompactionItem(OpenAIModel):
    """A summary that /v1/responses/compact has given. It must be opened before it is part of a prompt."""

    type: Literal["compaction"]
    encrypted_content: Annotated[
        str,
        StringConstraints(max_length=2 * MAX_PROMPT_CHARS),
        BeforeValidator(lambda sealed: _refuse_unsealed(sealed)),
    ] = Field(default="", validate_default=True)
    id: ItemId | None = None


class ItemReference(OpenAIModel):
    """An item of a stored response, by its id. It must be looked up before it is part of a prompt."""

    type: Literal["item_reference"] = "item_reference"
    id: ItemId


class UnknownItem(OpenAIModel):
    type: Annotated[Any, AfterValidator(lambda kind: _refuse_item(kind))]


def _refuse_item(kind: Any) -> None:
    if kind == "compaction_trigger":
        raise refuse("is 'compaction_trigger'; leave it out, and POST the input to /v1/responses/compact")
    raise refuse(f"is {str(kind)[:40]!r}; send items of type {', '.join(ITEM_TYPES)}")


def _refuse_unsealed(content: Any) -> Any:
    """What is not sealed has been left out before, since in other items it is something that has no effect."""
    if content == "":
        raise refuse("is not what /v1/responses/compact here has given you; send its items back unchanged")
    return content


ITEM_TYPES = ("message", "function_call", "function_call_output", "reasoning", "compaction")


def _item_tag(value: Any) -> str:
    kind = (value.get("type") or "message") if isinstance(value, dict) else getattr(value, "type", "message")
    return f"<{kind}>" if kind in ITEM_TYPES else "<unknown>"


_AnyItem = (
    Annotated[MessageItem, Tag("<message>")]
    | Annotated[FunctionCallItem, Tag("<function_call>")]
    | Annotated[FunctionCallOutputItem, Tag("<function_call_output>")]
    | Annotated[ReasoningItem, Tag("<reasoning>")]
    | Annotated[CompactionItem, Tag("<compaction>")]
    | Annotated[UnknownItem, Tag("<unknown>")]
)

InputItem = Annotated[_AnyItem, Discriminator(_item_tag)]


def _referable_tag(value: Any) -> str:
    """A reference needs no type, as in OpenAI's API: nothing else is an id alone."""
    if isinstance(value, dict):
        kind = value.get("type")
        is_reference = kind == "item_reference" or (kind is None and "id" in value and value.keys() <= {"id", "type"})
    else:
        is_reference = isinstance(value, ItemReference)
    return "<item_reference>" if is_reference else _item_tag(value)


ReferableItem = Annotated[Annotated[ItemReference, Tag("<item_reference>")] | _AnyItem, Discriminator(_referable_tag)]

ResponseInput = Annotated[
    Annotated[Text, StringConstraints(min_length=1), Tag("<text>")]
    | Annotated[list[ReferableItem], Field(min_length=1, max_length=4 * MAX_MESSAGES), Tag("<items>")],
    Discriminator(lambda value: "<text>" if isinstance(value, str) else "<items>"),
]


def messages_of(
    input_: ResponseInput, *, instructions: str | None, context: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Messages in the form of `domain.requests.ChatMessage`: the instructions, then `context` (the conversation so
    far), then the input."""
    messages = [dict(message) for message in context]
    if isinstance(input_, str):
        messages.append({"role": "user", "content": input_})
    else:
        for item in input_:
            _add_item(messages, item)
    return [{"role": "system", "content": instructions}, *messages] if instructions else messages


SUMMARISED = "The conversation so far has been summarised:\n\n"


def with_summaries(items: Sequence[ReferableItem], key: bytes, *, place: str) -> list[ReferableItem]:
    """The items, where each compaction is its summary in a user's message, which gives it no more weight than what any
    client may send. Raises InvalidRequest for one that was not sealed with this key; `place` is the items' name."""
    return [
        _summary_of(item, key, f"{place}.{number}") if isinstance(item, CompactionItem) else item
        for number, item in enumerate(items)
    ]


def _summary_of(item: CompactionItem, key: bytes, place: str) -> MessageItem:
    summary = opened(item.encrypted_content, key)
    if summary is None:
        raise InvalidRequest(
            f"{place}.encrypted_content is not what /v1/responses/compact here has given you; send its items back "
            "unchanged, or the conversation itself",
            param=f"{place}.encrypted_content",
        )
    return MessageItem(role="user", content=SUMMARISED + summary)


def add_output(messages: list[dict[str, Any]], items: Iterable[Mapping[str, Any]]) -> None:
    """Append the output items of an answer to the conversation that continues it."""
    for item in items:
        if item["type"] == "message":
            messages.append({"role": "assistant", "content": item["content"][0]["text"]})
        elif item["type"] == "function_call":
            _add_call(messages, item["call_id"], item["name"], item["arguments"])


def listed_items(seed: UUID, input_: str | Sequence[ReferableItem]) -> list[dict[str, Any]]:
    """The items as they are listed, each with an id: its own, if no other has it and paths can hold it, or one made of
    `seed`, which for the input of a response is the id of its job."""
    ulid = external_id(seed, "resp").removeprefix("resp_")
    items = [MessageItem(role="user", content=input_)] if isinstance(input_, str) else input_
    listed: list[dict[str, Any]] = []
    taken: set[str] = set()
    for number, item in enumerate(items):
        given = None if isinstance(item, UnknownItem) else item.id
        is_usable = given is not None and given not in taken and _USABLE_ID.fullmatch(given)
        listed.append(_listed(item if is_usable else item.model_copy(update={"id": None}), f"{ulid}_in{number}"))
        taken.add(listed[-1]["id"])
    return listed


def _add_item(messages: list[dict[str, Any]], item: ReferableItem) -> None:
    match item:
        case MessageItem():
            role = "system" if item.role == "developer" else item.role
            messages.append({"role": role, "content": text_of(item.content)})
        case FunctionCallItem():
            _add_call(messages, item.call_id, item.name, item.arguments)
        case CompactionItem():
            raise InvalidRequest("compaction items are not supported in a batch; send the conversation", param="input")
        case ItemReference():
            raise InvalidRequest("item references are not supported in a batch; send the items", param="input")
        case FunctionCallOutputItem():
            messages.append({"role": "tool", "tool_call_id": item.call_id, "content": text_of(item.output)})


def _add_call(messages: list[dict[str, Any]], call_id: str, name: str, arguments: str) -> None:
    """Add a call to the assistant message before it, or to a new one."""
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": ""})
    calls = (*(messages[-1].get("tool_calls") or ()), {"id": call_id, "name": name, "arguments": arguments})
    messages[-1]["tool_calls"] = calls


def text_of(content: ResponseContent) -> str:
    if isinstance(content, str):
        return content
    return "\n".join(part.text or part.refusal or "" for part in content)


_ID_PREFIXES = {
    "message": "msg",
    "function_call": "fc",
    "function_call_output": "fco",
    "reasoning": "rs",
    "compaction": "cmp",
}


def _listed(item: ReferableItem, suffix: str) -> dict[str, Any]:
    listed: dict[str, Any] = item.model_dump(mode="json", exclude_none=True)
    listed.setdefault("id", f"{_ID_PREFIXES[listed['type']]}_{suffix}")
    if isinstance(item, CompactionItem):
        return listed
    listed.setdefault("status", "completed")
    match item:
        case MessageItem():
            parts = (
                [ResponseContentPart(type="text", text=item.content)] if isinstance(item.content, str) else item.content
            )
            show = _said if item.role == "assistant" else _sent
            listed["content"] = [show(part) for part in parts]
        case FunctionCallOutputItem() if not isinstance(item.output, str):
            listed["output"] = [_sent(part) for part in item.output]
        case ReasoningItem():
            listed.setdefault("summary", [])
    return listed


def _said(part: ResponseContentPart) -> dict[str, Any]:
    """A part of an assistant's message. Its logprobs are left out, as they are not part of the input."""
    if part.type == "refusal":
        return {"type": "refusal", "refusal": text_of([part])}
    return {"type": "output_text", "text": text_of([part]), "annotations": part.annotations or []}


def _sent(part: ResponseContentPart) -> dict[str, Any]:
    return {"type": "input_text", "text": text_of([part])}
