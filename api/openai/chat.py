"""POST /v1/chat/completions: messages in, a message out, whole or as it comes."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fastapi import Request
from starlette.responses import Response

from api.bodies import read_model
from api.deps import private_router
from api.openai.answers import WholeAnswer
from api.openai.chat_schemas import ChatCompletionBody, Message
from api.openai.running import Asked, Run, start
from api.openai.schemas import FINISH_REASONS, build, logprob_object, strings, tier_of, usage_object
from api.openai.streaming import stream_answer
from domain.chunks import TokenChunk
from domain.errors import InvalidRequest
from domain.ids import external_id
from domain.jobs import Endpoint
from domain.requests import GenerationRequest, ResultChoice
from storage.job_queries import JobRecord
from storage.tables import Job

router = private_router()


@router.post(
    "/v1/chat/completions",
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": ChatCompletionBody.model_json_schema()}},
        }
    },
)
async def create_chat_completion(request: Request) -> Response:
    """A chat completion as OpenAI's, and a job as any other: `x-job-id` names it, `/v1/jobs` knows it."""
    body = await read_model(request, ChatCompletionBody)
    run = await start(request, to_generation_request(body), _asked(body))
    if body.stream:
        return stream_answer(run, ChatStream(run, body))
    return WholeAnswer([run], lambda records: from_result(records[0], body))


def to_generation_request(body: ChatCompletionBody) -> GenerationRequest:
    """Raises InvalidRequest."""
    params = body.sampling(max_tokens=_max_tokens(body), stop=strings(body.stop), logprobs=_num_logprobs(body))
    messages = [_plain_message(message, number) for number, message in enumerate(body.messages)]
    return build(GenerationRequest, {"model": body.model, "messages": messages, "params": params})


def from_result(record: JobRecord, body: ChatCompletionBody) -> dict[str, object]:
    """The chat completion of a completed job."""
    assert record.result is not None
    return _head(record.job, "chat.completion", body.service_tier) | {
        "choices": [_choice(choice) for choice in record.result.choices],
        "usage": usage_object(record.result.usage),
    }


class ChatStream:
    """A job's chunks as chat completion chunks."""

    def __init__(self, run: Run, body: ChatCompletionBody) -> None:
        self._head = _head(run, "chat.completion.chunk", body.service_tier)
        self._num_choices = body.n or 1
        self._has_usage = bool(body.stream_options and body.stream_options.include_usage)

    def begin(self) -> Iterable[Mapping[str, object]]:
        for index in range(self._num_choices):
            yield self._chunk(index, {"role": "assistant", "content": "", "refusal": None})

    def from_chunk(self, chunk: TokenChunk) -> Iterable[Mapping[str, object]]:
        """The text first, its reason to end in an event of its own. A reason that clients do not know is left to the
        error that follows."""
        if chunk.text or chunk.logprobs:
            yield self._chunk(chunk.index, {"content": chunk.text}, logprobs=_logprobs(chunk.logprobs))
        if chunk.finish_reason in FINISH_REASONS:
            yield self._chunk(chunk.index, {}, finish_reason=FINISH_REASONS[chunk.finish_reason])

    def finish(self, record: JobRecord) -> Iterable[Mapping[str, object]]:
        assert record.result is not None
        if self._has_usage:
            yield self._head | {"choices": [], "usage": usage_object(record.result.usage)}

    def _chunk(
        self, index: int, delta: Mapping[str, object], *, logprobs: object = None, finish_reason: str | None = None
    ) -> dict[str, object]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        chunk = self._head | {"choices": [choice]}
        return chunk | {"usage": None} if self._has_usage else chunk


def _asked(body: ChatCompletionBody) -> Asked:
    return Asked(
        endpoint=Endpoint.CHAT,
        has_stream=bool(body.stream),
        is_stored=bool(body.store),
        service_tier=body.service_tier,
        metadata=body.metadata,
    )


def _max_tokens(body: ChatCompletionBody) -> int | None:
    if None not in (body.max_tokens, body.max_completion_tokens) and body.max_tokens != body.max_completion_tokens:
        raise InvalidRequest(
            f"max_tokens is {body.max_tokens}, max_completion_tokens {body.max_completion_tokens}; send one",
            param="max_tokens",
        )
    return body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens


def _num_logprobs(body: ChatCompletionBody) -> int | None:
    if body.top_logprobs is not None and not body.logprobs:
        raise InvalidRequest(
            f"top_logprobs is {body.top_logprobs} but logprobs is not true; set it, too", param="top_logprobs"
        )
    return (body.top_logprobs or 0) if body.logprobs else None


def _plain_message(message: Message, number: int) -> dict[str, Any]:
    if message.content is None:
        raise InvalidRequest(f"messages.{number}.content is missing; add it", param=f"messages.{number}.content")
    role = "system" if message.role == "developer" else message.role
    return {"role": role, "content": content_text(message)}


def content_text(message: Message) -> str:
    """Parts are put together with line breaks, as the templates for plain text expect it."""
    if message.content is None or isinstance(message.content, str):
        return message.content or ""
    return "\n".join(part.text or part.refusal or "" for part in message.content)


def _head(job: Job | Run, object_: str, service_tier: str | None) -> dict[str, object]:
    id_ = job.id if isinstance(job, Job) else job.job_id
    return {
        "id": external_id(id_, "chatcmpl"),
        "object": object_,
        "created": int(job.created_at.timestamp()),
        "model": job.model,
        "service_tier": tier_of(service_tier, job.priority),
        "system_fingerprint": f"fp_{job.model_revision[:16]}",
    }


def _choice(choice: ResultChoice) -> dict[str, object]:
    return {
        "index": choice.index,
        "message": {"role": "assistant", "content": choice.text, "refusal": None},
        "logprobs": _logprobs(choice.logprobs),
        "finish_reason": FINISH_REASONS[choice.finish_reason],
    }


def _logprobs(logprobs: Sequence[Any] | None) -> dict[str, object] | None:
    if logprobs is None:
        return None
    return {"content": [logprob_object(logprob) for logprob in logprobs], "refusal": None}
