"""Mistral: a list of calls in JSON until Mistral Small 3.0 and Nemo, names and arguments apart since then."""

from collections.abc import Sequence
from typing import ClassVar

from tests.family_tests import FamilyTests, Outputs, call, content, thought

_TEMPLATE = (
    "{%- set system_message = messages[0]['content'] if messages[0]['role'] == 'system' else '' %}\n"
    "{%- set loop_messages = messages[1:] if system_message else messages %}\n"
    "{%- set user_messages = loop_messages | selectattr('role', 'equalto', 'user') | list %}\n"
    "{{- bos_token }}\n"
    "{%- for message in loop_messages %}\n"
    "    {%- if message['role'] == 'user' %}\n"
    "        {%- if tools is not none and message == user_messages[-1] %}\n"
    "            {{- '[AVAILABLE_TOOLS] ' + (tools | tojson) + '[/AVAILABLE_TOOLS]' }}\n"
    "        {%- endif %}\n"
    "        {%- if loop.last and system_message %}\n"
    "            {{- '[INST] ' + system_message + '\\n\\n' + message['content'] + '[/INST]' }}\n"
    "        {%- else %}\n"
    "            {{- '[INST] ' + message['content'] + '[/INST]' }}\n"
    "        {%- endif %}\n"
    "    {%- elif message['tool_calls'] is defined %}\n"
    "        @CALLS@\n"
    "        {{- eos_token }}\n"
    "    {%- elif message['role'] == 'assistant' %}\n"
    "        {{- ' ' + message['content'] | trim + eos_token }}\n"
    "    {%- elif message['role'] in ['tool', 'tool_results'] %}\n"
    "        {%- if message.tool_call_id is not defined or message.tool_call_id | length != 9 %}\n"
    "            {{- raise_exception('Tool call IDs should be alphanumeric strings with length 9!') }}\n"
    "        {%- endif %}\n"
    "        {{- '[TOOL_RESULTS]{\"content\": ' + message.content | tojson + '}[/TOOL_RESULTS]' }}\n"
    "    {%- else %}\n"
    "        {{- raise_exception('Only user and assistant roles are supported!') }}\n"
    "    {%- endif %}\n"
    "{%- endfor %}\n"
)


class TestMistralOfJson(FamilyTests):
    FORMAT = "mistral"
    TEMPLATE = _TEMPLATE.replace(
        "@CALLS@",
        "{{- '[TOOL_CALLS] [' }}"
        "{%- for tool_call in message.tool_calls %}"
        "{{- tool_call.function | tojson }}{{- ', ' if not loop.last else ']' }}"
        "{%- endfor %}",
    )
    OUTPUTS: ClassVar[Outputs] = (
        (
            '[TOOL_CALLS][{"name": "go", "arguments": {"at": 1}}, {"name": "stop", "arguments": {}}]',
            [*call(0, "go", '{"at": 1}'), *call(1, "stop", "{}")],
        ),
        ('[TOOL_CALLS] [{"arguments": {"at": 1}, "name": "go"}]', call(0, "go", '{"at": 1}')),
        (' [{"name": "go", "arguments": {"at": "]"}}]', call(0, "go", '{"at": "]"}')),
        ('I go.[TOOL_CALLS][{"name": "go", "arguments": {}}]', [content("I go."), *call(0, "go", "{}")]),
        ('[TOOL_CALLS]go[ARGS]{"at": 1}', call(0, "go", '{"at": 1}')),
    )
    NO_CALLS: ClassVar[Sequence[str]] = (
        "[1, 2] is a list",
        '[{"name": "Jim", "arguments": {}}]',
        "[TOOL_CALLS] as text",
        '[{"name": "go"',
    )
    GO = '[{"name": "go", "arguments": {"to":"Köln <3","at":3}}]'
    TWO = GO[:-1] + ', {"name": "stop", "arguments": {}}]'


class TestMistral(FamilyTests):
    FORMAT = "mistral_args"
    TEMPLATE = _TEMPLATE.replace(
        "@CALLS@",
        "{%- for tool_call in message.tool_calls %}"
        "{{- '[TOOL_CALLS]' + tool_call.function.name + '[ARGS]' }}{{- tool_call.function.arguments | tojson }}"
        "{%- endfor %}",
    )
    OUTPUTS: ClassVar[Outputs] = (
        ('[TOOL_CALLS]go[ARGS]{"at": 1}', call(0, "go", '{"at": 1}')),
        (
            'I go. [TOOL_CALLS]go[ARGS]{"to": "} [TOOL_CALLS]"}[TOOL_CALLS]stop[ARGS]{}',
            [content("I go."), *call(0, "go", '{"to": "} [TOOL_CALLS]"}'), *call(1, "stop", "{}")],
        ),
        ('[TOOL_CALLS]go[CALL_ID]abc123xyz[ARGS]{"at": 1}', call(0, "go", '{"at": 1}')),
        ('[TOOL_CALLS]go{"at": 1}', call(0, "go", '{"at": 1}')),
        ('[TOOL_CALLS][{"name": "go", "arguments": {"at": 1}}]', call(0, "go", '{"at": 1}')),
        ("[1] is a list", [content("[1] is a list")]),
    )
    NO_CALLS: ClassVar[Sequence[str]] = (
        "[TOOL_CALLS] as text",
        "[TOOL_CALLS]go[ARGS] nothing",
        "[TOOL_CALLS]" + "x" * 600,
    )
    GO = '[TOOL_CALLS]go[ARGS]{"to":"Köln <3","at":3}'
    TWO = GO + "[TOOL_CALLS]stop[ARGS]{}"


class TestMagistral(TestMistral):
    TEMPLATE = TestMistral.TEMPLATE + "{#- thinks between [THINK] and [/THINK] #}"
    SPECIAL = ("[THINK]", "[/THINK]")
    OUTPUTS: ClassVar[Outputs] = (
        *TestMistral.OUTPUTS,
        ("[THINK]Hm [/T[/THINK][TOOL_CALLS]stop[ARGS]{}", [thought("Hm [/T"), *call(0, "stop", "{}")]),
        ("[THINK]Hm.[/THINK]\nNo.", [thought("Hm."), content("No.")]),
    )
