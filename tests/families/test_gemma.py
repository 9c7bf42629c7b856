"""Gemma: FunctionGemma and Gemma 4, whose arguments are in a notation of their own. Gemma 3 has no format of its own;
the templates that people use with it ask for Python's, see test_llama.py."""

from collections.abc import Sequence
from typing import ClassVar

from tests.family_tests import FamilyTests, Outputs, call, content

_TURNS = (
    "{%- macro value_of(value) -%}\n"
    "    {%- if value is string -%}{{ '@D@' + value + '@D@' }}\n"
    "    {%- elif value is boolean -%}{{ 'true' if value else 'false' }}\n"
    "    {%- elif value is mapping -%}\n"
    "        {{- '{' -}}\n"
    "        {%- for key, item in value | dictsort -%}\n"
    "            {{- key }}:{{ value_of(item) }}{% if not loop.last %},{% endif %}\n"
    "        {%- endfor -%}{{- '}' -}}\n"
    "    {%- elif value is sequence -%}\n"
    "        {{- '[' -}}{%- for item in value -%}{{ value_of(item) }}{% if not loop.last %},{% endif %}{%- endfor -%}\n"
    "        {{- ']' -}}\n"
    "    {%- else -%}{{ value }}{%- endif -%}\n"
    "{%- endmacro -%}\n"
    "{{ bos_token }}\n"
    "{%- set ns = namespace(prev='') -%}\n"
    "{%- if tools or messages[0]['role'] == 'system' -%}\n"
    "    {{- '<start_of_turn>developer\\n' -}}\n"
    "    {%- if messages[0]['role'] == 'system' -%}{{ messages[0]['content'] | trim }}{%- endif -%}\n"
    "    {%- for tool in tools or [] -%}{{ '<declaration>' + tool['function']['name'] }}"
    "{{ value_of(tool['function']['parameters']) }}{%- endfor -%}\n"
    "    {{- '<end_of_turn>\\n' -}}\n"
    "{%- endif -%}\n"
    "{%- for message in messages -%}\n"
    "    {%- if message['role'] == 'system' -%}{%- continue -%}{%- endif -%}\n"
    "    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}\n"
    "    {%- if ns.prev != 'tool' and role != 'tool' -%}{{ '<start_of_turn>' + role + '\\n' }}{%- endif -%}\n"
    "    {%- for tool_call in message['tool_calls'] or [] -%}\n"
    "        {{ '@B@call:' + tool_call['function']['name'] + value_of(tool_call['function']['arguments']) + '@E@' }}\n"
    "    {%- endfor -%}\n"
    "    {%- if role == 'tool' -%}{{ '<response>' + message['content'] }}\n"
    "    {%- else -%}{{ message['content'] | trim + '<end_of_turn>\\n' }}{%- endif -%}\n"
    "    {%- set ns.prev = role -%}\n"
    "{%- endfor -%}\n"
    "{%- if add_generation_prompt -%}{{- '<start_of_turn>model\\n' -}}{%- endif -%}\n"
)


class TestFunctionGemma(FamilyTests):
    FORMAT = "function_gemma"
    BEGIN, END, DELIMITER = "<start_function_call>", "<end_function_call>", "<escape>"
    TEMPLATE = _TURNS.replace("@B@", BEGIN).replace("@E@", END).replace("@D@", DELIMITER)
    OUTPUTS: ClassVar[Outputs] = (
        (
            '<start_function_call>call:go{to:<escape>a, {b}: "c"<escape>,at:3}<end_function_call>',
            call(0, "go", '{"to": "a, {b}: \\"c\\"", "at": 3}'),
        ),
        (
            "I go.\n<start_function_call>call:go{via:[<escape>x<escape>,<escape>y<escape>],more:{on:true,no:null}}"
            "<end_function_call><start_function_call>call:stop{}<end_function_call>",
            [
                content("I go."),
                *call(0, "go", '{"via": ["x", "y"], "more": {"on": true, "no": null}}'),
                *call(1, "stop", "{}"),
            ],
        ),
        (
            '<start_function_call>call:go{"to": "x", at: 3.5}<end_function_call>',
            call(0, "go", '{"to": "x", "at": 3.5}'),
        ),
        ("Plain <start.", [content("Plain <start.")]),
    )
    NO_CALLS: ClassVar[Sequence[str]] = (
        "<start_function_call>no call<end_function_call>",
        "<start_function_call>call:go{to:<escape>x}<end_function_call>",
        "<start_function_call>call:go{at",
        f"<start_function_call>call:go{{at:{'[' * 3_000}}}<end_function_call>",
    )
    GO = "<start_function_call>call:go{to:<escape>Köln <3<escape>,at:3}<end_function_call>"
    TWO = GO + "<start_function_call>call:stop{}<end_function_call>"


class TestGemma4(FamilyTests):
    FORMAT = "gemma4"
    TEMPLATE = _TURNS.replace("@B@", "<|tool_call>").replace("@E@", "<tool_call|>").replace("@D@", '<|"|>')
    OUTPUTS: ClassVar[Outputs] = (
        ('<|tool_call>call:go{to:<|"|>a "b"<|"|>,at:3}<tool_call|>', call(0, "go", '{"to": "a \\"b\\"", "at": 3}')),
        (
            "So.<|tool_call>call:stop{}<tool_call|><|tool_call>call:go{at:-1}<tool_call|>",
            [content("So."), *call(0, "stop", "{}"), *call(1, "go", '{"at": -1}')],
        ),
    )
    NO_CALLS: ClassVar[Sequence[str]] = ("<|tool_call>call:go<tool_call|>",)
    GO = '<|tool_call>call:go{to:<|"|>Köln <3<|"|>,at:3}<tool_call|>'
    TWO = GO + "<|tool_call>call:stop{}<tool_call|>"
