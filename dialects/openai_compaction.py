"""Compaction: the request that has the model summarise a conversation, and the items that stand for it from then on."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from dialects.bodies import with_body_names
from dialects.openai import build, spelling_of_params, take_effort
from dialects.openai_response_items import ResponseInput, listed_items, messages_of
from dialects.openai_response_objects import CompactionView, InputMessageView, response_usage_of
from dialects.openai_response_requests import InputTokensBody, with_input_for_messages
from dialects.openai_views import ResponseUsageView, View
from domain.errors import InvalidRequest
from domain.jobs import external_id
from domain.requests import GenerationRequest, GenerationResult, SamplingParams
from domain.seals import seal
from storage.job_queries import JobRecord
from text.models import ModelView
from text.outputs import ContentPiece, OutputParser

TASK = (
    "Summarise the conversation below, so that somebody who has only your summary can continue it: what was asked for, "
    "what was decided and done, all facts, names and values that matter, and what is still to be done. Write nothing "
    "but the summary."
)


#: The body's names for the fields of our requests.
SPELLING = spelling_of_params(messages="input", reasoning_effort="reasoning.effort")


class CompactBody(InputTokensBody):
    """Tools, formats and the effort are taken as clients send them with every request; the summary needs none."""

    input: ResponseInput | None = None  # type: ignore[assignment]


class CompactedView(View):
    id: str
    object: Literal["response.compaction"]
    created_at: Annotated[int, Field(description="Seconds since 1970.")]
    output: list[Annotated[InputMessageView | CompactionView, Field(discriminator="type")]]
    usage: ResponseUsageView


def to_summary_request(body: CompactBody, view: ModelView, context: Sequence[Mapping[str, Any]]) -> GenerationRequest:
    """One user's message with the task and the conversation as text, which every chat template takes. Raises
    InvalidRequest."""
    messages = messages_of(body.input or [], instructions=body.instructions, context=context)
    if not messages:
        raise InvalidRequest("there is nothing to compact; send input or previous_response_id", param="input")
    effort = body.reasoning.effort if body.reasoning else None
    lines = "\n".join(map(_line_of, messages))
    content = f"{TASK}\n\n<conversation>\n{lines}\n</conversation>"
    request: dict[str, Any] = {"model": body.model, "messages": [{"role": "user", "content": content}]}
    request |= {
        "params": SamplingParams(),
        "reasoning_effort": take_effort(effort, view, place="reasoning.effort"),
        "chat_template_kwargs": body.chat_template_kwargs,
    }
    try:
        return build(GenerationRequest, request)
    except InvalidRequest as exc:
        raise with_body_names(with_input_for_messages(exc), SPELLING) from None


def _line_of(message: Mapping[str, Any]) -> str:
    calls = "".join(f"\n[calls {call['name']}: {call['arguments']}]" for call in message.get("tool_calls") or ())
    return f"{message['role']}: {message['content']}{calls}"


def compacted(record: JobRecord, body: CompactBody, parser: OutputParser, key: bytes) -> CompactedView:
    """All messages of the user as they are, then the summary. Raises InvalidRequest if the model has written none."""
    assert isinstance(record.result, GenerationResult)
    text = record.result.choices[0].text
    pieces = [*parser.push(text), *parser.finish(is_cut=False)]
    summary = "".join(piece.text for piece in pieces if isinstance(piece, ContentPiece)).strip()
    if not summary:
        raise InvalidRequest("the model has written no summary; send the request again, or name another model")
    items = listed_items(record.job.id, body.input or [])
    said: list[Any] = [item for item in items if item["type"] == "message" and item["role"] == "user"]
    item: CompactionView = {
        "id": external_id(record.job.id, "resp").replace("resp_", "cmp_"),
        "type": "compaction",
        "encrypted_content": seal(summary, key),
    }
    return {
        "id": external_id(record.job.id, "resp"),
        "object": "response.compaction",
        "created_at": int(record.job.created_at.timestamp()),
        "output": [*said, item],
        "usage": response_usage_of(record.result, parser),
    }
