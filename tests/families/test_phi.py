"""Phi-4-mini, with its own markers and with those of vLLM's template for it."""

from collections.abc import Sequence
from typing import ClassVar

from tests.family_tests import FamilyTests, Outputs, call, content

_TURNS = (
    "{%- if messages and messages[0]['role'] == 'system' %}\n"
    "    {%- set system_message = messages[0]['content'] | trim %}\n"
    "    {%- set messages = messages[1:] %}\n"
    "{%- else %}\n"
    "    {%- set system_message = 'You are a helpful assistant.' %}\n"
    "{%- endif %}\n"
    "<|system|>\n"
    "{{ system_message }}\n"
    "{%- if tools %}@TOOLS@{%- endif %}<|end|>\n"
    "{%- for message in messages %}\n"
    "<|{{ message.role }}|>\n"
    "    {%- if message.content %}\n"
    "{{ message.content }}\n"
    "    {%- elif message.tool_calls %}\n"
    "@BEGIN@[\n"
    "        {%- for call in message.tool_calls %}\n"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}\n'
    "            {%- if not loop.last %}, {% endif %}\n"
    "        {%- endfor %}]@END@\n"
    "    {%- endif %}<|end|>\n"
    "{%- endfor %}<|assistant|>\n"
)

_GO = '{"name": "go", "arguments": {"to":"Köln <3","at":3}}'
_STOP = '{"name": "stop", "arguments": {}}'


class TestPhi4Mini(FamilyTests):
    FORMAT = "phi4_mini"
    TEMPLATE = (
        _TURNS.replace("@TOOLS@", "<|tool|>{{ tools | tojson }}<|/tool|>")
        .replace("@BEGIN@", "<|tool_call|>")
        .replace("@END@", "<|/tool_call|>")
    )
    OUTPUTS: ClassVar[Outputs] = (
        (
            '<|tool_call|>[{"name": "go", "arguments": {"at": 1}}, {"name": "stop", "arguments": {}}]<|/tool_call|>',
            [*call(0, "go", '{"at": 1}'), *call(1, "stop", "{}")],
        ),
        (
            'I go. <|tool_call|>\n[ {"name": "go", "arguments": {"at": 1}} ]\n<|/tool_call|>\nThen I stop.',
            [content("I go."), *call(0, "go", '{"at": 1}'), content("Then I stop.")],
        ),
        ('functools[{"name": "go", "parameters": {"at": 1}}]', call(0, "go", '{"at": 1}')),
        ("import functools\nfrom x", [content("import functools\nfrom x")]),
    )
    NO_CALLS: ClassVar[Sequence[str]] = (
        "<|tool_call|>[none]<|/tool_call|>",
        "<|tool_call|>[<|/tool_call|>",
        "functools[0]",
    )
    GO = f"<|tool_call|>[{_GO}]<|/tool_call|>"
    TWO = f"<|tool_call|>[{_GO}, {_STOP}]<|/tool_call|>"


class TestPhi4MiniOfVllm(TestPhi4Mini):
    FORMAT = "functools"
    TEMPLATE = (
        _TURNS.replace("@TOOLS@", "\nCall by functools[...]\n{{ tools | tojson(indent=4) }}")
        .replace("@BEGIN@", "functools")
        .replace("@END@", "")
    )
    GO = f"functools[{_GO}]"
    TWO = f"functools[{_GO}, {_STOP}]"
