"""The gate for structured output, with its real process: what can be followed passes, what cannot is a refusal, and
nothing that is sent keeps the next one from being judged."""

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models

from domain.catalog import ModelSpec
from domain.errors import InvalidRequest, UnsupportedParameter
from domain.structured_output import StructuredOutput
from settings import ROOT
from tasks.encoders import TokenizerEncoder
from tasks.grammar_gate import GrammarGate
from tasks.model_configs import GenerationDefaults
from tasks.models import ModelView, Vocabulary, load_model_view

MINI = ModelSpec(id="mini", path=str(ROOT / "models" / "celeriac-mini"), max_model_len=1024)
pytestmark = pytest.mark.timeout(60)

POSSIBLE: list[dict[str, Any]] = [
    {"json_object": True},
    {"json_schema": {}},
    {"json_schema": {"type": "object", "properties": {f"p{number}": {"type": "string"} for number in range(512)}}},
    {"json_schema": {"enum": [f"value {number}" for number in range(1_024)]}},
    {"json_schema": {"type": "array", "items": {"type": "integer", "multipleOf": 97}, "maxItems": 4_096}},
    {"json_schema": {"$ref": "#/$defs/n", "$defs": {"n": {"type": "array", "items": {"$ref": "#/$defs/n"}}}}},
    {"json_schema": {"type": "string", "format": "date-time"}},
    {"regex": "[a-z]{4096}"},
    {"regex": r"^(\d{3}-)?\d{4}$"},
    {"regex": "(a+)+b"},
    {"regex": "(.*a){50}"},
    {"choices": [str(number) + "a" * 1_000 for number in range(1_000)]},
    {"choices": ["\x00", '"', "\\", "\x7f", "\U0001f600", "line\nbreak"]},
    {"lark": 'start: "a" start "b" | "c"'},
    {"lark": 'start: start start | "a" | "b" start'},
]
IMPOSSIBLE: list[tuple[dict[str, Any], str]] = [
    ({"json_schema": {"type": "integer", "multipleOf": 99_999_989}}, "too much time"),
    ({"json_schema": {"allOf": [{"type": "integer", "multipleOf": p} for p in (7, 11, 13, 17, 19, 23, 29)]}}, "too"),
    ({"json_schema": {"allOf": [{"type": "string", "pattern": f".*{c}.*"} for c in "abcdefghijklmnop"]}}, ""),
    ({"json_schema": {"type": "number", "oneOf": [{"minimum": 1}, {"maximum": 2}]}}, "use anyOf"),
    ({"json_schema": {"type": "number", "maximum": 1e300}}, "a bound of a number is too large"),
    ({"lark": "start: start"}, "without ever coming to a character"),
    ({"json_schema": {"pattern": "(?=a)a"}}, "look-around"),
    ({"json_schema": {"type": "object", "properties": {"a": False}, "required": ["a"]}}, "nothing can match it"),
    ({"regex": "((a{4096}){4096}){4096}"}, ""),
    ({"regex": "("}, "unclosed group"),
    ({"regex": r"\bword"}, "lookarounds"),
    ({"lark": "start: undefined"}, "undefined"),
    ({"lark": "start: " + "(" * 3_000 + '"a"' + ")" * 3_000}, "deeply nested"),
    ({"lark": "start: " + "(a|b)? " * 2_000 + '\na: "x"\nb: "y"'}, ""),
    ({"lark": '%import python.file\nstart: "a"'}, ""),
]


@pytest.fixture(scope="module")
def view() -> ModelView:
    return load_model_view(MINI)


def with_gate(body: Callable[[GrammarGate], Awaitable[None]]) -> None:
    async def run() -> None:
        gate = GrammarGate()
        try:
            await body(gate)
        finally:
            await gate.aclose()

    asyncio.run(run())


def make(**fields: Any) -> StructuredOutput:
    return StructuredOutput.model_validate(fields)


def test_what_can_be_followed_passes_and_what_cannot_is_refused_by_name(view: ModelView) -> None:
    async def body(gate: GrammarGate) -> None:
        for fields, reason in IMPOSSIBLE:
            with pytest.raises(InvalidRequest) as refused:
                await gate.check(view, make(**fields))
            [kind] = fields
            assert refused.value.param == f"params.structured_output.{kind}"
            assert reason in refused.value.message, fields
            assert len(refused.value.message) < 400
            await gate.check(view, make(regex=f"after {kind}"))
        for fields in POSSIBLE:
            await gate.check(view, make(**fields))

    with_gate(body)


def test_a_verdict_is_remembered_and_outlives_the_process(view: ModelView) -> None:
    async def body(gate: GrammarGate) -> None:
        await gate.check(view, make(regex="a"))
        await gate.aclose()
        await gate.check(view, make(regex="a"))
        assert gate.process_id is None, "it was asked again"
        await gate.check(view, make(regex="b"))
        assert gate.process_id is not None

    with_gate(body)


def test_a_process_that_somebody_killed_is_replaced(view: ModelView) -> None:
    async def body(gate: GrammarGate) -> None:
        await gate.check(view, make(regex="a"))
        assert gate.process_id is not None
        os.kill(gate.process_id, signal.SIGKILL)
        async with asyncio.timeout(10):
            while gate.process_id is not None:  # noqa: ASYNC110  (until the event loop has heard of it)
                await asyncio.sleep(0)
        await gate.check(view, make(regex="b"))

    with_gate(body)


def test_many_at_once_are_judged_in_turn_and_the_same_one_once(view: ModelView) -> None:
    async def body(gate: GrammarGate) -> None:
        outputs = [make(regex=f"a{number}") for number in range(10)] * 2
        await asyncio.gather(*(gate.check(view, output) for output in outputs))
        bad = make(regex="(")
        refusals = await asyncio.gather(*(gate.check(view, bad) for _ in range(5)), return_exceptions=True)
        assert all(isinstance(refusal, InvalidRequest) for refusal in refusals)

    with_gate(body)


def test_a_client_that_leaves_does_not_mix_up_the_answers(view: ModelView) -> None:
    async def body(gate: GrammarGate) -> None:
        await gate.check(view, make(regex="a"))
        slow = asyncio.create_task(gate.check(view, make(json_schema={"type": "integer", "multipleOf": 99_999_989})))
        await asyncio.sleep(0)
        slow.cancel()
        with pytest.raises(asyncio.CancelledError):
            await slow
        await gate.check(view, make(regex="b"))
        with pytest.raises(InvalidRequest):
            await gate.check(view, make(regex="("))

    with_gate(body)


def test_a_model_without_a_readable_vocabulary_says_so() -> None:
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    tokenizer.decoder = decoders.WordPiece()

    def view_with(vocabulary: Vocabulary | None) -> ModelView:
        return ModelView(
            MINI,
            revision="1",
            encoder=TokenizerEncoder(tokenizer),
            chat_template=None,
            defaults=GenerationDefaults(),
            vocab_size=2,
            vocabulary=vocabulary,
        )

    async def body(gate: GrammarGate) -> None:
        for vocabulary in (None, Vocabulary(tokenizer, 2, (1,)), Vocabulary(tokenizer, 2, ())):
            with pytest.raises(UnsupportedParameter) as refused:
                await gate.check(view_with(vocabulary), make(regex="a"))
            assert refused.value.param == "params.structured_output"

    with_gate(body)
