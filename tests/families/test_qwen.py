"""Qwen2.5 and Qwen3, which call like Hermes, SmolLM2 and Granite 4; Qwen3-Coder, which calls in XML."""

from collections.abc import Sequence
from typing import ClassVar

from tests.family_tests import FamilyTests, Outputs, call, content, thought

_TURNS = (
    "{%- for message in messages %}\n"
    "    {%- if message.role == 'assistant' and message.tool_calls %}\n"
    "        {{- '<|im_start|>assistant' }}\n"
    "        {%- if message.content %}{{- '\\n' + message.content }}{%- endif %}\n"
    "        {%- for tool_call in message.tool_calls %}\n"
    "            {%- if tool_call.function is defined %}{%- set tool_call = tool_call.function %}{%- endif %}\n"
    "            @CALL@\n"
    "        {%- endfor %}\n"
    "        {{- '<|im_end|>\\n' }}\n"
    "    {%- elif message.role == 'tool' %}\n"
    "        {%- if messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}\n"
    "        {{- '\\n<tool_response>\\n' ~ message.content ~ '\\n</tool_response>' }}\n"
    "        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}\n"
    "    {%- else %}\n"
    "        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}\n"
    "    {%- endif %}\n"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}@END@{%- endif %}"
)
_TOOLS = (
    "{%- if tools %}\n"
    "    {{- '<|im_start|>system\\n# Tools\\n\\n<tools>' }}\n"
    "    {%- for tool in tools %}{{- '\\n' }}{{- tool | tojson }}{%- endfor %}\n"
    "    {{- '\\n</tools>\\n\\n@HOW@<|im_end|>\\n' }}\n"
    "{%- endif %}\n"
)
_JSON_HOW = '<tool_call>\\n{\\"name\\": <function-name>, \\"arguments\\": <args-json-object>}\\n</tool_call>'
_JSON_CALL = (
    '{{- \'\\n<tool_call>\\n{"name": "\' ~ tool_call.name ~ \'", "arguments": \' }}'
    "{{- tool_call.arguments if tool_call.arguments is string else tool_call.arguments | tojson }}"
    "{{- '}\\n</tool_call>' }}"
)
_JSON = _TOOLS.replace("@HOW@", _JSON_HOW) + _TURNS.replace("@CALL@", _JSON_CALL)

_GO = '<tool_call>\n{"name": "go", "arguments": {"to": "}\\" {", "at": 3}}\n</tool_call>'
_GO_ARGUMENTS = '{"to": "}\\" {", "at": 3}'
_STOP = '<tool_call>\n{"name": "stop", "arguments": {}}\n</tool_call>'


class TestQwen25(FamilyTests):
    FORMAT = "hermes"
    TEMPLATE = _JSON.replace("@END@", "")
    OUTPUTS: ClassVar[Outputs] = (
        ("Paris < London <tool", [content("Paris < London <tool")]),
        (_GO, call(0, "go", _GO_ARGUMENTS)),
        (f"I go.\n{_GO}\n{_STOP}\n", [content("I go."), *call(0, "go", _GO_ARGUMENTS), *call(1, "stop", "{}")]),
        (f"{_STOP} So it is.", [*call(0, "stop", "{}"), content("So it is.")]),
        (
            f"Not so: <tool_call>\nnone</tool_call>\nbut {_STOP}",
            [content("Not so: <tool_call>\nnone</tool_call>\nbut"), *call(0, "stop", "{}")],
        ),
        ('<tool_call>{"arguments": {"at": 1}, "name": "go"}</tool_call>', call(0, "go", '{"at": 1}')),
    )
    NO_CALLS: ClassVar[Sequence[str]] = (
        "<tool_call>nonsense</tool_call> so",
        'See <tool_call>\n{"name": 3}\n</tool_call> there',
        '<tool_call>{"name": "go", "arguments": </tool_call>',
        "<tool_call></tool_call>",
        '<tool_call>\n{"name": "go"',
    )
    GO = '<tool_call>\n{"name": "go", "arguments": {"to":"Köln <3","at":3}}\n</tool_call>'
    TWO = GO + '\n<tool_call>\n{"name": "stop", "arguments": {}}\n</tool_call>'


class TestQwen3(TestQwen25):
    TEMPLATE = _JSON.replace(
        "@END@",
        "{%- if enable_thinking is defined and enable_thinking is false %}"
        "{{- '<think>\\n\\n</think>\\n\\n' }}"
        "{%- endif %}",
    )
    SPECIAL = ("<think>", "</think>")
    OUTPUTS: ClassVar[Outputs] = (
        *TestQwen25.OUTPUTS,
        (f"<think>\nHm </thin\n</think>\n\n{_GO}", [thought("Hm </thin"), *call(0, "go", _GO_ARGUMENTS)]),
        ("<think>\n\n</think>\n\nHi.", [content("Hi.")]),
        ("<think>\nStill <tool_call>", [thought("Still <tool_call>")]),
    )


class TestQwen3WithoutThinking(TestQwen3):
    VALUES = {"enable_thinking": False}  # noqa: RUF012
    OUTPUTS: ClassVar[Outputs] = TestQwen25.OUTPUTS


_XML_HOW = "<tool_call>\\n<function=example>\\n<parameter=key>\\nvalue\\n</parameter>\\n</function>\\n</tool_call>"
_XML_CALL = (
    "{{- '\\n<tool_call>\\n<function=' ~ tool_call.name ~ '>\\n' }}"
    "{%- for key, value in tool_call.arguments | items %}"
    "{%- set value = value | tojson if value is mapping else value | string %}"
    "{{- '<parameter=' ~ key ~ '>\\n' ~ value ~ '\\n</parameter>\\n' }}"
    "{%- endfor %}"
    "{{- '</function>\\n</tool_call>' }}"
)


def _xml(name: str, **arguments: str) -> str:
    parameters = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in arguments.items())
    return f"<tool_call>\n<function={name}>\n{parameters}</function>\n</tool_call>"


class TestQwen3Coder(FamilyTests):
    FORMAT = "qwen3_coder"
    TEMPLATE = (_TOOLS.replace("@HOW@", _XML_HOW) + _TURNS.replace("@CALL@", _XML_CALL)).replace("@END@", "")
    OUTPUTS: ClassVar[Outputs] = (
        (
            "I go." + _xml("go", to='a "b"\n\n<c>', at="3", via='["x", "y"]'),
            [content("I go."), *call(0, "go", '{"to": "a \\"b\\"\\n\\n<c>", "at": 3, "via": ["x", "y"]}')],
        ),
        (_xml("go", to="12", at="x") + "\n" + _xml("stop"),
         [*call(0, "go", '{"to": "12", "at": "x"}'), *call(1, "stop", "{}")]),
        ("<tool_call><function=go><parameter=at>3</parameter></function></tool_call>", call(0, "go", '{"at": 3}')),
        (_xml("other", some="True", more="[1"), call(0, "other", '{"some": true, "more": "[1"}')),
    )  # fmt: skip
    NO_CALLS: ClassVar[Sequence[str]] = (
        "<tool_call>\n<function=go>\n<parameter=at>\n3\n",
        "<tool_call>\nno function</function> at all",
    )
    GO = _xml("go", to="Köln <3", at="3")
    TWO = GO + "\n" + _xml("stop")
