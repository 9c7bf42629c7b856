"""The gate for structured output, with its real process: what can be followed passes, what cannot is a refusal, and
nothing that is sent keeps the next one from being judged."""

import asyncio
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from tokenizers import Tokenizer, decoders, models

import text.models
from domain.catalog import Catalog, ModelSpec
from domain.errors import InvalidRequest, Overloaded, ServerOverloaded, UnsupportedParameter
from domain.structured_output import StructuredOutput
from settings import ROOT
from tests.waiting import wait_until_async
from text import grammar_compiler
from text.grammar_compiler import MAX_REFUSAL_SECONDS, MAX_WAITING, GrammarGate, RefusalBudget
from text.grammar_process import CPU_SECONDS, NUM_STEPS, _nth_set_bit
from text.model_files import GenerationDefaults
from text.models import ModelView, ModelViews, Vocabulary, follow_models, load_model_view
from text.tokenizers import TokenizerEncoder

MINI = ModelSpec(id="mini", path=str(ROOT / "models" / "celeriac-mini"), max_model_len=1024)
TENANT, OTHER_TENANT = uuid4(), uuid4()

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
    ({"lark": "start: start"}, "without ever producing a character"),
    ({"json_schema": {"pattern": "(?=a)a"}}, "look-around"),
    ({"json_schema": {"type": "object", "properties": {"a": False}, "required": ["a"]}}, "no value can match it"),
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


def slow(number: int) -> StructuredOutput:
    """Another one for each number."""
    return make(json_schema={"type": "integer", "multipleOf": 99_999_989 + 2 * number})


def make(**fields: Any) -> StructuredOutput:
    return StructuredOutput.model_validate(fields)


def test_what_can_be_followed_passes_and_what_cannot_is_refused_by_name(view: ModelView) -> None:
    async def body(gate: GrammarGate) -> None:
        for fields, reason in IMPOSSIBLE:
            with pytest.raises(InvalidRequest) as refused:
                await gate.check(view, make(**fields), TENANT)
            [kind] = fields
            assert refused.value.param == f"params.structured_output.{kind}"
            assert reason in refused.value.message, fields
            assert len(refused.value.message) < 400
            await gate.check(view, make(regex=f"after {kind}"), TENANT)
        for fields in POSSIBLE:
            await gate.check(view, make(**fields), TENANT)

    with_gate(body)


def test_nobody_can_tell_by_the_time_whether_another_tenant_has_used_a_grammar(view: ModelView) -> None:
    async def body(gate: GrammarGate) -> None:
        await gate.check(view, make(regex="a"), TENANT)
        await gate.aclose()
        await gate.check(view, make(regex="a"), OTHER_TENANT)
        assert gate.process_id(MINI.id) is not None, "it is compiled again"

    with_gate(body)


def test_a_verdict_is_remembered_and_outlives_the_process(view: ModelView) -> None:
    async def body(gate: GrammarGate) -> None:
        await gate.check(view, make(regex="a"), TENANT)
        await gate.aclose()
        await gate.check(view, make(regex="a"), TENANT)
        assert gate.process_id(MINI.id) is None, "it was asked again"
        await gate.check(view, make(regex="b"), TENANT)
        assert gate.process_id(MINI.id) is not None

    with_gate(body)


def test_a_process_that_somebody_killed_is_replaced(view: ModelView) -> None:
    async def body(gate: GrammarGate) -> None:
        await gate.check(view, make(regex="a"), TENANT)
        process_id = gate.process_id(MINI.id)
        assert process_id is not None
        os.kill(process_id, signal.SIGKILL)
        await wait_until_async(lambda: not gate.is_ready(MINI.id))
        await gate.check(view, make(regex="b"), TENANT)
        assert gate.process_id(MINI.id) != process_id

    with_gate(body)


def test_many_at_once_are_judged_in_turn_and_the_same_one_once(view: ModelView) -> None:
    async def body(gate: GrammarGate) -> None:
        outputs = [make(regex=f"a{number}") for number in range(10)] * 2
        await asyncio.gather(*(gate.check(view, output, TENANT) for output in outputs))
        bad = make(regex="(")
        refusals = await asyncio.gather(*(gate.check(view, bad, TENANT) for _ in range(5)), return_exceptions=True)
        assert all(isinstance(refusal, InvalidRequest) for refusal in refusals)

    with_gate(body)


def test_a_client_that_leaves_does_not_mix_up_the_answers(view: ModelView) -> None:
    async def body(gate: GrammarGate) -> None:
        await gate.check(view, make(regex="a"), TENANT)
        leaving = asyncio.create_task(gate.check(view, slow(0), TENANT))
        await asyncio.sleep(0)
        leaving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaving
        await gate.check(view, make(regex="b"), TENANT)
        with pytest.raises(InvalidRequest):
            await gate.check(view, make(regex="("), TENANT)

    with_gate(body)


def test_a_vocabulary_is_read_before_it_is_asked_for_and_again_after_a_crash(view: ModelView) -> None:
    async def body(gate: GrammarGate) -> None:
        gate.prepare([view])
        await wait_until_async(lambda: gate.is_ready(MINI.id))
        process_id = gate.process_id(MINI.id)
        assert process_id is not None
        gate.prepare([view])
        assert gate.process_id(MINI.id) == process_id
        os.kill(process_id, signal.SIGKILL)
        await wait_until_async(lambda: not gate.is_ready(MINI.id))
        await wait_until_async(lambda: gate.is_ready(MINI.id))
        gate.prepare([])
        assert gate.process_id(MINI.id) is None

    with_gate(body)


def test_a_costly_grammar_does_not_cost_the_vocabulary(view: ModelView) -> None:
    async def body(gate: GrammarGate) -> None:
        await gate.check(view, make(regex="a"), TENANT)
        process_id = gate.process_id(MINI.id)
        with pytest.raises(InvalidRequest, match="too much time"):
            await gate.check(view, slow(0), TENANT)
        assert gate.process_id(MINI.id) == process_id
        assert gate.is_ready(MINI.id)

    with_gate(body)


def test_while_a_large_vocabulary_is_read_others_go_on_and_its_own_wait(
    view: ModelView, monkeypatch: pytest.MonkeyPatch
) -> None:
    large, other_large = view_of("large", num_tokens=100_300), view_of("other", num_tokens=100_300)

    async def body(gate: GrammarGate) -> None:
        gate.prepare([large, other_large, view])
        await wait_until_async(lambda: gate.process_id("large") is not None)
        process_id = gate.process_id("large")
        assert process_id is not None
        os.kill(process_id, signal.SIGSTOP)
        assert not gate.is_ready("large")
        await gate.check(view, make(regex="a"), TENANT)
        assert gate.process_id("other") is None, "two large ones at once"
        with monkeypatch.context() as patch:
            patch.setattr(grammar_compiler, "PATIENCE_SECONDS", 0.01)
            with pytest.raises(ServerOverloaded, match="is waiting for the vocabulary of large") as refused:
                await gate.check(large, make(regex="a"), TENANT)
        assert refused.value.retry_after_seconds >= 1
        waiting = asyncio.create_task(gate.check(large, make(regex="b"), TENANT))
        os.kill(process_id, signal.SIGCONT)
        await wait_until_async(lambda: gate.is_ready("large"))
        await waiting
        await wait_until_async(lambda: gate.is_ready("other"))

    with_gate(body)


def test_a_new_revision_has_its_own_vocabulary_and_verdicts() -> None:
    old, new = view_of("changing", letters="ab", revision="1"), view_of("changing", letters="bc", revision="2")

    async def body(gate: GrammarGate) -> None:
        gate.prepare([old])
        await gate.check(old, make(regex="a"), TENANT)
        process_id = gate.process_id("changing")
        gate.prepare([new])
        with pytest.raises(InvalidRequest):
            await gate.check(new, make(regex="a"), TENANT)
        await gate.check(new, make(regex="c"), TENANT)
        assert gate.process_id("changing") != process_id

    with_gate(body)


def test_a_tenant_with_many_slow_grammars_delays_another_by_one(view: ModelView) -> None:
    async def body(gate: GrammarGate) -> None:
        many = [asyncio.create_task(gate.check(view, slow(number), TENANT)) for number in range(40)]
        await asyncio.sleep(0)
        await gate.check(view, make(regex="mine"), OTHER_TENANT)
        ended = [task.exception() for task in many if task.done()]
        assert sum(isinstance(exc, ServerOverloaded) for exc in ended) == 40 - MAX_WAITING // 2
        assert sum(isinstance(exc, InvalidRequest) for exc in ended) <= 1
        for task in many:
            task.cancel()
        await asyncio.gather(*many, return_exceptions=True)

    with_gate(body)


def test_refused_grammars_cost_their_tenant_a_budget(view: ModelView, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_compiler, "MAX_REFUSAL_SECONDS", 0.0)

    async def body(gate: GrammarGate) -> None:
        await gate.check(view, make(regex="a"), TENANT)
        with pytest.raises(InvalidRequest):
            await gate.check(view, slow(0), TENANT)
        with pytest.raises(Overloaded, match="your refused grammars took") as refused:
            await gate.check(view, make(regex="b"), TENANT)
        assert refused.value.code == "slow_down"
        assert refused.value.retry_after_seconds > 0
        await gate.check(view, make(regex="a"), TENANT)  # the verdict is known
        await gate.check(view, make(regex="b"), OTHER_TENANT)

    with_gate(body)


def test_the_budget_for_refused_grammars_comes_back() -> None:
    now = 0.0
    budget = RefusalBudget(lambda: now)
    budget.charge(TENANT, MAX_REFUSAL_SECONDS + 5)
    budget.charge(OTHER_TENANT, 1)
    budget.refuse_if_spent(OTHER_TENANT)
    with pytest.raises(Overloaded) as refused:
        budget.refuse_if_spent(TENANT)
    now = refused.value.retry_after_seconds
    budget.refuse_if_spent(TENANT)
    now += 1_000
    budget.charge(OTHER_TENANT, 1)
    assert TENANT not in budget._spent, "it is forgotten once it has all of its budget"


def test_what_the_process_says_is_logged_without_the_grammar(
    view: ModelView, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    main = """
import os, sys, text.grammar_process as process
print("a library's warning", file=sys.stderr)
def judge(tokenizer, output):
    os.write(2, output.regex.encode())
    raise ValueError(output.regex)
process.judge = judge
process.main()
"""
    monkeypatch.setattr(grammar_compiler, "COMMAND", (sys.executable, "-c", main))

    async def body(gate: GrammarGate) -> None:
        with pytest.raises(InvalidRequest, match="the grammar compiler failed"):
            await gate.check(view, make(regex="private"), TENANT)
        process_id = gate.process_id(MINI.id)
        assert process_id is not None
        os.kill(process_id, signal.SIGKILL)
        await wait_until_async(lambda: "return code -9" in logged(caplog))

    with_gate(body)
    assert "a library's warning" in logged(caplog)
    assert "ValueError in line" in logged(caplog)
    assert "private" not in logged(caplog)


def test_models_that_come_and_go_in_models_toml_are_prepared_and_let_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text.models, "FOLLOW_SECONDS", 0.01)
    file = tmp_path / "models.toml"

    def write(*model_ids: str) -> None:
        folder = ROOT / "models" / "celeriac-mini"
        new = tmp_path / "new.toml"
        new.write_text("\n".join(f'[[models]]\nid = "{id_}"\npath = "{folder}"\n' for id_ in model_ids))
        new.replace(file)

    async def body(gate: GrammarGate) -> None:
        write("first")
        views = ModelViews(Catalog.load(file))
        following = asyncio.create_task(follow_models(views, on_check=lambda: gate.prepare(views.loaded())))
        await wait_until_async(lambda: gate.is_ready("first"))
        write("second", "third")
        await wait_until_async(lambda: gate.is_ready("second") and gate.is_ready("third"))
        assert gate.process_id("first") is None
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)

    with_gate(body)


def test_a_walk_through_a_large_vocabulary_costs_little() -> None:
    all_tokens = (1 << 262_144) - 1
    started = time.process_time()
    chosen = [_nth_set_bit(all_tokens, number) for number in range(NUM_STEPS)]
    assert time.process_time() - started < CPU_SECONDS / 5
    assert chosen == [number * 7919 % 262_144 for number in range(NUM_STEPS)]
    assert [_nth_set_bit(0b1011010, number) for number in range(4)] == [1, 6, 4, 3]


def logged(caplog: pytest.LogCaptureFixture) -> str:
    return "\n".join(f"{record.getMessage()} {vars(record).get('reason')}" for record in caplog.records)


def view_of(model_id: str, *, letters: str = "ab", num_tokens: int = 0, revision: str = "1") -> ModelView:
    """Of a tokenizer that knows these letters, the end of a text, and as many tokens as it takes."""
    words = [*letters, "<eos>", *(f"filler{number}" for number in range(num_tokens))]
    tokenizer = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, []))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<eos>"])
    vocabulary = Vocabulary(tokenizer, len(words), (len(letters),), tokenizer.to_str().encode())
    return ModelView(
        MINI.model_copy(update={"id": model_id}),
        revision=revision,
        encoder=TokenizerEncoder(tokenizer),
        chat_template=None,
        defaults=GenerationDefaults(),
        vocab_size=len(words),
        vocabulary=vocabulary,
    )


def test_a_model_without_a_readable_vocabulary_says_so() -> None:
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    tokenizer.decoder = decoders.WordPiece()
    described = tokenizer.to_str().encode()

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
        for vocabulary in (None, Vocabulary(tokenizer, 2, (1,), described), Vocabulary(tokenizer, 2, (), described)):
            with pytest.raises(UnsupportedParameter) as refused:
                await gate.check(view_with(vocabulary), make(regex="a"), TENANT)
            assert refused.value.param == "params.structured_output"

    with_gate(body)
