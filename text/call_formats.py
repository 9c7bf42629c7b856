"""How each family of models writes tool calls: one entry per format.

A family is recognised by its chat template alone. To add one, add an entry to `FORMATS` and a file like
`tests/unit/test_family_qwen.py`; docs/models.md says what to look at. The names are stored with jobs, so they stay.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

from domain.errors import UnsupportedParameter
from text.call_arguments import DelimitedArguments, Notation, PythonArguments, TaggedArguments
from text.call_readers import MAX_HEAD_CHARS, CallReader, HeadedCall, JsonCall, PythonCall, WholeCall

#: Makes the reader of a call by its first character, the schemas of the tools' arguments, and the format's `stops`.
MakeReader = Callable[[str, Mapping[str, Any], tuple[str, ...]], CallReader]


@dataclass(frozen=True, slots=True)
class CallShape:
    """What a grammar lets a model write: `begin`, calls with `between` them, `end`. `call` has the name and the
    arguments in braces. None for `between`: a single call."""

    call: str
    begin: str = ""
    end: str = ""
    between: str | None = None
    arguments: Notation | None = None  # None: JSON


@dataclass(frozen=True, slots=True)
class CallFormat:
    name: str
    is_in: Callable[[str], bool]  # whether a chat template is of such a model
    shape: CallShape
    reader: MakeReader = lambda first, parameters, stops: JsonCall(stops)
    begins: tuple[str, ...] = ()  # each of which begins a section of calls, wherever it is in the output
    ends: tuple[str, ...] = ()  # of the section
    glue: tuple[str, ...] = ()  # what else stands before, between and behind calls, besides blanks
    is_list: bool = False  # whether a section may have several calls
    inner: tuple[str, ...] = ()  # further markers, within calls
    #: Whether an output that begins with this text, without a marker, begins with a call; None if that is still open.
    is_bare: Callable[[str], bool | None] | None = None

    def beginnings(self, tool_names: Iterable[str]) -> list[str]:
        """The texts with which an output that follows a grammar of calls may begin."""
        head = self.shape.begin + self.shape.call.partition("{arguments}")[0]
        markers = ("",) if self.is_bare is None else ("", *self.begins)
        return [marker + head.replace("{name}", name) for name in tool_names for marker in markers]

    @property
    def stops(self) -> tuple[str, ...]:
        """The marks that stand outside of calls: one within a call means that the call lacks its end."""
        return (*self.begins, *self.ends, *(mark for mark in self.glue if mark.startswith("<")))

    @property
    def markers(self) -> frozenset[str]:
        """What may be special tokens of a tokenizer."""
        return frozenset({*self.begins, *self.ends, *self.glue, *self.inner})


_BARE_HEAD = '{"name":'


def _is_bare_json(text: str) -> bool | None:
    compact = re.sub(r"\s", "", text[:MAX_HEAD_CHARS]).removeprefix("[")[: len(_BARE_HEAD)]
    if not _BARE_HEAD.startswith(compact) or (len(compact) < len(_BARE_HEAD) and len(text) > MAX_HEAD_CHARS):
        return False
    return True if len(compact) == len(_BARE_HEAD) else None


def _is_bare_object(text: str) -> bool | None:
    return False if text.startswith("[") else _is_bare_json(text)


def _is_bare_python(text: str) -> bool | None:
    head = text[:MAX_HEAD_CHARS]
    if re.match(r"\[\s*[A-Za-z_][\w.-]*\s*\(", head):
        return True
    return None if re.fullmatch(r"\[\s*(?:[A-Za-z_][\w.-]*\s*)?", head) and len(text) < MAX_HEAD_CHARS else False


def _has(*words: str) -> Callable[[str], bool]:
    return lambda source: all(word in source for word in words)


def _headed(pattern: str) -> MakeReader:
    head = re.compile(pattern)
    return lambda first, parameters, stops: JsonCall(stops) if first == "{" else HeadedCall(head, stops)


def _whole(end_tag: str, notation: Notation) -> MakeReader:
    """For calls up to an end tag, or in JSON."""
    return lambda first, parameters, stops: (
        JsonCall(stops) if first == "{" else WholeCall(end_tag, partial(notation.convert, parameters=parameters))
    )


_PYTHON = PythonArguments()


def _python(first: str, parameters: Mapping[str, Any], stops: tuple[str, ...]) -> CallReader:
    return PythonCall(partial(_PYTHON.convert, parameters=parameters), stops)


_NAME = r"([A-Za-z0-9_.-]+)"

_MISTRAL = _headed(rf"\s*{_NAME}\s*(?:\[CALL_ID\]\s*\w+\s*)?(?:\[ARGS\]\s*)?(?=\{{)")

_DEEPSEEK = _headed(rf"\s*(?:function<｜tool▁sep｜>{_NAME}\s*```json\s*|{_NAME}<｜tool▁sep｜>\s*)(?=\{{)")


def _deepseek(name: str, words: Sequence[str], call: str, between: str) -> CallFormat:
    return CallFormat(
        name,
        _has("tools", *words),
        CallShape(call, "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", between),
        _DEEPSEEK,
        begins=("<｜tool▁calls▁begin｜>",),
        ends=("<｜tool▁calls▁end｜>",),
        glue=("<｜tool▁call▁begin｜>", "```", "<｜tool▁call▁end｜>"),
        is_list=True,
        inner=("<｜tool▁sep｜>",),
    )


_QWEN_XML = TaggedArguments(re.compile(r"\s*<function=([^>\n]+)>"), "<parameter={}>\n", "\n</parameter>\n")

_GLM = TaggedArguments(re.compile(rf"\s*{_NAME}\s*"), "<arg_key>{}</arg_key>\n<arg_value>", "</arg_value>\n")

_MINIMAX = TaggedArguments(re.compile(r'\s*<invoke name="([^"\n]+)">'), '<parameter name="{}">', "</parameter>\n")

_JSON_CALL = '{"name": "{name}", "arguments": {arguments}}'

_FORMATS = (
    CallFormat(  # GPT-OSS; text/harmony.py reads it
        "harmony",
        _has("<|channel|>", "<|message|>"),
        CallShape("{name} <|constrain|>json<|message|>{arguments}", "<|channel|>commentary to=functions."),
        inner=("<|start|>", "<|channel|>", "<|constrain|>", "<|message|>"),
    ),
    _deepseek(  # V3, R1
        "deepseek_v3",
        ("<｜tool▁calls▁begin｜>", "```json"),
        "<｜tool▁call▁begin｜>function<｜tool▁sep｜>{name}\n```json\n{arguments}\n```<｜tool▁call▁end｜>",
        "\n",
    ),
    _deepseek(  # V3.1
        "deepseek_v31",
        ("<｜tool▁calls▁begin｜>",),
        "<｜tool▁call▁begin｜>{name}<｜tool▁sep｜>{arguments}<｜tool▁call▁end｜>",
        "",
    ),
    CallFormat(  # Kimi K2
        "kimi_k2",
        _has("tools", "<|tool_calls_section_begin|>"),
        CallShape(
            "<|tool_call_begin|>functions.{name}:0<|tool_call_argument_begin|>{arguments}<|tool_call_end|>",
            "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>", "",
        ),
        _headed(rf"\s*(?:functions\.)?{_NAME}:\d+\s*<\|tool_call_argument_begin\|>\s*(?=\{{)"),
        begins=("<|tool_calls_section_begin|>",),
        ends=("<|tool_calls_section_end|>",),
        glue=("<|tool_call_begin|>", "<|tool_call_end|>"),
        is_list=True,
        inner=("<|tool_call_argument_begin|>",),
    ),
    CallFormat(  # Qwen3-Coder, Qwen3.5
        "qwen3_coder",
        _has("tools", "<tool_call>", "<function="),
        CallShape(
            "<function={name}>\n{arguments}</function>",
            "<tool_call>\n", "\n</tool_call>", "\n</tool_call>\n<tool_call>\n", _QWEN_XML,
        ),
        _whole("</function>", _QWEN_XML),
        begins=("<tool_call>",),
        ends=("</tool_call>",),
    ),
    CallFormat(  # GLM 4.5
        "glm45",
        _has("tools", "<tool_call>", "<arg_key>"),
        CallShape("{name}\n{arguments}", "<tool_call>", "</tool_call>", "</tool_call>\n<tool_call>", _GLM),
        _whole("</tool_call>", _GLM),
        begins=("<tool_call>",),
        ends=("</tool_call>",),
        inner=("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
    ),
    CallFormat(  # MiniMax M2
        "minimax_m2",
        _has("tools", "<minimax:tool_call>"),
        CallShape(
            '<invoke name="{name}">\n{arguments}</invoke>\n',
            "<minimax:tool_call>\n", "</minimax:tool_call>", "", _MINIMAX,
        ),
        _whole("</invoke>", _MINIMAX),
        begins=("<minimax:tool_call>",),
        ends=("</minimax:tool_call>",),
        is_list=True,
    ),
    CallFormat(  # FunctionGemma
        "function_gemma",
        _has("tools", "<start_function_call>"),
        CallShape(
            "call:{name}{{arguments}}",
            "<start_function_call>", "<end_function_call>", "<end_function_call><start_function_call>",
            DelimitedArguments("<escape>"),
        ),
        begins=("<start_function_call>",),
        ends=("<end_function_call>",),
        inner=("<escape>",),
        reader=_whole("<end_function_call>", DelimitedArguments("<escape>")),
    ),
    CallFormat(  # Gemma 4
        "gemma4",
        _has("tools", "<|tool_call>", "<tool_call|>"),
        CallShape(
            "call:{name}{{arguments}}",
            "<|tool_call>", "<tool_call|>", "<tool_call|><|tool_call>", DelimitedArguments('<|"|>'),
        ),
        begins=("<|tool_call>",),
        ends=("<tool_call|>",),
        inner=('<|"|>',),
        reader=_whole("<tool_call|>", DelimitedArguments('<|"|>')),
    ),
    CallFormat(  # Command R7B, Command A
        "command",
        _has("tools", "<|START_ACTION|>"),
        CallShape(
            '{"tool_call_id": "0", "tool_name": "{name}", "parameters": {arguments}}',
            "<|START_ACTION|>[\n    ", "\n]<|END_ACTION|>", ",\n    ",
        ),
        begins=("<|START_ACTION|>",),
        ends=("<|END_ACTION|>",),
        glue=("[", ",", "]"),
        is_list=True,
    ),
    CallFormat(  # Phi-4-mini
        "phi4_mini",
        lambda source: _has("<|tool|>", "<|/tool|>")(source) or _has("tools", "<|/tool_call|>")(source),
        CallShape(_JSON_CALL, "<|tool_call|>[", "]<|/tool_call|>", ", "),
        begins=("<|tool_call|>", "functools"),
        ends=("<|/tool_call|>",),
        glue=("[", ",", "]"),
        is_list=True,
    ),
    CallFormat(  # Phi-4-mini with vLLM's template
        "functools",
        _has("tools", "functools["),
        CallShape(_JSON_CALL, "functools[", "]", ", "),
        begins=("functools", "<|tool_call|>"),
        ends=("<|/tool_call|>",),
        glue=("[", ",", "]"),
        is_list=True,
    ),
    CallFormat(  # Granite 3
        "granite",
        lambda source: "tools" in source and ("<|tool_call|>" in source or "<tool_call>[" in source),
        CallShape(_JSON_CALL, "<|tool_call|>[", "]", ", "),
        begins=("<|tool_call|>", "<tool_call>"),
        ends=("<|/tool_call|>", "</tool_call>"),
        glue=("[", ",", "]"),
        is_list=True,
    ),
    CallFormat(  # Qwen2.5, Qwen3, Hermes, SmolLM2, Granite 4
        "hermes",
        _has("tools", "<tool_call>"),
        CallShape(_JSON_CALL, "<tool_call>\n", "\n</tool_call>", "\n</tool_call>\n<tool_call>\n"),
        begins=("<tool_call>",),
        ends=("</tool_call>",),
    ),
    CallFormat(  # Mistral Small 3.1 and later, Devstral, Magistral
        "mistral_args",
        _has("tools", "[TOOL_CALLS]", "[ARGS]"),
        CallShape("{name}[ARGS]{arguments}", "[TOOL_CALLS]", "", "[TOOL_CALLS]"),
        _MISTRAL,
        begins=("[TOOL_CALLS]",),
        glue=("[", ",", "]"),
        inner=("[ARGS]", "[CALL_ID]"),
    ),
    CallFormat(  # Mistral 7B v0.3, Nemo, Mixtral
        "mistral",
        _has("tools", "[TOOL_CALLS]"),
        CallShape(_JSON_CALL, "[", "]", ", "),
        _MISTRAL,
        begins=("[TOOL_CALLS]",),
        glue=("[", ",", ";", "]"),
        is_list=True,
        is_bare=_is_bare_json,
    ),
    CallFormat(  # Llama 3.2 and 4, Gemma 3, with the templates for Python's notation; LFM2
        "python",
        lambda source: (
            "tools" in source
            and any(word in source for word in ("func_name1(", "<|python_start|>", "<|tool_call_start|>"))
        ),
        CallShape("{name}({arguments})", "[", "]", ", ", _PYTHON),
        _python,
        begins=("<|python_start|>", "<|tool_call_start|>"),
        ends=("<|python_end|>", "<|tool_call_end|>"),
        glue=("[", ",", "]"),
        is_list=True,
        is_bare=_is_bare_python,
    ),
    CallFormat(  # Llama 3.1 to 3.3
        "llama3",
        _has("tools", "ipython", "parameters"),
        CallShape('{"name": "{name}", "parameters": {arguments}}'),
        begins=("<|python_tag|>",),
        glue=(",", ";"),
        is_list=True,
        is_bare=_is_bare_object,
    ),
)  # fmt: skip

#: In the order in which a template is compared with them.
FORMATS: Mapping[str, CallFormat] = MappingProxyType({one.name: one for one in _FORMATS})

MARKERS = frozenset[str]().union(*(one.markers for one in _FORMATS))


def call_format(name: str) -> CallFormat:
    """Raises UnsupportedParameter for a format that only newer releases know."""
    found = FORMATS.get(name)
    if found is None:
        raise UnsupportedParameter(f"the tool call format {name!r} is unknown here; upgrade the workers", param="tools")
    return found


def format_of_template(source: str) -> CallFormat | None:
    return next((one for one in _FORMATS if one.is_in(source)), None)
