"""Chat messages to the prompt text of a model, by the Jinja template that ships with it.

The environment is the one for which model authors write: the options, filters and globals of transformers'
`apply_chat_template`, sandboxed, without transformers. Templates come with the model, never from a client.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, meta, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from domain.errors import InvalidRequest
from domain.requests import ChatMessage
from domain.tools import ToolCall, ToolDefinition
from tasks.contents import MARK

#: What a template may raise over messages it was not written for: its own refusals, and Python's.
_TEMPLATE_ERRORS = (
    TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)
_NOT_ASCII = re.compile(f"[^\0-\x7f{MARK}]")  # a mark is no text, so it is not escaped
_PROBE = "kohlrabi"
_USER = {"role": "user", "content": "Hello"}
#: What stands before and after a message of a role in a conversation that any template takes.
_PROBES: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]]]] = {
    "user": ([], []),
    "system": ([], [_USER]),
    "assistant": ([_USER], [_USER]),
    "tool": ([_USER, {"role": "assistant", "content": "Hello"}], []),
}


class ChatTemplate:
    """A compiled template. Rendering is pure and thread-safe."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """`special_tokens` is what the template sees by name: bos_token, eos_token, ... Raises TemplateError."""
        environment = _environment()
        self._template = environment.from_string(source)
        self.source = source
        self.shows_tools = "tools" in meta.find_undeclared_variables(environment.parse(source))
        self._special_tokens = dict(special_tokens)
        self._roles_in_parts: frozenset[str] = frozenset()
        for role in _PROBES:
            if self._wants_parts(role):
                self._roles_in_parts |= {role}
        self._is_blind = not self._shows_probe([{"role": "user", "content": _PROBE}])

    def render(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()) -> str:
        """The prompt that asks for the next assistant message. Raises InvalidRequest where the template refuses."""
        try:
            return self._template.render(
                messages=[self._as_written_for(message) for message in messages],
                tools=[dict(tool) for tool in tools] or None,
                documents=None,
                add_generation_prompt=True,
                **self._special_tokens,
            )
        except _TEMPLATE_ERRORS as exc:
            reason = str(exc)[:200] or type(exc).__name__
            raise InvalidRequest(
                f"messages is refused by the chat template of this model: {reason!r}", param="messages"
            ) from exc

    def refuse_unseen(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> None:
        """Raises InvalidRequest where nothing that the user wrote shows in the prompt."""
        has_written = any(message["role"] == "user" and message["content"].strip() for message in messages)
        if not self._is_blind or not has_written:
            return
        # It may want other messages than the probe, so the question is whether others would give another prompt.
        others = [
            {**message, "content": message["content"][::-1] + _PROBE} if message["role"] == "user" else message
            for message in messages
        ]
        try:
            is_unseen = self.render(others, tools) == self.render(messages, tools)
        except InvalidRequest:
            return
        if is_unseen:
            raise InvalidRequest(
                "the chat template of this model shows nothing of the user's messages; send prompt instead, or give "
                "the model another template",
                param="messages",
            )

    def _as_written_for(self, message: Mapping[str, Any]) -> dict[str, Any]:
        if message["role"] not in self._roles_in_parts:
            return dict(message)
        return {**message, "content": [{"type": "text", "text": message["content"]}]}

    def _wants_parts(self, role: str) -> bool:
        """Whether a message of this role is only seen where its content is a list of parts."""
        before, after = _PROBES[role]
        as_text = {"role": role, "content": _PROBE}
        as_parts = {"role": role, "content": [{"type": "text", "text": _PROBE}]}
        return not self._shows_probe([*before, as_text, *after]) and self._shows_probe([*before, as_parts, *after])

    def _shows_probe(self, messages: Sequence[Mapping[str, Any]]) -> bool:
        try:
            return _PROBE in self.render(messages).casefold()
        except InvalidRequest:
            return False


def plain_message(message: ChatMessage) -> dict[str, Any]:
    """As templates are written for: without what is not there, and arguments as an object where they are one."""
    plain: dict[str, Any] = {"role": message.role, "content": message.content}
    optional = ("name", "reasoning_content", "tool_call_id")
    plain |= {name: value for name in optional if (value := getattr(message, name)) is not None}
    if message.tool_calls:
        plain["tool_calls"] = [_plain_call(call) for call in message.tool_calls]
    return plain


def plain_tool(tool: ToolDefinition) -> dict[str, Any]:
    function = tool.model_dump(exclude_none=True, exclude={"strict"})
    return {"type": "function", "function": {"parameters": {"type": "object", "properties": {}}} | function}


def _plain_call(call: ToolCall) -> dict[str, Any]:
    try:
        arguments = json.loads(call.arguments)
    except ValueError:
        arguments = None
    return {
        "id": call.id,
        "type": "function",
        "function": {"name": call.name, "arguments": arguments if isinstance(arguments, dict) else call.arguments},
    }


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    environment.globals["dict"] = _TemplateDict()
    environment.globals["namespace"] = _TemplateNamespace
    return environment


class _GenerationBlock(Extension):
    """`{% generation %}...{% endgeneration %}` marks assistant text for training; here it renders its body."""

    tags = {"generation"}  # noqa: RUF012  (Jinja reads it as a class attribute)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_render_body"), [], [], body).set_lineno(line)

    def _render_body(self, caller: Macro) -> str:
        return caller()


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes HTML characters, which models never saw in training."""
    text = json.dumps(value, ensure_ascii=False, indent=indent, separators=separators, sort_keys=sort_keys)
    return _NOT_ASCII.sub(lambda found: json.dumps(found[0])[1:-1], text) if ensure_ascii else text


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


class _TemplateDict:
    """`dict(...)` in a template, without the attributes of the real type, which lead out of the sandbox."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    fromkeys: Callable[..., dict[Any, Any]] = staticmethod(dict.fromkeys)


class _TemplateNamespace(Namespace):
    """`namespace(...)` without underscore names, which lead out of the sandbox."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *values = args  # as in Jinja, so that namespace(self=...) still works
        attributes = dict(*values, **kwargs)
        for name in attributes:
            _refuse_underscore(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_underscore(name)
        super().__setitem__(name, value)


def _refuse_underscore(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a chat template cannot store {name!r} on a namespace; rename the attribute")
