"""Llama 3.1 to 3.3, whose calls are JSON alone, and the templates with which Llama 3.2, Llama 4 and Gemma 3 call in
Python's notation."""

from collections.abc import Sequence
from typing import ClassVar

from tests.family_tests import FamilyTests, Outputs, call, content

_TURNS = (
    "{{- bos_token }}\n"
    "{%- if not date_string is defined %}{%- set date_string = '26 Jul 2024' %}{%- endif %}\n"
    "{%- if messages[0]['role'] == 'system' %}\n"
    "    {%- set system_message = messages[0]['content'] | trim %}\n"
    "    {%- set messages = messages[1:] %}\n"
    "{%- else %}\n"
    "    {%- set system_message = '' %}\n"
    "{%- endif %}\n"
    "{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' }}\n"
    "{%- if tools is not none %}{{- 'Environment: ipython\\n' }}{%- endif %}\n"
    "{{- 'Today Date: ' + date_string + '\\n\\n' + system_message + '<|eot_id|>' }}\n"
    "{%- if tools is not none and messages | length != 0 %}\n"
    "    {%- set first_user_message = messages[0]['content'] | trim %}\n"
    "    {%- set messages = messages[1:] %}\n"
    "    {{- '<|start_header_id|>user<|end_header_id|>\\n\\n@HOW@\\n\\n' }}\n"
    "    {%- for t in tools %}{{- t | tojson(indent=4) }}{{- '\\n\\n' }}{%- endfor %}\n"
    "    {{- first_user_message + '<|eot_id|>' }}\n"
    "{%- endif %}\n"
    "{%- for message in messages %}\n"
    "    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}\n"
    "        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}"
    "{{- message['content'] | trim + '<|eot_id|>' }}\n"
    "    {%- elif 'tool_calls' in message %}\n"
    "        {%- if not message.tool_calls | length == 1 %}\n"
    "            {{- raise_exception('This model only supports single tool-calls at once!') }}\n"
    "        {%- endif %}\n"
    "        {%- set tool_call = message.tool_calls[0].function %}\n"
    "        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}@CALL@{{- '<|eot_id|>' }}\n"
    "    {%- else %}\n"
    "        {{- '<|start_header_id|>ipython<|end_header_id|>\\n\\n' }}\n"
    "        {{- message.content | tojson if message.content is mapping else message.content }}{{- '<|eot_id|>' }}\n"
    "    {%- endif %}\n"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}\n"
)


class TestLlama3(FamilyTests):
    FORMAT = "llama3"
    TEMPLATE = _TURNS.replace(
        "@HOW@", 'Respond in the format {"name": function name, "parameters": dictionary of argument name and value}.'
    ).replace(
        "@CALL@",
        "{{- '{\"name\": \"' + tool_call.name + '\", \"parameters\": ' }}{{- tool_call.arguments | tojson }}{{- '}' }}",
    )
    OUTPUTS: ClassVar[Outputs] = (
        ('{"name": "go", "parameters": {"at": 1}}', call(0, "go", '{"at": 1}')),
        ('\n{ "name" : "go" , "parameters" : { "at": 1 } }\n', call(0, "go", '{ "at": 1 }')),
        ('<|python_tag|>{"name": "go", "parameters": {"at": 1}}', call(0, "go", '{"at": 1}')),
        (
            '{"name": "go", "parameters": {"at": 1}}; {"name": "stop", "parameters": {}}',
            [*call(0, "go", '{"at": 1}'), *call(1, "stop", "{}")],
        ),
        ('I go: {"name": "go"}', [content('I go: {"name": "go"}')]),
    )
    NO_CALLS: ClassVar[Sequence[str]] = (
        '{"name": "Jim", "age": 3}',
        '{"name": "Jim", "parameters": {}}',
        '{"name": "go"',
        "<|python_tag|>print(1)",
        '{"names": 1}',
    )
    GO = '{"name": "go", "parameters": {"to":"Köln <3","at":3}}'


class TestLlamaInPython(FamilyTests):
    FORMAT = "python"
    TEMPLATE = _TURNS.replace(
        "@HOW@", "Answer in the format [func_name1(params_name1=params_value1), func_name2(params)]."
    ).replace(
        "@CALL@",
        "{{- '[' + tool_call.name + '(' }}"
        "{%- for name, value in tool_call.arguments.items() %}"
        "{{- name + '=' }}{{- value | tojson }}{{- ', ' if not loop.last }}"
        "{%- endfor %}{{- ')]' }}",
    )
    OUTPUTS: ClassVar[Outputs] = (
        ("[go(to='it\\'s (\"x\")', at=-3)]", call(0, "go", '{"to": "it\'s (\\"x\\")", "at": -3}')),
        (
            '[go(at=3, via=["a", "b"], more={"x": (None, True, null, false)}), stop()]',
            [*call(0, "go", '{"at": 3, "via": ["a", "b"], "more": {"x": [null, true, null, false]}}'),
             *call(1, "stop", "{}")],
        ),
        ("<|python_start|>[go(at=1)]<|python_end|>", call(0, "go", '{"at": 1}')),
        ("I go. <|python_start|>[stop()]<|python_end|>", [content("I go."), *call(0, "stop", "{}")]),
        ("[1, 2] and [go]", [content("[1, 2] and [go]")]),
    )  # fmt: skip
    NO_CALLS: ClassVar[Sequence[str]] = (
        "[1, 2] is a list",
        "[see(the manual)](link)",
        "[go(3)]",
        "[go(at=os.exit())]",
        "[go(at=3",
        "[go(at=1e999)]",
        "[other(at=3)] is",
        f"[go(at={'[' * 500}{']' * 500})]",
    )
    GO = '[go(to="Köln <3", at=3)]'
    TWO = '[go(to="Köln <3", at=3), stop()]'
