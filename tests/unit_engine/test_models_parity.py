"""The torch-free path gives the very tokens of transformers' own AutoTokenizer and apply_chat_template."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from domain.catalog import Catalog
from domain.requests import ChatMessage, GenerationRequest
from settings import ROOT
from tests.unit.test_models import make_spec, write_model
from text.models import ModelView, load_model_view

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bos in tokenizer.json": {"begins_with": "<|system|>", "bos_token": "<|system|>"},
    "bos in the config alone, which does not count": {"add_bos_token": True, "bos_token": "<|system|>"},
    "tokens added by the config": {
        "bos_token": {"content": "<s>", "__type": "AddedToken"},
        "additional_special_tokens": ["<|tool|>"],
    },
    "bos in the template": {
        "bos_token": "<|system|>",
        "chat_template": "{{ bos_token }}{% for message in messages %}{{ message | tojson }}\n{% endfor %}",
    },
    "namespaces and loop controls": {
        "chat_template": (
            "{% set seen = namespace(count=0) %}\n"
            "    {% for message in messages %}\n"
            "    {% if loop.index0 > 2 %}{% break %}{% endif %}\n"
            "    {% set seen.count = seen.count + 1 %}\n"
            "{% generation %}{{ dict(role=message.role)['role'] }}: {{ message['content'] }}{% endgeneration %}\n"
            "    {% endfor %}\n"
            "{{ seen.count }}"
        )
    },
}

texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=60)
roles = st.sampled_from(["system", "user", "assistant"])
conversations = st.lists(st.tuples(roles, texts), min_size=1, max_size=5)


@pytest.fixture(scope="module", params=[*VARIANTS, "celeriac-mini"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelView, AutoTokenizer]:
    if request.param == "celeriac-mini":
        spec = Catalog.load(ROOT / "models.toml").get("celeriac-mini")
    else:
        spec = make_spec(write_model(tmp_path_factory.mktemp("model"), **VARIANTS[request.param]))
    return load_model_view(spec), AutoTokenizer.from_pretrained(Path(spec.path))


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=texts)
def test_a_prompt_has_the_same_tokens(pair: tuple[ModelView, AutoTokenizer], text: str) -> None:
    view, tokenizer = pair
    request = GenerationRequest(model="any", prompt=text)
    assert view.encode(request) == tokenizer(text)["input_ids"]


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(turns=conversations)
def test_a_conversation_has_the_same_tokens(
    pair: tuple[ModelView, AutoTokenizer], turns: list[tuple[str, str]]
) -> None:
    view, tokenizer = pair
    plain = [{"role": role, "content": content} for role, content in turns]
    request = GenerationRequest(model="any", messages=tuple(ChatMessage.model_validate(turn) for turn in plain))
    expected = tokenizer.apply_chat_template(plain, add_generation_prompt=True, tokenize=True, return_dict=False)
    assert view.encode(request) == expected
