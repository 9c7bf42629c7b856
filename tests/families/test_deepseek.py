"""DeepSeek V3, R1 and V3.1, and the distillates of R1, which think and do not call."""

from collections.abc import Callable, Sequence
from typing import ClassVar

from tests.family_tests import FamilyTests, Outputs, call, content, thought

_TURNS = (
    "{%- set ns = namespace(is_tool=false, system_prompt='') -%}\n"
    "{%- for message in messages -%}\n"
    "    {%- if message['role'] == 'system' -%}{%- set ns.system_prompt = message['content'] -%}{%- endif -%}\n"
    "{%- endfor -%}\n"
    "{{ bos_token }}{{ ns.system_prompt }}@TOOLS@\n"
    "{%- for message in messages -%}\n"
    "    {%- if message['role'] == 'user' -%}{%- set ns.is_tool = false -%}{{ '<｜User｜>' + message['content'] }}\n"
    "    {%- elif message['role'] == 'assistant' and message['tool_calls'] is defined -%}\n"
    "        {{ '<｜Assistant｜>' + (message['content'] or '') + '<｜tool▁calls▁begin｜>' }}\n"
    "        {%- for tool in message['tool_calls'] -%}@CALL@{%- endfor -%}\n"
    "        {{ '<｜tool▁calls▁end｜><｜end▁of▁sentence｜>' }}\n"
    "    {%- elif message['role'] == 'assistant' -%}\n"
    "        {%- set content = message['content'] -%}\n"
    "        {%- if '</think>' in content -%}{%- set content = content.split('</think>')[-1] -%}{%- endif -%}\n"
    "        {{ ('' if ns.is_tool else '<｜Assistant｜>') + content + '<｜end▁of▁sentence｜>' }}\n"
    "    {%- elif message['role'] == 'tool' -%}\n"
    "        {%- set ns.is_tool = true -%}\n"
    "        {{ '<｜tool▁output▁begin｜>' + message['content'] + '<｜tool▁output▁end｜>' }}\n"
    "    {%- endif -%}\n"
    "{%- endfor -%}\n"
    "{%- if add_generation_prompt and not ns.is_tool -%}{{ '<｜Assistant｜>' }}@END@{%- endif -%}\n"
)
_TOOLS = "{%- for tool in tools or [] -%}{{ '\\n' + tool | tojson }}{%- endfor -%}"

_B, _E = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"


def _v3(name: str, arguments: str) -> str:
    return f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>{name}\n```json\n{arguments}\n```<｜tool▁call▁end｜>"


def _v31(name: str, arguments: str) -> str:
    return f"<｜tool▁call▁begin｜>{name}<｜tool▁sep｜>{arguments}<｜tool▁call▁end｜>"


def _written(call_of: Callable[[str, str], str]) -> str:
    """A call as an expression of a template."""
    call = call_of("' + tool.function.name + '", "' + tool.function.arguments | tojson + '")
    return "{{ '" + call.replace("\n", "\\n") + "' }}"


class TestDeepSeekR1(FamilyTests):
    FORMAT = "deepseek_v3"
    TEMPLATE = (
        _TURNS.replace("@TOOLS@", _TOOLS)
        .replace("@CALL@", _written(_v3))
        .replace("@END@", "{{ '<think>\\n' }}")
    )  # fmt: skip
    SPECIAL = ("<think>", "</think>")
    OUTPUTS: ClassVar[Outputs] = (
        (
            "Hm <｜tool.\n</think>\n\n" + _B + _v3("go", '{"to": "```", "at": 3}') + "\n" + _v3("stop", "{}") + _E,
            [thought("Hm <｜tool."), *call(0, "go", '{"to": "```", "at": 3}'), *call(1, "stop", "{}")],
        ),
        ("Hm.</think>I go." + _B + _v3("stop", "{}") + _E + "\nDone.",
         [thought("Hm."), content("I go."), *call(0, "stop", "{}"), content("Done.")]),
        ("Hm.</think>" + _B + _v31("go", '{"at": 3}') + _E, [thought("Hm."), *call(0, "go", '{"at": 3}')]),
        ("</think>Hi.", [content("Hi.")]),
    )  # fmt: skip
    GO = _B + _v3("go", '{"to":"Köln <3","at":3}') + _E
    TWO = _B + _v3("go", '{"to":"Köln <3","at":3}') + "\n" + _v3("stop", "{}") + _E


class TestDeepSeekV31(FamilyTests):
    FORMAT = "deepseek_v31"
    TEMPLATE = (
        _TURNS.replace("@TOOLS@", _TOOLS)
        .replace("@CALL@", _written(_v31))
        .replace("@END@", "{{ '<think>' if thinking else '</think>' }}")
    )
    OUTPUTS: ClassVar[Outputs] = (
        (_B + _v31("go", '{"to": "{", "at": 3}') + _E, call(0, "go", '{"to": "{", "at": 3}')),
        ("I go." + _B + _v31("go", "{}") + _v31("stop", "{}") + _E,
         [content("I go."), *call(0, "go", "{}"), *call(1, "stop", "{}")]),
    )  # fmt: skip
    NO_CALLS: ClassVar[Sequence[str]] = (
        _B + "<｜tool▁call▁begin｜>nothing" + _E,
        _B + "<｜tool▁call▁begin｜>go<｜tool▁sep｜>",
        _B + _E,
    )
    GO = _B + _v31("go", '{"to":"Köln <3","at":3}') + _E
    TWO = _B + _v31("go", '{"to":"Köln <3","at":3}') + _v31("stop", "{}") + _E


class TestDeepSeekV31Thinking(TestDeepSeekV31):
    VALUES = {"thinking": True}  # noqa: RUF012
    OUTPUTS: ClassVar[Outputs] = TestDeepSeekR1.OUTPUTS
    NO_CALLS: ClassVar[Sequence[str]] = ()


class TestDistillateOfR1(FamilyTests):
    FORMAT = None
    TEMPLATE = _TURNS.replace("@TOOLS@", "").replace("@CALL@", "").replace("@END@", "{{ '<think>\\n' }}")
    OUTPUTS: ClassVar[Outputs] = (
        ("Hm </thin\n</think>\n\nHi < you </think> too.", [thought("Hm </thin"), content("Hi < you </think> too.")]),
        ("Still thinking", [thought("Still thinking")]),
    )
