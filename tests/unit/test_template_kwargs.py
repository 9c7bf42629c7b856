"""What a request says about thinking, and other values for a chat template, reach the template and the prompt."""

from typing import Any

import pytest
from pydantic import ValidationError

from dialects import anthropic_requests, openai_chat, openai_response_requests
from dialects.anthropic_requests import MessagesBody, PromptBody
from dialects.fields import ignored_fields_context
from dialects.native import JobBody
from dialects.openai_chat import ChatCompletionBody
from dialects.openai_response_requests import ResponseBody
from domain.catalog import ModelSpec
from domain.errors import UnsupportedParameter
from domain.job_options import JobOptions
from domain.requests import GenerationRequest
from tasks.submit import request_hash
from text.model_files import GenerationDefaults
from text.models import ModelView
from text.outputs import ReasoningFormat, ReasoningPiece
from text.parsers import parser_of
from text.templates import ChatTemplate, TemplateChoice
from text.tokenizers import ByteEncoder

TURNS = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"

#: Like Qwen3: thinks unless told not to, and then the prompt holds an empty thought.
SWITCHED = (
    TURNS + "a:{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
)
#: Like Qwen3.5: the prompt opens the thought.
OPENED = (
    TURNS + "a:{% if enable_thinking is defined and not enable_thinking %}<think></think>{% else %}<think>{% endif %}"
)
#: Like DeepSeek V3.1: thinks only if told to.
UNASKED = TURNS + "a:{% if thinking is defined and thinking %}<think>{% else %}</think>{% endif %}"
#: Like GPT-OSS.
LEVELS = "{% if reasoning_effort is not defined %}{% set reasoning_effort = 'medium' %}{% endif %}" + (
    "Reasoning: {{ reasoning_effort }}\n" + TURNS
)
#: Like the distillates of DeepSeek-R1, which always think.
ALWAYS = TURNS + "a:<think>\n"
PLAIN = TURNS + "a:"


def view_of(template: str) -> ModelView:
    spec = ModelSpec(id="m", path="m", backend="fake", max_model_len=1_000, max_num_seqs=8, max_num_batched_tokens=16)
    return ModelView(
        spec,
        revision="r",
        encoder=ByteEncoder(),
        chat_template=TemplateChoice(spec, {"default": ChatTemplate(template, {"eos_token": "</s>"})}),
        defaults=GenerationDefaults(),
        vocab_size=300,
    )


def native(view: ModelView, **fields: Any) -> GenerationRequest:
    messages = [{"role": "user", "content": "Hi"}]
    return JobBody.model_validate({"model": "m", "messages": messages} | fields).to_request()


def chat(view: ModelView, **fields: Any) -> GenerationRequest:
    body = ChatCompletionBody.model_validate({"model": "m", "messages": [{"role": "user", "content": "Hi"}]} | fields)
    return openai_chat.to_generation_request(body, view)


def responses(view: ModelView, reasoning_effort: str | None = None, **fields: Any) -> GenerationRequest:
    reasoning = {} if reasoning_effort is None else {"reasoning": {"effort": reasoning_effort}}
    body = ResponseBody.model_validate({"model": "m", "input": "Hi"} | reasoning | fields)
    return openai_response_requests.to_generation_request(body, view)


def prompt_of(view: ModelView, request: GenerationRequest) -> str:
    return view.decode(view.encode(request))


@pytest.mark.parametrize("ask", [native, chat, responses])
@pytest.mark.parametrize(
    ("template", "effort", "ending"),
    [
        (SWITCHED, "none", "a:<think>\n\n</think>\n\n"),
        (SWITCHED, "high", "a:"),
        (SWITCHED, None, "a:"),
        (OPENED, "none", "a:<think></think>"),
        (OPENED, "low", "a:<think>"),
        (UNASKED, None, "a:</think>"),
        (UNASKED, "medium", "a:<think>"),
    ],
)
def test_an_effort_turns_thinking_on_or_off(ask: Any, template: str, effort: str | None, ending: str) -> None:
    view = view_of(template)
    fields = {} if effort is None else {"reasoning_effort": effort}
    assert prompt_of(view, ask(view, **fields)).endswith(ending)


@pytest.mark.parametrize(
    ("effort", "level"), [("minimal", "low"), ("low", "low"), ("medium", "medium"), ("xhigh", "high"), ("max", "high")]
)
def test_a_template_with_levels_gets_the_nearest_one(effort: str, level: str) -> None:
    view = view_of(LEVELS)
    assert prompt_of(view, chat(view, reasoning_effort=effort)).startswith(f"Reasoning: {level}\n")


@pytest.mark.parametrize("ask", [native, chat, responses])
@pytest.mark.parametrize(
    ("template", "effort", "remedy"), [(LEVELS, "none", "send 'low'"), (ALWAYS, "low", "leave it out")]
)
def test_an_effort_that_cannot_be_applied_is_refused(ask: Any, template: str, effort: str, remedy: str) -> None:
    view = view_of(template)
    with pytest.raises(UnsupportedParameter, match=remedy) as refused:
        view.encode(ask(view, reasoning_effort=effort))
    assert refused.value.param in ("reasoning_effort", "reasoning.effort")


def test_an_effort_for_a_model_that_does_not_reason_is_ignored_and_named() -> None:
    view, ignored = view_of(PLAIN), ignored_fields_context.set([])
    assert chat(view, reasoning_effort="none").reasoning_effort is None
    assert ignored_fields_context.get() == ["reasoning_effort"]
    ignored_fields_context.reset(ignored)


def test_values_for_the_template_reach_it_and_those_that_it_does_not_read_are_named() -> None:
    view, ignored = view_of(SWITCHED), ignored_fields_context.set([])
    request = chat(view, chat_template_kwargs={"enable_thinking": False, "colour": "red"})
    assert prompt_of(view, request).endswith("</think>\n\n")
    assert ignored_fields_context.get() == ["chat_template_kwargs.colour"]
    ignored_fields_context.reset(ignored)
    both = native(view, chat_template_kwargs={"enable_thinking": True}, reasoning_effort="none")
    assert prompt_of(view, both).endswith("a:"), "what is more precise counts"


def test_what_a_thought_is_depends_on_whether_the_prompt_has_opened_one() -> None:
    view = view_of(OPENED)
    asked = [native(view), native(view, reasoning_effort="none"), native(view, chat_template_kwargs={"thinking": 1})]
    formats = [view.output_format.reasoning_of(request) for request in asked]
    assert formats == [ReasoningFormat.OPENED, ReasoningFormat.TAGGED, ReasoningFormat.OPENED]
    pieces = parser_of(asked[1], view.output_format).push("Hello")
    assert not any(isinstance(piece, ReasoningPiece) for piece in pieces)
    assert view_of(UNASKED).output_format.reasoning_of(asked[2]) is ReasoningFormat.OPENED


@pytest.mark.parametrize(
    ("fields", "ending"),
    [
        ({"thinking": {"type": "disabled"}}, "</think>"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1_024}}, "<think>"),
        ({"thinking": {"type": "adaptive"}, "output_config": {"effort": "low"}}, "<think>"),
        ({}, "</think>"),
    ],
)
def test_anthropics_thinking_reaches_the_template_also_where_tokens_are_counted(
    fields: dict[str, Any], ending: str
) -> None:
    view = view_of(UNASKED)
    asked = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]} | fields
    request = anthropic_requests.to_generation_request(MessagesBody.model_validate(asked | {"max_tokens": 5}), view)
    counted = anthropic_requests.to_prompt(PromptBody.model_validate(asked), view)
    assert prompt_of(view, request) == prompt_of(view, counted)
    assert prompt_of(view, request).endswith(ending)


def test_requests_that_differ_only_in_this_have_different_hashes() -> None:
    view = view_of(SWITCHED)
    asked = [
        native(view),
        native(view, reasoning_effort="none"),
        native(view, chat_template_kwargs={"enable_thinking": False}),
        native(view, chat_template_kwargs={"enable_thinking": True}),
    ]
    assert len({request_hash(request, JobOptions()) for request in asked}) == len(asked)


@pytest.mark.parametrize(
    ("kwargs", "reason"),
    [
        ({"messages": []}, "messages is what the template gets from the server"),
        ({"self": 1}, "self is what"),
        ({"bos_token": "x"}, "bos_token is what"),
        ({"a-b": 1}, "pattern"),
        ({"_x": 1}, "pattern"),
        ({f"n{number}": 1 for number in range(17)}, "at most 16"),
        ({"a": [[[[1]]]]}, "more than 4 levels deep"),
        ({"a": "x" * 5_000}, "bytes of JSON; send at most 4096"),
    ],
)
def test_values_beyond_the_limits_are_refused(kwargs: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        native(view_of(PLAIN), chat_template_kwargs=kwargs)


def test_they_need_a_chat() -> None:
    with pytest.raises(ValidationError, match="needs messages"):
        GenerationRequest(model="m", prompt="Hi", reasoning_effort="low")
