"""GPT-OSS, whose messages are in channels (harmony)."""

from collections.abc import Sequence
from typing import ClassVar

from tests.family_tests import FamilyTests, Outputs, call, content, thought

_NEXT = "<|start|>assistant"
_THOUGHT = "<|channel|>analysis<|message|>Hm < 2."


def _call(name: str, arguments: str) -> str:
    return f"<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>{arguments}"


class TestGptOss(FamilyTests):
    FORMAT = "harmony"
    TEMPLATE = (
        "{%- macro type_of(schema) -%}\n"
        "    {%- if schema.enum -%}{{ '\"' ~ schema.enum | join('\" | \"') ~ '\"' }}\n"
        "    {%- elif schema.type == 'array' -%}{{ type_of(schema['items']) ~ '[]' }}\n"
        "    {%- elif schema.type == 'integer' -%}{{ 'number' }}{%- else -%}{{ schema.type }}{%- endif -%}\n"
        "{%- endmacro -%}\n"
        "{%- if reasoning_effort is not defined %}{%- set reasoning_effort = 'medium' %}{%- endif %}\n"
        "{{- '<|start|>system<|message|>Reasoning: ' + reasoning_effort + '\\n\\n' }}\n"
        "{{- '# Valid channels: analysis, commentary, final.<|end|>' }}\n"
        "{%- set developer = messages[0].content if messages[0].role in ['developer', 'system'] else '' %}\n"
        "{{- '<|start|>developer<|message|># Instructions\\n\\n' + developer }}\n"
        "{%- if tools %}\n"
        "    {{- '\\n\\n# Tools\\n\\nnamespace functions {\\n' }}\n"
        "    {%- for tool in tools %}\n"
        "        {{- '// ' + tool.function.description + '\\ntype ' + tool.function.name + ' = (_: {\\n' }}\n"
        "        {%- for name, schema in tool.function.parameters.properties.items() %}\n"
        "            {{- name + ('' if name in tool.function.parameters.required or [] else '?') + ': ' }}"
        "{{- type_of(schema) + ',\\n' }}\n"
        "        {%- endfor %}\n"
        "        {{- '}) => any;\\n' }}\n"
        "    {%- endfor %}\n"
        "    {{- '}' }}\n"
        "{%- endif %}\n"
        "{{- '<|end|>' }}\n"
        "{%- set last = namespace(name='') %}\n"
        "{%- for message in messages %}\n"
        "    {%- if message.role == 'user' %}{{- '<|start|>user<|message|>' + message.content + '<|end|>' }}\n"
        "    {%- elif message.tool_calls %}\n"
        "        {%- set tool_call = message.tool_calls[0].function %}\n"
        "        {%- set last.name = tool_call.name %}\n"
        "        {{- '<|start|>assistant to=functions.' ~ tool_call.name ~ '<|channel|>commentary json<|message|>' }}\n"
        "        {{- tool_call.arguments | tojson }}{{- '<|call|>' }}\n"
        "    {%- elif message.role == 'tool' %}\n"
        "        {{- '<|start|>functions.' ~ last.name ~ ' to=assistant<|channel|>commentary<|message|>' }}\n"
        "        {{- message.content | tojson }}{{- '<|end|>' }}\n"
        "    {%- elif message.role == 'assistant' %}\n"
        "        {%- if '<|channel|>analysis<|message|>' in message.content %}\n"
        "            {{- raise_exception('put thoughts into thinking') }}\n"
        "        {%- endif %}\n"
        "        {{- '<|start|>assistant<|channel|>final<|message|>' + message.content + '<|end|>' }}\n"
        "    {%- endif %}\n"
        "{%- endfor %}\n"
        "{%- if add_generation_prompt %}{{- '<|start|>assistant' }}{%- endif %}\n"
    )
    VALUES = {"reasoning_effort": "low"}  # noqa: RUF012
    SPECIAL = ("<|end|>", "<|call|>", "<|return|>")
    OUTPUTS: ClassVar[Outputs] = (
        (_THOUGHT + _NEXT + "<|channel|>final<|message|>Hi.", [thought("Hm < 2."), content("Hi.")]),
        (_THOUGHT + _NEXT + _call("go", '{"to": "<3"}'), [thought("Hm < 2."), *call(0, "go", '{"to": "<3"}')]),
        (
            "<|channel|>commentary<|message|>I go." + _NEXT + _call("go", "{}") + _NEXT + _call("stop", "{}"),
            [content("I go."), *call(0, "go", "{}"), *call(1, "stop", "{}")],
        ),
        (_NEXT.removeprefix("<|start|>assistant") + " to=functions.go<|channel|>commentary json<|message|>{}",
         call(0, "go", "{}")),
    )  # fmt: skip
    NO_CALLS: ClassVar[Sequence[str]] = ("Plain text < 3",)
    GO = _call("go", '{"to":"Köln <3","at":3}')
