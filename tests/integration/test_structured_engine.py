"""The engine follows a structured output: every output is valid, whoever runs beside it and however often it is cut.

The model is tiny and random, so that only the grammar keeps the output in form.
"""

import json
import random
import re
from typing import Any

import jsonschema
import pytest
from transformers import MambaConfig

from domain.errors import InvalidRequest
from gpu_worker.engine.engine import Engine
from gpu_worker.engine.sequence import MAX_COMPILED
from tests.engine_driver import (
    EOS_TOKEN_ID,
    VOCAB_SIZE,
    Collected,
    make_add,
    make_engine,
    run,
    run_alone,
    step,
    tiny_model,
)

PROMPT = [5, 6, 7]
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "likes": {"type": "array", "items": {"enum": ["tea", "fog", None]}, "maxItems": 3},
    },
    "required": ["name", "age", "likes"],
    "additionalProperties": False,
}
KINDS: list[dict[str, Any]] = [
    {"json_schema": PERSON},
    {"regex": "[a-z]{3}-[0-9]{2,6}"},
    {"choices": ["yes", "no", "perhaps", "caf\u00e9 \u2603"]},
    {"lark": 'start: "(" start ")" | "x"'},
    {"json_schema": {"type": "array", "items": {"type": "boolean"}, "maxItems": 9}},
]


@pytest.fixture(scope="module")
def engine() -> Engine:
    return make_engine(max_num_seqs=8)


def make_job(job_id: str, output: dict[str, Any], **changes: Any) -> Any:
    changes = {"temperature": 1.0, "max_tokens": 200} | changes
    return make_add(job_id, PROMPT, structured_output=output, **changes)


def is_valid(output: dict[str, Any], text: str) -> bool:
    [(kind, value)] = output.items()
    if kind == "json_schema":
        jsonschema.validate(json.loads(text), value)
        return True
    if kind == "regex":
        return re.fullmatch(value, text) is not None
    if kind == "choices":
        return text in value
    if kind == "json_object":
        return isinstance(json.loads(text), dict)
    return text == "(" * (len(text) // 2) + "x" + ")" * (len(text) // 2)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_each_kind_is_followed_by_each_sequence(engine: Engine, temperature: float) -> None:
    jobs = [make_job(f"job{i}", output, temperature=temperature, n=3, seed=i) for i, output in enumerate(KINDS)]
    collected = run(engine, jobs)
    assert not collected.failures
    finished = [(KINDS[i], collected.sequences[f"job{i}", index]) for i in range(len(KINDS)) for index in range(3)]
    assert all(is_valid(kind, sequence.text) for kind, sequence in finished if sequence.finish_reason == "stop")
    assert sum(sequence.finish_reason == "stop" for _, sequence in finished) >= len(finished) * 2 // 3
    texts = {sequence.text for _, sequence in finished}
    assert temperature == 0 or len(texts) > len(KINDS), "the sequences of a job follow the grammar each by itself"


def test_neighbours_without_a_grammar_draw_what_they_draw_alone(engine: Engine) -> None:
    plain = [make_add(f"plain{i}", [i + 1, i + 2], temperature=1.0, seed=i, max_tokens=24) for i in range(4)]
    alone = [run_alone(engine, job).token_ids for job in plain]
    guided = [make_job(f"guided{i}", output, seed=i) for i, output in enumerate(KINDS)]
    guided_alone = [run_alone(engine, job).token_ids for job in guided]
    together = run(engine, [job for pair in zip(plain, guided, strict=False) for job in pair])
    assert [together.tokens(job.job_id) for job in plain] == alone
    assert [together.tokens(job.job_id) for job in guided[:4]] == guided_alone[:4]


def test_a_job_resumed_at_any_point_ends_in_the_same_tokens(engine: Engine) -> None:
    rng = random.Random(3)
    for number, output in enumerate(KINDS):
        whole = run_alone(engine, make_job("whole", output, seed=number))
        cuts = {0, len(whole.token_ids) - 1, *(rng.randrange(len(whole.token_ids)) for _ in range(4))}
        for cut in cuts:
            resumed = run_alone(
                engine, make_job("resumed", output, seed=number, committed_token_ids=[whole.token_ids[:cut]])
            )
            assert whole.token_ids[:cut] + resumed.token_ids == whole.token_ids
            assert resumed.finish_reason == whole.finish_reason
            assert resumed.text == whole.text, "nothing was counted as sent"


def test_a_job_whose_output_was_complete_says_so_at_once(engine: Engine) -> None:
    output = {"choices": ["yes"]}
    whole = run_alone(engine, make_job("whole", output))
    resumed = run_alone(engine, make_job("resumed", output, committed_token_ids=[whole.token_ids]))
    assert (resumed.token_ids, resumed.text, resumed.finish_reason) == ([], "yes", "stop")


def test_preempted_sequences_go_on_as_if_nothing_had_been() -> None:
    roomy, tight = make_engine(max_num_seqs=8), make_engine(max_num_seqs=8, kv_cache_tokens=256)
    jobs = [make_job(f"job{i}", {"regex": "[a-z]{120}"}, seed=i) for i in range(6)]
    assert [finished.text for finished in run(roomy, jobs).sequences.values()]
    expected = {job.job_id: run_alone(roomy, job).text for job in jobs}
    collected = run(tight, jobs)
    assert tight.stats().num_preemptions > 0
    assert {job.job_id: collected.sequences[job.job_id, 0].text for job in jobs} == expected


def test_a_step_that_fails_and_is_run_in_halves_leaves_the_matchers_right(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(max_num_seqs=8)
    jobs = [make_job(f"job{i}", output, seed=i) for i, output in enumerate(KINDS)]
    expected = run(engine, jobs)
    collect, failures = engine._runner.collect, iter(range(10_000))

    def collect_or_fail(launched: Any) -> Any:
        drawn = collect(launched)
        if len(drawn) > 1 and next(failures) % 3 == 0:
            raise RuntimeError("told to fail, after the masks were made")
        return drawn

    monkeypatch.setattr(engine._runner, "collect", collect_or_fail)
    again = run(engine, jobs)
    assert next(failures) > 10
    assert not again.failures
    assert again.sequences == expected.sequences


def test_a_model_on_the_slower_path_follows_as_well() -> None:
    config = MambaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        state_size=4,
        num_hidden_layers=2,
        eos_token_id=EOS_TOKEN_ID,
        bos_token_id=None,
        pad_token_id=None,
    )
    engine = make_engine(tiny_model(config))
    jobs = [make_job(f"job{i}", output, seed=i, max_tokens=60) for i, output in enumerate(KINDS)]
    collected = run(engine, jobs)
    assert not collected.failures
    finished = [collected.sequences[f"job{i}", 0] for i in range(len(KINDS))]
    assert all(is_valid(KINDS[i], one.text) for i, one in enumerate(finished) if one.finish_reason == "stop")
    assert [one.finish_reason for one in finished].count("stop") >= 3


def test_min_tokens_makes_it_longer_where_the_grammar_has_room(engine: Engine) -> None:
    finished = run_alone(engine, make_job("job", {"regex": "a+"}, min_tokens=20, logit_bias={EOS_TOKEN_ID: 100.0}))
    assert finished.text == "a" * 20
    assert finished.finish_reason == "stop"


def test_min_tokens_gives_way_where_the_grammar_ends(engine: Engine) -> None:
    finished = run_alone(engine, make_job("job", {"choices": ["ab"]}, min_tokens=20))
    assert (finished.text, finished.finish_reason) == ("ab", "stop")


def test_a_complete_output_ends_without_an_end_token_also_at_the_last_token_allowed(engine: Engine) -> None:
    finished = run_alone(engine, make_job("job", {"choices": ["abc"]}, max_tokens=3))
    assert (finished.text, finished.finish_reason, EOS_TOKEN_ID in finished.token_ids) == ("abc", "stop", False)
    assert run_alone(engine, make_job("job", {"choices": ["abc"]}, max_tokens=2)).finish_reason == "length"


def test_a_stop_string_still_stops(engine: Engine) -> None:
    finished = run_alone(engine, make_job("job", {"choices": ["abcdef"]}, stop=["cd"]))
    assert (finished.text, finished.finish_reason) == ("ab", "stop")


def test_bias_and_penalties_choose_among_what_is_allowed(engine: Engine) -> None:
    token_of = {text: engine._tokenizer.encode(text).ids[0] for text in "xy!"}
    finished = run_alone(
        engine, make_job("job", {"regex": "[xy]{6}"}, logit_bias={token_of["!"]: 100.0, token_of["y"]: 90.0})
    )
    assert finished.text == "yyyyyy"


def test_logprobs_are_those_of_the_model_not_of_the_grammar(engine: Engine) -> None:
    free = run_alone(engine, make_add("free", PROMPT, max_tokens=1, logprobs=5))
    guided = run_alone(engine, make_job("guided", {"regex": "[xy]"}, temperature=0.0, logprobs=5))
    assert guided.logprobs[0]["top"] == free.logprobs[0]["top"]
    assert guided.token_ids != free.token_ids


def test_where_all_that_is_allowed_is_banned_the_job_alone_fails(engine: Engine) -> None:
    x = engine._tokenizer.encode("x").ids[0]
    neighbour = make_job("neighbour", KINDS[0], seed=4)
    expected = run_alone(engine, neighbour)
    banned = make_job("banned", {"regex": "aax"}, bad_token_ids=[x])
    collected = run(engine, [banned, neighbour])
    assert "ban every token" in collected.failures["banned"].message
    assert collected.sequences["neighbour", 0] == expected
    assert not engine.has_work


def test_a_committed_prefix_that_breaks_the_grammar_fails_the_job_alone(engine: Engine) -> None:
    neighbour = make_job("neighbour", KINDS[0], seed=4)
    expected = run_alone(engine, neighbour)
    broken = make_job("broken", {"regex": "[0-9]{9}"}, committed_token_ids=[[100, 101]])
    collected = run(engine, [broken, neighbour])
    assert "continued" in collected.failures["broken"].message
    assert collected.sequences["neighbour", 0] == expected


def test_a_grammar_that_grows_too_complex_fails_its_job_alone() -> None:
    engine = make_engine(max_num_seqs=8)
    neighbour = make_job("neighbour", KINDS[1], seed=4)
    expected = run_alone(engine, neighbour)
    collected: Collected = run(engine, [make_job("greedy", {"regex": "((a{1000}){1000}){1000}"}), neighbour])
    assert "simplify" in collected.failures["greedy"].message
    assert collected.sequences["neighbour", 0] == expected


def test_a_grammar_that_does_not_compile_is_refused_at_admission(engine: Engine) -> None:
    with pytest.raises(InvalidRequest, match="cannot be used"):
        engine.add(make_job("job", {"regex": "("}))
    assert not engine.has_work


def test_many_grammars_are_compiled_and_forgotten(engine: Engine) -> None:
    for number in range(MAX_COMPILED + 5):
        assert run_alone(engine, make_job("job", {"choices": [f"c{number}"]})).text == f"c{number}"
    assert step(engine).outputs == []
