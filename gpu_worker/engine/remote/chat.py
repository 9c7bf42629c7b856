"""Conversations with a server that takes messages: the body of a request, and the text that its answer becomes.

The server has already taken its model's output apart. It is put together again in one of the forms that
`text/outputs.py` reads: thoughts between <think> and </think>, each call in JSON between <tool_call> and </tool_call>.
So it is committed, streamed and shown like every other output.
"""

import json
from collections.abc import Mapping
from typing import Any

import orjson

from domain.catalog import ModelSpec
from domain.requests import ChatMessage, GenerationRequest, SamplingParams
from domain.structured_output import StructuredOutput
from gpu_worker.engine.remote.answers import Delta, Fault, ServerFailure, failure_in_stream
from gpu_worker.engine.remote.bodies import seed_at
from gpu_worker.engine.sequence import Sequence

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


class ChatReader:
    """Reads the events of one answer."""

    def __init__(self) -> None:
        self._is_thinking = False
        self._call: int | None = None  # the server's number of the call that is being written
        self._has_arguments = False

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
            text += self._end_call() if reason != "length" else ""
        return Delta(None, text, None, None if reason is None else _REASONS.get(str(reason), str(reason)))

    def _thought(self, text: str) -> str:
        if not text or self._is_thinking:
            return text
        self._is_thinking = True
        return f"<think>\n{text}"

    def _end_thought(self) -> str:
        was_thinking, self._is_thinking = self._is_thinking, False
        return "\n</think>\n\n" if was_thinking else ""

    def _content(self, text: str) -> str:
        return self._end_thought() + self._end_call() + text if text else ""

    def _called(self, call: Mapping[str, Any]) -> str:
        function = call.get("function") or {}
        number, name, arguments = int(call.get("index") or 0), _text(function, "name"), _text(function, "arguments")
        begun = ""
        if number != self._call:
            if not name or (self._call is not None and number < self._call):
                raise ValueError("a call out of order")
            begun = f'{self._end_thought()}{self._end_call()}<tool_call>\n{{"name": {json.dumps(name)}, "arguments": '
            self._call, self._has_arguments = number, False
        self._has_arguments |= bool(arguments.strip())
        return begun + arguments

    def _end_call(self) -> str:
        if self._call is None:
            return ""
        self._call = None
        return ("" if self._has_arguments else "{}") + "}\n</tool_call>\n"


def _text(fields: Mapping[str, Any], name: str) -> str:
    value = fields.get(name)
    if value is not None and not isinstance(value, str):
        raise TypeError(name)
    return value or ""
