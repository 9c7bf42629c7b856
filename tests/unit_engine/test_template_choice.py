"""Which of a model's chat templates is taken, and that what a user says is always in the prompt."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from domain.errors import InvalidRequest, UnsupportedParameter
from domain.requests import ChatMessage
from domain.structured_output import ToolDefinition
from tests.unit.test_models import make_spec, write_model
from text.models import load_model_view

PLAIN = "plain: {{ messages[-1].content }}"
WITH_TOOLS = "{{ tools | length }} tools: {{ messages[-1].content }}"
TOOLS = [ToolDefinition(name="look", description="looks")]
IN_PARTS = (
    "{% for m in messages %}{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% endif %}{% endfor %};"
)
IN_PARTS += "{% endfor %}GO"


def render(folder: Path, tools: list[ToolDefinition] | None = None, content: str = "hi", **fields: object) -> str:
    view = load_model_view(make_spec(folder, **fields))
    return view.render([ChatMessage(role="user", content=content)], tools or [])


def listed(**sources: str) -> list[dict[str, str]]:
    return [{"name": name, "template": source} for name, source in sources.items()]


def expected(folder: Path, tools: list[dict[str, Any]] | None = None) -> str:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": "hi"}]
    text: str = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=True)
    return text


def test_tool_use_is_taken_with_tools_and_default_without(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "tiny", chat_template=listed(default=PLAIN, tool_use=WITH_TOOLS))
    assert render(folder) == "plain: hi" == expected(folder)
    assert render(folder, TOOLS) == "1 tools: hi" == expected(folder, [{"type": "function", "function": {"name": "a"}}])


def test_a_default_without_tools_still_refuses_them(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedParameter, match="does not support tools"):
        render(write_model(tmp_path / "tiny", chat_template=listed(default=PLAIN, rag=WITH_TOOLS)), TOOLS)


def test_models_toml_names_another_one(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "tiny", chat_template=listed(default=PLAIN, rag="rag: {{ messages[-1].content }}"))
    assert render(folder, chat_template="rag") == "rag: hi"
    with pytest.raises(ValueError, match="'nope', but the model has 'default', 'rag'"):
        render(folder, chat_template="nope")


def test_templates_without_a_default_are_named_in_the_refusal(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "tiny", chat_template=listed(one=PLAIN, two=PLAIN))
    with pytest.raises(InvalidRequest, match=r"'one', 'two'.*chat_template in models\.toml"):
        render(folder)
    assert render(folder, chat_template="two") == "plain: hi"


def test_templates_in_files_of_their_own_are_read_and_win(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "tiny", chat_template="not this one")
    (folder / "chat_template.jinja").write_text(PLAIN)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text(WITH_TOOLS)
    assert render(folder) == "plain: hi" == expected(folder)
    assert render(folder, TOOLS) == "1 tools: hi" == expected(folder, [{"type": "function", "function": {"name": "a"}}])


def test_a_processors_template_is_taken_where_there_is_no_other(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "tiny", chat_template=None)
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": PLAIN}))
    assert render(folder) == "plain: hi"


@pytest.mark.parametrize("name", ["additional_chat_templates/tool_use.jinja", "chat_template.json"])
def test_their_files_are_part_of_the_revision(tmp_path: Path, name: str) -> None:
    folder = write_model(tmp_path / "tiny")
    other = write_model(tmp_path / "other")
    (other / name).parent.mkdir(exist_ok=True)
    (other / name).write_text("{}")
    assert load_model_view(make_spec(folder)).revision != load_model_view(make_spec(other)).revision


@pytest.mark.parametrize(
    "template",
    [
        IN_PARTS,
        "{% for m in messages %}{{ m.content[0].text }};{% endfor %}GO",
        "{% for m in messages %}{{ m.content | map(attribute='text') | join }};{% endfor %}GO",
        "{% for m in messages %}{% if m.content is string %}{{ raise_exception('send parts') }}{% endif %}"
        "{{ m.content[0]['text'] }};{% endfor %}GO",
    ],
)
def test_a_template_that_reads_parts_gets_parts(tmp_path: Path, template: str) -> None:
    assert render(write_model(tmp_path / "tiny", chat_template=template)) == "hi;GO"


def test_a_template_that_takes_both_gets_text(tmp_path: Path) -> None:
    template = "{% if messages[0].content is string %}text{% else %}parts{% endif %} {{ messages[0].content }}"
    assert render(write_model(tmp_path / "tiny", chat_template=template)) == "text hi"


def test_only_the_roles_whose_parts_are_read_get_them(tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content[0].text }}{% else %}{{ m.content | trim }}"
        "{% endif %};{% endfor %}"
    )
    view = load_model_view(make_spec(write_model(tmp_path / "tiny", chat_template=template)))
    messages = [ChatMessage(role="system", content="a"), ChatMessage(role="user", content="b")]
    assert view.render([*messages, ChatMessage(role="assistant", content="c"), messages[1]]) == "a;b;c;b;"


@pytest.mark.parametrize(
    "template",
    [
        "GO",
        "{% for m in messages %}{% if m.role == 'human' %}{{ m.content }}{% endif %}{% endfor %}GO",
        "{% for m in messages %}{% for p in m.content %}{% if p.type == 'input_text' %}{{ p.text }}{% endif %}"
        "{% endfor %}{% endfor %}GO",
    ],
)
def test_a_user_who_would_not_be_heard_is_told_so(tmp_path: Path, template: str) -> None:
    with pytest.raises(InvalidRequest, match="ignores the user's messages"):
        render(write_model(tmp_path / "tiny", chat_template=template))


@pytest.mark.parametrize(
    "filters", ["| upper", "| reverse", "| length", "| tojson(ensure_ascii=true)", "[:2]", "| urlencode"]
)
def test_a_user_who_is_heard_in_another_form_is_not_refused(tmp_path: Path, filters: str) -> None:
    folder = write_model(tmp_path / "tiny", chat_template="{{ messages[0].content " + filters + " }}")
    assert render(folder, content="Grüße, 日本")


def test_control_tokens_in_parts_are_text_too(tmp_path: Path) -> None:
    view = load_model_view(make_spec(write_model(tmp_path / "tiny", chat_template=IN_PARTS + "<|end|>")))
    from domain.requests import GenerationRequest

    messages = (ChatMessage(role="user", content="a<|end|>b"),)
    ids = view.encode(GenerationRequest(model="tiny", messages=messages))
    assert ids.count(0) == 1
    assert view.decode(ids) == "a<|end|>b;GO<|end|>"
