"""Conversations with a server that takes messages: the body of a request, and the text that its answer becomes.

The server has already taken its model's output apart. It is put together again in the form that `text/passed_on.py`
describes, so it is committed, streamed and shown like every other output.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from domain.catalog import ModelSpec
from domain.requests import ChatMessage, GenerationRequest, SamplingParams
from domain.structured_output import StructuredOutput
from gpu_worker.engine.remote.answers import Delta, Fault, ServerFailure, failure_in_stream
from gpu_worker.engine.remote.bodies import seed_at
from gpu_worker.engine.sequence import Sequence
from text.call_readers import Brackets, num_of_tag_at_the_end
from text.passed_on import MARKS, quoted

_REASONS = {"tool_calls": "stop", "function_call": "stop", "content_filter": "stop"}


def chat_body(sequence: Sequence, spec: ModelSpec, request: GenerationRequest) -> dict[str, Any]:
    """Stop strings are not sent: they are found here, and the request is then closed."""
    assert spec.remote is not None
    assert request.messages is not None
    job, params = sequence.job, sequence.job.params
    body: dict[str, Any] = {
        "model": spec.remote.model or spec.id,
        "messages": [_message_of(message) for message in request.messages],
        "stream": True,
        "max_tokens": job.max_tokens,
        "temperature": params.temperature,
        "top_p": params.top_p,
        "presence_penalty": params.presence_penalty,
        "frequency_penalty": params.frequency_penalty,
        "seed": seed_at(job.seed, sequence.index, 0),
    }
    if request.tools:
        tools = [tool.model_dump(exclude_none=True) for tool in request.tools]
        body["tools"] = [{"type": "function", "function": tool} for tool in tools]
        body |= {} if request.parallel_tool_calls else {"parallel_tool_calls": False}
    if request.reasoning_effort is not None:
        body["reasoning_effort"] = request.reasoning_effort
    return body | _output_fields(request.params, spec.remote.structured_output)


def _message_of(message: ChatMessage) -> dict[str, Any]:
    plain: dict[str, Any] = {"role": message.role, "content": message.content}
    optional = ("name", "tool_call_id", "reasoning_content")
    plain |= {name: value for name in optional if (value := getattr(message, name)) is not None}
    if message.tool_calls:
        plain["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in message.tool_calls
        ]
    return plain


def _output_fields(params: SamplingParams, takes: str) -> dict[str, Any]:
    """What forces the output's form. Grammars have vLLM's names."""
    output = params.structured_output
    if output is None:
        return {}
    fields: dict[str, Any] = {}
    if output.kind == "calls":
        assert output.calls is not None
        tools = output.calls.tools
        named = {"type": "function", "function": {"name": tools[0].name}}
        fields["tool_choice"] = named if output.calls.is_single and len(tools) == 1 else "required"
    elif output.json_schema is not None:
        schema = {"name": "answer", "schema": output.json_schema, "strict": True}
        fields["response_format"] = {"type": "json_schema", "json_schema": schema}
    elif output.json_object:
        fields["response_format"] = {"type": "json_object"}
    elif takes == "structured_outputs":
        fields["structured_outputs"] = _grammar_of(output)
    return fields


def _grammar_of(output: StructuredOutput) -> dict[str, Any]:
    if output.regex is not None:
        return {"regex": output.regex}
    return {"choice": list(output.choices)} if output.choices is not None else {"grammar": output.lark}


@dataclass(frozen=True, slots=True)
class _CallKey:
    """By which a server tells its calls apart; it may leave out either."""

    index: int | None
    id: str

    def is_before(self, other: "_CallKey | None") -> bool:
        indexes = (self.index, None if other is None else other.index)
        return indexes[0] is not None and indexes[1] is not None and indexes[0] < indexes[1]


class ChatReader:
    """Reads the events of one answer."""

    def __init__(self) -> None:
        self._is_thinking = False
        self._kept = ""  # of the server's text: what may be the beginning of a mark
        self._call: _CallKey | None = None  # of the call that is being written
        self._ended: set[str] = set()  # ids of the calls before it
        self._arguments = Brackets()
        self._has_arguments = False
        self._are_complete = False

    def read(self, data: bytes) -> Delta | None:
        """None for an event without a choice. Raises ServerFailure like `read_delta`."""
        try:
            event = orjson.loads(data)
            if "error" in event:
                raise failure_in_stream(event["error"])
            choices = event["choices"]
            return self._delta_of(choices[0]) if choices else None
        except (LookupError, TypeError, ValueError, AttributeError) as exc:
            raise ServerFailure(Fault.BROKEN, f"its answer cannot be read: {type(exc).__name__}") from exc

    def _delta_of(self, choice: Mapping[str, Any]) -> Delta:
        delta, reason = choice.get("delta") or {}, choice.get("finish_reason")
        text = self._thought(_text(delta, "reasoning_content") or _text(delta, "reasoning"))
        text += self._content(_text(delta, "content"))
        for call in delta.get("tool_calls") or ():
            text += self._called(call)
        if reason is not None:
            text += self._release()
            text += self._end_call() if reason != "length" else ""
        return Delta(None, text, None, None if reason is None else _REASONS.get(str(reason), str(reason)))

    def _thought(self, text: str) -> str:
        if not text:
            return ""
        begun = "" if self._is_thinking else f"{self._release()}<think>\n"
        self._is_thinking = True
        return begun + self._quoted(text)

    def _end_thought(self) -> str:
        rest = self._release()
        was_thinking, self._is_thinking = self._is_thinking, False
        return rest + ("\n</think>\n\n" if was_thinking else "")

    def _content(self, text: str) -> str:
        if not text:
            return ""
        begun = self._end_thought() if self._is_thinking else ""
        return begun + self._end_call() + self._quoted(text)

    def _quoted(self, text: str) -> str:
        text = self._kept + text
        num_kept = num_of_tag_at_the_end(text, MARKS)
        self._kept = text[len(text) - num_kept :]
        return quoted(text[: len(text) - num_kept])

    def _release(self) -> str:
        kept, self._kept = self._kept, ""
        return quoted(kept)

    def _called(self, call: Mapping[str, Any]) -> str:
        function = call.get("function") or {}
        index = call.get("index")
        key = _CallKey(None if index is None else int(index), _text(call, "id"))
        name, arguments = _text(function, "name"), _text(function, "arguments")
        begun = ""
        if self._is_another(key, name, is_empty=not arguments.strip()):
            if not name or key.id in self._ended or key.is_before(self._call):
                raise ValueError("a call out of order")
            begun = f'{self._end_thought()}{self._end_call()}<tool_call>\n{{"name": {json.dumps(name)}, "arguments": '
            self._call, self._has_arguments = key, False
            self._arguments, self._are_complete = Brackets(), False
        if arguments.strip():
            self._has_arguments = True
            self._are_complete = self._are_complete or self._arguments.end_in(arguments) is not None
        return begun + arguments

    def _is_another(self, key: _CallKey, name: str, *, is_empty: bool) -> bool:
        """Whether this begins a call. Servers that send whole calls may leave out the index, or write 0 for each; and
        some repeat the name, or invent an id, with every piece of one call, also with an empty one at its end."""
        current = self._call
        if current is None:
            return True
        if key.is_before(current) or current.is_before(key):
            return True
        if key.id and key.id in self._ended:
            return True
        if key.id and key.id == current.id and is_empty:
            return False
        return bool(name) and (self._are_complete or bool(key.id and key.id != current.id))

    def _end_call(self) -> str:
        if self._call is None:
            return ""
        self._ended |= {self._call.id} - {""}
        self._call = None
        return ("" if self._has_arguments else "{}") + "}\n</tool_call>\n"


def _text(fields: Mapping[str, Any], name: str) -> str:
    value = fields.get(name)
    if value is not None and not isinstance(value, str):
        raise TypeError(name)
    return value or ""
