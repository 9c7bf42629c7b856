"""Granite 3, Command R7B, Kimi K2, GLM 4.5 and MiniMax M2: one template for all, with the markup of each."""

from collections.abc import Sequence
from typing import ClassVar

from tests.family_tests import FamilyTests, Outputs, call, content, thought

_TURNS = (
    "{%- for tool in tools or [] %}{{- tool | tojson }}{{- '\\n' }}{%- endfor %}\n"
    "{%- for message in messages %}\n"
    "    {{- '<|' + message.role + '|>' + message.content }}\n"
    "    {%- if message.tool_calls %}\n"
    "        {{- '@BEGIN@' }}\n"
    "        {%- for tool_call in message.tool_calls %}\n"
    "            @CALL@{{- ', ' if not loop.last }}\n"
    "        {%- endfor %}\n"
    "        {{- '@END@' }}\n"
    "    {%- endif %}\n"
    "{%- endfor %}\n"
    "{{- '<|assistant|>' }}\n"
)


def _template(begin: str, written: str, end: str) -> str:
    written = written.replace("\n", "\\n").replace("NAME", "' ~ tool_call.function.name ~ '")
    written = "{{- '" + written.replace("ARGUMENTS", "' ~ tool_call.function.arguments | tojson ~ '") + "' }}"
    begin, end = (text.replace("\n", "\\n") for text in (begin, end))
    return _TURNS.replace("@BEGIN@", begin).replace("@CALL@", written).replace("@END@", end)


_GO = '{"name": "go", "arguments": {"to":"Köln <3","at":3}}'
_STOP = '{"name": "stop", "arguments": {}}'


class TestGranite3(FamilyTests):
    FORMAT = "granite"
    TEMPLATE = _template("<|tool_call|>[", '{"name": "NAME", "arguments": ARGUMENTS}', "]")
    OUTPUTS: ClassVar[Outputs] = (
        (f"<|tool_call|>[{_GO}, {_STOP}]",
         [*call(0, "go", '{"to":"Köln <3","at":3}'), *call(1, "stop", "{}")]),
        (f"<tool_call>[{_STOP}]</tool_call>", call(0, "stop", "{}")),
        (f"So: <|tool_call|> [ {_STOP} ]", [content("So:"), *call(0, "stop", "{}")]),
    )  # fmt: skip
    NO_CALLS: ClassVar[Sequence[str]] = ("<|tool_call|>[]", "<tool_call> as text")
    GO = f"<|tool_call|>[{_GO}]"
    TWO = f"<|tool_call|>[{_GO}, {_STOP}]"


def _action(name: str, arguments: str) -> str:
    return f'{{"tool_call_id": "0", "tool_name": "{name}", "parameters": {arguments}}}'


class TestCommand(FamilyTests):
    FORMAT = "command"
    TEMPLATE = _template(
        "<|START_THINKING|>I call.<|END_THINKING|><|START_ACTION|>[\n    ",
        _action("NAME", "ARGUMENTS"),
        "\n]<|END_ACTION|>",
    )
    SPECIAL = ("<|START_THINKING|>", "<|END_THINKING|>")
    OUTPUTS: ClassVar[Outputs] = (
        (
            "<|START_THINKING|>I go.<|END_THINKING|><|START_ACTION|>[\n    "
            + _action("go", '{"at": 3}') + ",\n    " + _action("stop", "{}") + "\n]<|END_ACTION|>",
            [thought("I go."), *call(0, "go", '{"at": 3}'), *call(1, "stop", "{}")],
        ),
        ("Hi.", [content("Hi.")]),
    )  # fmt: skip
    GO = "<|START_ACTION|>[\n    " + _action("go", '{"to":"Köln <3","at":3}') + "\n]<|END_ACTION|>"
    TWO = (
        "<|START_ACTION|>[\n    " + _action("go", '{"to":"Köln <3","at":3}')
        + ",\n    " + _action("stop", "{}") + "\n]<|END_ACTION|>"
    )  # fmt: skip


def _kimi(name: str, number: int, arguments: str) -> str:
    return f"<|tool_call_begin|>functions.{name}:{number}<|tool_call_argument_begin|>{arguments}<|tool_call_end|>"


_K, _K_END = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"


class TestKimiK2(FamilyTests):
    FORMAT = "kimi_k2"
    TEMPLATE = _template(_K, _kimi("NAME", 0, "ARGUMENTS"), _K_END)
    OUTPUTS: ClassVar[Outputs] = (
        ("I go." + _K + _kimi("go", 0, '{"at": 3}') + _kimi("stop", 1, "{}") + _K_END,
         [content("I go."), *call(0, "go", '{"at": 3}'), *call(1, "stop", "{}")]),
    )  # fmt: skip
    NO_CALLS: ClassVar[Sequence[str]] = (_K + "<|tool_call_begin|>nothing" + _K_END,)
    GO = _K + _kimi("go", 0, '{"to":"Köln <3","at":3}') + _K_END
    TWO = _K + _kimi("go", 0, '{"to":"Köln <3","at":3}') + _kimi("stop", 0, "{}") + _K_END


def _glm(name: str, **arguments: str) -> str:
    pairs = (f"<arg_key>{key}</arg_key>\n<arg_value>{value}</arg_value>\n" for key, value in arguments.items())
    return f"<tool_call>{name}\n{''.join(pairs)}</tool_call>"


class TestGlm45(FamilyTests):
    FORMAT = "glm45"
    TEMPLATE = _template("", _glm("NAME", arguments="ARGUMENTS"), "")
    OUTPUTS: ClassVar[Outputs] = (
        ("I go.\n" + _glm("go", to="12", at="3") + "\n" + _glm("stop"),
         [content("I go."), *call(0, "go", '{"to": "12", "at": 3}'), *call(1, "stop", "{}")]),
    )  # fmt: skip
    GO = _glm("go", to="Köln <3", at="3")
    TWO = GO + "\n" + _glm("stop")


def _minimax(name: str, **arguments: str) -> str:
    parameters = "".join(f'<parameter name="{key}">{value}</parameter>\n' for key, value in arguments.items())
    return f'<invoke name="{name}">\n{parameters}</invoke>\n'


class TestMiniMaxM2(FamilyTests):
    FORMAT = "minimax_m2"
    TEMPLATE = _template("<minimax:tool_call>\n", _minimax("NAME", arguments="ARGUMENTS"), "</minimax:tool_call>")
    OUTPUTS: ClassVar[Outputs] = (
        ("I go.<minimax:tool_call>\n" + _minimax("go", to="a\nb", at="3") + _minimax("stop") + "</minimax:tool_call>",
         [content("I go."), *call(0, "go", '{"to": "a\\nb", "at": 3}'), *call(1, "stop", "{}")]),
    )  # fmt: skip
    GO = "<minimax:tool_call>\n" + _minimax("go", to="Köln <3", at="3") + "</minimax:tool_call>"
    TWO = (
        "<minimax:tool_call>\n" + _minimax("go", to="Köln <3", at="3") + _minimax("stop") + "</minimax:tool_call>"
    )  # fmt: skip
