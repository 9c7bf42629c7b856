"""The input of a response: items as clients send them, as the messages of a prompt, and as they are listed."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from uuid import UUID

from api.openai.response_schemas import (
    FunctionCallItem,
    FunctionCallOutputItem,
    InputItem,
    MessageItem,
    ReasoningItem,
    ResponseContent,
    ResponseContentPart,
    ResponseInput,
)
from domain.ids import external_id


def messages_of(
    input_: ResponseInput, *, instructions: str | None, context: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Messages as `domain.requests.ChatMessage` takes them: the instructions, then `context`, the conversation so far,
    then the input."""
    messages = [dict(message) for message in context]
    if isinstance(input_, str):
        messages.append({"role": "user", "content": input_})
    else:
        for item in input_:
            _add_item(messages, item)
    return [{"role": "system", "content": instructions}, *messages] if instructions else messages


def add_output(messages: list[dict[str, Any]], items: Iterable[Mapping[str, Any]]) -> None:
    """The output items of an answer, as part of the conversation that goes on from it."""
    for item in items:
        if item["type"] == "message":
            messages.append({"role": "assistant", "content": item["content"][0]["text"]})
        elif item["type"] == "function_call":
            _add_call(messages, item["call_id"], item["name"], item["arguments"])


def listed_items(job_id: UUID, input_: ResponseInput) -> list[dict[str, Any]]:
    """Each with an id: its own, or one that stays the same."""
    ulid = external_id(job_id, "resp").removeprefix("resp_")
    items = [MessageItem(role="user", content=input_)] if isinstance(input_, str) else input_
    return [_listed(item, f"{ulid}_in{number}") for number, item in enumerate(items)]


def _add_item(messages: list[dict[str, Any]], item: InputItem) -> None:
    match item:
        case MessageItem():
            role = "system" if item.role == "developer" else item.role
            messages.append({"role": role, "content": text_of(item.content)})
        case FunctionCallItem():
            _add_call(messages, item.call_id, item.name, item.arguments)
        case FunctionCallOutputItem():
            messages.append({"role": "tool", "tool_call_id": item.call_id, "content": text_of(item.output)})


def _add_call(messages: list[dict[str, Any]], call_id: str, name: str, arguments: str) -> None:
    """Calls belong to the message of the assistant that they follow."""
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": ""})
    calls = (*(messages[-1].get("tool_calls") or ()), {"id": call_id, "name": name, "arguments": arguments})
    messages[-1]["tool_calls"] = calls


def text_of(content: ResponseContent) -> str:
    if isinstance(content, str):
        return content
    return "\n".join(part.text or part.refusal or "" for part in content)


_ID_PREFIXES = {"message": "msg", "function_call": "fc", "function_call_output": "fco", "reasoning": "rs"}


def _listed(item: InputItem, suffix: str) -> dict[str, Any]:
    listed: dict[str, Any] = item.model_dump(mode="json", exclude_none=True)
    listed.setdefault("id", f"{_ID_PREFIXES[listed['type']]}_{suffix}")
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
    """A part of an assistant's message; without its logprobs, which nobody sends back to read them here."""
    if part.type == "refusal":
        return {"type": "refusal", "refusal": text_of([part])}
    return {"type": "output_text", "text": text_of([part]), "annotations": part.annotations or []}


def _sent(part: ResponseContentPart) -> dict[str, Any]:
    return {"type": "input_text", "text": text_of([part])}
