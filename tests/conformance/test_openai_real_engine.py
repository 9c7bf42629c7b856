"""What only a real engine obeys, through the unmodified SDK: schemas, and tools that must be called. The weights are
those of the embedded model, under a chat template that shows tools as Hermes and Qwen are shown them."""

import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import openai
import pytest
from pydantic import BaseModel, ConfigDict, Field
from tokenizers import Tokenizer

from settings import ROOT
from tests.chaos.plant import Plant, start_prepared

pytestmark = pytest.mark.slow

MODEL = "with-tools"
TEMPLATE = (
    "{% if tools %}Tools: {{ tools | tojson }} Call one with <tool_call>.\n{% endif %}"
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n"
    "{% for call in message['tool_calls'] or [] %}<tool_call>{{ call | tojson }}</tool_call>\n{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Rome"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
FUNCTION: Any = {"name": "forecast", "description": "The weather to come", "parameters": PARAMETERS}
OTHER: Any = {"name": "now", "parameters": {"type": "object", "properties": {}, "additionalProperties": False}}
MESSAGES: Any = [{"role": "user", "content": "Will it rain in Rome?"}]


class Animal(BaseModel):
    model_config = ConfigDict(extra="forbid")

    kind: Literal["fox", "owl", "hare"]
    legs: Literal[2, 4]


class Forecast(BaseModel):
    model_config = ConfigDict(extra="forbid")

    city: Literal["Oslo", "Rome"]
    days: Annotated[int, Field(ge=1, le=9)]


@pytest.fixture(scope="module")
def client() -> Iterator[openai.OpenAI]:
    folder = Path(tempfile.mkdtemp(prefix="celeriac-tools-"))
    model = shutil.copytree(ROOT / "models" / "celeriac-mini", folder / "model")
    (model / "chat_template.jinja").write_text(TEMPLATE)
    models = f'[[models]]\nid = "{MODEL}"\npath = "{model}"\nmax_model_len = 1024\nmax_num_seqs = 8\n'
    with Plant(folder / "plant", models=models, worker_models={"gpu-1": MODEL}, start=start_prepared) as plant:
        plant.start_servers()
        plant.start_parts()
        plant.wait_until_ready()
        with openai.OpenAI(base_url=f"{plant.api_urls[0]}/v1", api_key="any", timeout=60) as client:
            yield client
    shutil.rmtree(folder, ignore_errors=True)


def is_forecast(arguments: str) -> bool:
    asked = json.loads(arguments)
    return set(asked) == {"city", "days"} and asked["city"] in ("Oslo", "Rome") and 1 <= asked["days"] <= 9


def test_chat_parses_into_a_model(client: openai.OpenAI) -> None:
    parsed = client.chat.completions.parse(
        model=MODEL, messages=MESSAGES, response_format=Animal, temperature=1.0, seed=3, max_tokens=100
    )
    assert parsed.choices[0].finish_reason == "stop"
    assert isinstance(parsed.choices[0].message.parsed, Animal)


def test_a_response_parses_into_a_model(client: openai.OpenAI) -> None:
    parsed = client.responses.parse(model=MODEL, input="Name one.", text_format=Animal, max_output_tokens=100)
    assert parsed.status == "completed"
    assert isinstance(parsed.output_parsed, Animal)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "forecast"}}])
def test_chat_calls_the_tool_that_it_must(client: openai.OpenAI, choice: Any) -> None:
    asked: Any = {
        "model": MODEL,
        "messages": MESSAGES,
        "tools": [{"type": "function", "function": FUNCTION}],
        "tool_choice": choice,
        "parallel_tool_calls": False,
        "max_tokens": 200,
        "seed": 1,
    }
    whole = client.chat.completions.create(**asked)
    assert whole.choices[0].finish_reason == "tool_calls"
    [call] = whole.choices[0].message.tool_calls or []
    assert call.type == "function"
    assert call.function.name == "forecast"
    assert is_forecast(call.function.arguments)
    with client.chat.completions.stream(**asked) as stream:
        final = stream.get_final_completion()
    [streamed] = final.choices[0].message.tool_calls or []
    assert streamed.function.arguments == call.function.arguments


def bias_to(text: str) -> dict[str, float]:
    """So that an output begins with `text`, as far as a grammar lets it."""
    tokenizer = Tokenizer.from_file(str(ROOT / "models" / "celeriac-mini" / "tokenizer.json"))
    return {str(tokenizer.encode(text, add_special_tokens=False).ids[0]): 100.0}


@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_chat_with_tools_and_a_format_calls_or_answers(client: openai.OpenAI, is_streamed: bool) -> None:
    asked: Any = {
        "model": MODEL,
        "messages": MESSAGES,
        "tools": [openai.pydantic_function_tool(Forecast, name="forecast")],
        "response_format": Animal,
        "max_tokens": 200,
        "seed": 1,
    }

    def ask(**more: Any) -> Any:
        if not is_streamed:
            return client.chat.completions.parse(**asked | more).choices[0]
        with client.chat.completions.stream(**asked | more) as stream:
            return stream.get_final_completion().choices[0]

    called = ask(logit_bias=bias_to("<tool_call>"), parallel_tool_calls=False)
    assert called.finish_reason == "tool_calls"
    assert is_forecast(called.message.tool_calls[0].function.arguments)
    assert not called.message.content
    answered = ask(logit_bias=bias_to('{"'))
    assert answered.finish_reason == "stop"
    assert isinstance(answered.message.parsed, Animal)
    assert not answered.message.tool_calls
    forced = ask(tool_choice="required", logit_bias=bias_to('{"'), parallel_tool_calls=False)
    assert is_forecast(forced.message.tool_calls[0].function.arguments)
    assert isinstance(ask(tool_choice="none").message.parsed, Animal)


def test_a_response_with_tools_and_a_format_calls_or_answers(client: openai.OpenAI) -> None:
    tools: Any = [{"type": "function", "strict": False, **FUNCTION}]

    def ask(**more: Any) -> Any:
        return client.responses.parse(
            model=MODEL, input="Rain?", tools=tools, text_format=Animal, max_output_tokens=200, **more
        )

    called = ask(extra_body={"logit_bias": bias_to("<tool_call>")}, parallel_tool_calls=False)
    assert [item.type for item in called.output] == ["function_call"]
    assert is_forecast(called.output[0].arguments)
    answered = ask(extra_body={"logit_bias": bias_to('{"')})
    assert isinstance(answered.output_parsed, Animal)
    named = ask(tool_choice={"type": "function", "name": "forecast"})
    assert [item.type for item in named.output] == ["function_call"]


@pytest.mark.parametrize("place", ["response_format", "tools"])
def test_what_cannot_be_followed_names_the_field_of_the_request(client: openai.OpenAI, place: str) -> None:
    never: Any = {"type": "object", "properties": {"a": False}, "required": ["a"]}
    asked: Any = {"response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": never}}}
    if place == "tools":
        tools = [{"type": "function", "function": function} for function in (FUNCTION, OTHER | {"parameters": never})]
        asked = {"tools": tools, "tool_choice": "required"}
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=50, **asked)
    expected = {"response_format": "response_format.json_schema.schema", "tools": "tools.1.function.parameters"}[place]
    assert refused.value.param == expected
    assert f"{expected} cannot be enforced: no value can match it" in refused.value.message


def test_a_response_calls_a_tool_and_goes_on_from_its_output(client: openai.OpenAI) -> None:
    tools: Any = [{"type": "function", **FUNCTION}, {"type": "function", **OTHER}]
    with client.responses.stream(
        model=MODEL,
        input="Will it rain in Rome?",
        tools=tools,
        tool_choice={"type": "function", "name": "forecast"},
        max_output_tokens=200,
    ) as stream:
        kinds = [event.type for event in stream]
        first = stream.get_final_response()
    [call] = first.output
    assert call.type == "function_call"
    assert is_forecast(call.arguments)
    assert "response.function_call_arguments.delta" in kinds
    second = client.responses.create(
        model=MODEL,
        previous_response_id=first.id,
        input=[{"type": "function_call_output", "call_id": call.call_id, "output": "Rain."}],
        tools=tools,
        max_output_tokens=20,
    )
    assert second.status in ("completed", "incomplete")
    listed = client.responses.input_items.list(second.id)
    assert [item.type for item in listed.data] == ["function_call_output"]


SPLIT = "é😀日本👩‍👩‍👧"  # in characters that the model's vocabulary has in pieces only


def test_the_bytes_of_logprobs_join_to_the_text(client: openai.OpenAI) -> None:
    asked: Any = {"model": MODEL, "messages": MESSAGES, "logprobs": True, "top_logprobs": 20, "max_tokens": 60}
    asked["extra_body"] = {"structured_output": {"choices": [SPLIT]}}
    [choice] = client.chat.completions.create(**asked).choices
    streamed = [chunk.choices[0] for chunk in client.chat.completions.create(**asked, stream=True) if chunk.choices]
    assert choice.message.content == "".join(part.delta.content or "" for part in streamed) == SPLIT
    told = [token for part in streamed if part.logprobs for token in part.logprobs.content or []]
    for tokens in (choice.logprobs.content if choice.logprobs else [], told):
        assert b"".join(bytes(token.bytes or []) for token in tokens or []) == SPLIT.encode()
        tops = [top for token in tokens or [] for top in token.top_logprobs]
        assert not any(top.bytes == [0xEF, 0xBF, 0xBD] for top in tops)
        assert any(top.token.startswith("\\x") and len(top.bytes or []) == 1 for top in tops)


def test_the_end_token_is_no_content(client: openai.OpenAI) -> None:
    asked: Any = {"model": MODEL, "messages": MESSAGES, "logprobs": True, "max_tokens": 200, "temperature": 0}
    [choice] = client.chat.completions.create(**asked).choices
    assert choice.finish_reason == "stop"
    tokens = (choice.logprobs.content if choice.logprobs else None) or []
    assert b"".join(bytes(token.bytes or []) for token in tokens).decode() == choice.message.content
    assert all(token.bytes for token in tokens)


def test_the_places_of_a_completions_tokens_are_true_to_its_text(client: openai.OpenAI) -> None:
    asked: Any = {"model": MODEL, "prompt": "日本 is", "echo": True, "logprobs": 5, "max_tokens": 8, "temperature": 0}
    [choice] = client.completions.create(**asked).choices
    logprobs = choice.logprobs
    assert logprobs is not None
    tokens, places = logprobs.tokens or [], logprobs.text_offset or []
    assert choice.text.startswith("日本 is")
    whole = [(token, place) for token, place in zip(tokens, places, strict=True) if not token.startswith("bytes:")]
    assert len(whole) > 4
    ends = [token for token, place in whole if not choice.text.startswith(token, place)]
    assert ends == ["<|end|>"] * len(ends), "a special token has no text"
    assert [token for token in tokens if token.startswith("bytes:\\x")]
    assert places[: tokens.index(" is")] == sorted([0, 1] * 3)
    streamed = [chunk.choices[0].logprobs for chunk in client.completions.create(**asked, stream=True)]
    assert [place for part in streamed if part for place in part.text_offset or []] == places
