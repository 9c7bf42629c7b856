"""Renders chat messages to the prompt text of a model, with one of the Jinja templates that come with the model.

Templates run in the environment for which model authors write them: the options, filters and globals of transformers'
`apply_chat_template`, sandboxed, but without transformers. Clients cannot supply templates. As in transformers, a
model may have several, by name.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any

from jinja2 import TemplateError, meta, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from domain.catalog import ModelEntry
from domain.errors import InvalidRequest, UnsupportedParameter
from domain.requests import ChatMessage
from domain.structured_output import ToolCall, ToolDefinition
from text.content_marks import MARK
from text.model_files import read_json_file, read_text_file
from text.thinking import ThinkingControls

#: What a template may raise for messages that it does not support: its own errors and Python's.
_TEMPLATE_ERRORS = (
    TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)

_NOT_ASCII = re.compile(f"[^\0-\x7f{MARK}]")  # marks are not text, so they are not escaped

_PROBE = "kohlrabi"

_USER = {"role": "user", "content": "Hello"}

#: The messages around one of a given role, in a conversation that any template accepts.
_PROBES: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]]]] = {
    "user": ([], []),
    "system": ([], [_USER]),
    "assistant": ([_USER], [_USER]),
    "tool": ([_USER, {"role": "assistant", "content": "Hello"}], []),
}


#: Of no further values for a template.
NO_VALUES: Mapping[str, Any] = MappingProxyType({})


class ChatTemplate:
    """A compiled template. Rendering is pure and thread-safe."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """`special_tokens` are those that the template can use by name: bos_token, eos_token, ... Raises
        TemplateError."""
        environment = _environment()
        self._template = environment.from_string(source)
        self._template.globals = dict(self._template.globals)  # each rendering reads all of Jinja's chain of mappings
        self.source = source
        parsed = environment.parse(source)
        self.shows_tools = "tools" in meta.find_undeclared_variables(parsed)
        self.names = frozenset(node.name for node in parsed.find_all(nodes.Name))
        self.words = frozenset(node.value for node in parsed.find_all(nodes.Const) if isinstance(node.value, str))
        self._special_tokens = dict(special_tokens)
        self._roles_in_parts: frozenset[str] = frozenset()
        for role in _PROBES:
            if self._wants_parts(role):
                self._roles_in_parts |= {role}
        self._is_blind = not self._shows_probe([{"role": "user", "content": _PROBE}])

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] = (),
        values: Mapping[str, Any] = NO_VALUES,
        *,
        add_generation_prompt: bool = True,
    ) -> str:
        """The prompt that asks for the next assistant message, if there is to be one. `values` are further ones that
        the template may read. Raises InvalidRequest if the template refuses the messages."""
        try:
            return self._template.render(
                messages=[self._as_written_for(message) for message in messages],
                tools=[dict(tool) for tool in tools] or None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **{**values, **self._special_tokens},
            )
        except _TEMPLATE_ERRORS as exc:
            reason = str(exc)[:200] or type(exc).__name__
            raise InvalidRequest(
                f"the chat template of this model refuses the messages: {reason!r}; change them to what it accepts",
                param="messages",
            ) from exc

    def refuse_unseen(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> None:
        """Raises InvalidRequest if nothing of the user's messages appears in the prompt."""
        has_written = any(message["role"] == "user" and message["content"].strip() for message in messages)
        if not self._is_blind or not has_written:
            return
        # It may require messages other than the probe, so test whether different ones give a different prompt.
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
                "the chat template of this model ignores the user's messages; send prompt instead, or give the model "
                "another template",
                param="messages",
            )

    def _as_written_for(self, message: Mapping[str, Any]) -> dict[str, Any]:
        if message["role"] not in self._roles_in_parts:
            return dict(message)
        return {**message, "content": [{"type": "text", "text": message["content"]}]}

    def _wants_parts(self, role: str) -> bool:
        """Whether a message of this role appears in the prompt only if its content is a list of parts."""
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
    """The message as templates expect it: without absent fields, and with the arguments of calls as objects if
    valid."""
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
    """`dict(...)` in a template, without the attributes of the real type, which allow escaping the sandbox."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    fromkeys: Callable[..., dict[Any, Any]] = staticmethod(dict.fromkeys)


class _TemplateNamespace(Namespace):
    """`namespace(...)` without underscore names, which allow escaping the sandbox."""

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


DEFAULT, TOOL_USE = "default", "tool_use"


class TemplateChoice:
    """All chat templates of one model. Thread-safe."""

    def __init__(self, spec: ModelEntry, templates: Mapping[str, ChatTemplate]) -> None:
        """Raises ValueError if models.toml names a template that the model does not have."""
        if spec.chat_template is not None and spec.chat_template not in templates:
            raise ValueError(
                f"model {spec.id}: chat_template is {spec.chat_template!r}, but the model has "
                f"{_listed(templates)}; use one of them, or leave it out"
            )
        self._spec = spec
        self._templates = dict(templates)

    @property
    def text(self) -> str:
        """The source of all templates: everything they may write."""
        return "\n".join(template.source for template in self._templates.values())

    @property
    def names(self) -> frozenset[str]:
        """All that the templates read."""
        return frozenset().union(*(template.names for template in self._templates.values()))

    @property
    def thinking(self) -> ThinkingControls:
        words = (template.words for template in self._templates.values())
        return ThinkingControls.of(self.names, frozenset().union(*words))

    def choose(self, *, has_tools: bool) -> ChatTemplate:
        """The template that models.toml names; else `tool_use` for a conversation with tools, if there is one; else
        `default`. Raises InvalidRequest or UnsupportedParameter."""
        if not self._templates:
            raise InvalidRequest(f"{self._spec.id} has no chat template; send prompt instead", param="messages")
        name = self._spec.chat_template or (TOOL_USE if has_tools and TOOL_USE in self._templates else DEFAULT)
        if name not in self._templates:
            raise InvalidRequest(
                f"{self._spec.id} has no default chat template, only {_listed(self._templates)}; set one of them as "
                "its chat_template in models.toml, or send prompt instead",
                param="messages",
            )
        if has_tools and not self._templates[name].shows_tools:
            raise UnsupportedParameter(
                f"the chat template of {self._spec.id} does not support tools; remove them", param="tools"
            )
        return self._templates[name]


def load_templates(
    spec: ModelEntry, folder: Path, tokenizer_config: Mapping[str, Any], special_tokens: Mapping[str, str]
) -> TemplateChoice:
    """All templates of a model. Raises ValueError, which names the template that does not compile."""
    templates = {}
    for name, source in _read_sources(folder, tokenizer_config).items():
        try:
            templates[name] = ChatTemplate(source, special_tokens)
        except TemplateError as exc:
            raise ValueError(f"model {spec.id}: its chat template {name!r} does not compile: {exc}") from exc
    return TemplateChoice(spec, templates)


def _read_sources(folder: Path, tokenizer_config: Mapping[str, Any]) -> dict[str, str]:
    """Template files take precedence over tokenizer_config.json, and that over chat_template.json of processors."""
    sources = {file.stem: read_text_file(file) for file in sorted(folder.glob("additional_chat_templates/*.jinja"))}
    if (folder / "chat_template.jinja").is_file():
        sources[DEFAULT] = read_text_file(folder / "chat_template.jinja")
    if sources:
        return sources
    own = _by_name(tokenizer_config.get("chat_template"), "tokenizer_config.json")
    return own or _by_name(read_json_file(folder / "chat_template.json").get("chat_template"), "chat_template.json")


def _by_name(value: Any, file_name: str) -> dict[str, str]:
    if value is None:
        return {}
    if isinstance(value, str):
        return {DEFAULT: value}
    if isinstance(value, list) and all(isinstance(entry, dict) for entry in value):
        value = {entry.get("name"): entry.get("template") for entry in value}
    if not isinstance(value, dict) or not all(isinstance(part, str) for item in value.items() for part in item):
        raise ValueError(
            f"{file_name}: chat_template is neither a string nor a list of {{name, template}}; correct or remove it"
        )
    return value


def _listed(templates: Sequence[str] | Mapping[str, object]) -> str:
    return ", ".join(map(repr, sorted(templates))) or "none"
