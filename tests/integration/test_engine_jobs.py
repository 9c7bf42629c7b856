"""One job in the engine: how it ends, is resumed, stopped and refused; and what its neighbours notice: nothing."""

from typing import Any

import pytest
import torch
from torch import Tensor

from domain.errors import ContextLengthExceeded, InvalidRequest
from domain.requests import GenerationRequest
from gpu_worker.engine.backends import StepMember
from gpu_worker.engine.engine import Engine
from gpu_worker.engine_process.frames import AddJob
from tests.engine_driver import (
    EOS_TOKEN_ID,
    VOCAB_SIZE,
    Collected,
    Finished,
    make_add,
    make_engine,
    run,
    run_alone,
    step,
    tiny_model,
)
from tests.engine_parts import TOKENIZER

MODEL = tiny_model()
PROMPT = TOKENIZER.encode("Once upon a time").ids
TALE = TOKENIZER.encode("There was a fox who told tales to the moon").ids
SAMPLED = {"temperature": 1.0, "top_p": 0.95, "seed": 11}


@pytest.fixture
def engine() -> Engine:
    return make_engine(MODEL)


def test_max_tokens_ends_with_length(engine: Engine) -> None:
    finished = run_alone(engine, make_add("a", PROMPT, max_tokens=5, ignore_eos=True))
    assert (len(finished.token_ids), finished.finish_reason) == (5, "length")


def test_the_context_length_ends_with_length() -> None:
    engine = make_engine(MODEL, max_model_len=32, kv_cache_tokens=256)
    finished = run_alone(engine, make_add("a", PROMPT, max_tokens=1000, ignore_eos=True))
    assert (len(PROMPT) + len(finished.token_ids), finished.finish_reason) == (32, "length")


def test_the_end_token_ends_with_stop_and_has_no_text(engine: Engine) -> None:
    finished = run_alone(engine, make_add("a", PROMPT, logit_bias={EOS_TOKEN_ID: 100.0}))
    assert finished == Finished([EOS_TOKEN_ID], "", "stop")


def test_the_end_token_can_be_ignored(engine: Engine) -> None:
    finished = run_alone(engine, make_add("a", PROMPT, logit_bias={EOS_TOKEN_ID: 100.0}, ignore_eos=True, max_tokens=3))
    assert finished == Finished([EOS_TOKEN_ID] * 3, "", "length")


def test_min_tokens_puts_the_end_off(engine: Engine) -> None:
    finished = run_alone(engine, make_add("a", PROMPT, logit_bias={EOS_TOKEN_ID: 90.0}, min_tokens=4))
    assert EOS_TOKEN_ID not in finished.token_ids[:4]
    assert finished.token_ids[4:] == [EOS_TOKEN_ID]


def test_a_stop_token_ends_the_text_before_it(engine: Engine) -> None:
    free = run_alone(engine, make_add("a", PROMPT))
    stopped = run_alone(engine, make_add("a", PROMPT, stop_token_ids=[free.token_ids[6]]))
    first = free.token_ids.index(free.token_ids[6])
    assert stopped.token_ids == free.token_ids[: first + 1]
    assert stopped.finish_reason == "stop"
    assert free.text.startswith(stopped.text)


def test_a_bad_token_is_never_drawn(engine: Engine) -> None:
    free = run_alone(engine, make_add("a", PROMPT))
    banned = run_alone(engine, make_add("a", PROMPT, bad_token_ids=free.token_ids))
    assert banned.token_ids
    assert not set(free.token_ids) & set(banned.token_ids)


def test_a_job_that_may_draw_nothing_fails_alone(engine: Engine) -> None:
    expected = run(make_engine(MODEL), [make_add("good", TALE)])
    collected = run(engine, [make_add("bad", PROMPT, bad_token_ids=list(range(VOCAB_SIZE))), make_add("good", TALE)])
    assert (list(collected.failures), collected.sequences) == (["bad"], expected.sequences)


def a_or_b(**params: Any) -> dict[str, Any]:
    """Sampling that writes an `a` or a `b` at every position, by the seed."""
    a, b = TOKENIZER.encode("ab").ids
    return {"logit_bias": {a: 100.0, b: 100.0}, "temperature": 2.0, "max_tokens": 60} | params


def test_a_stop_string_ends_the_text_before_it(engine: Engine) -> None:
    free = run_alone(engine, make_add("a", PROMPT, **a_or_b()))
    assert "bab" in free.text
    stopped = run_alone(engine, make_add("a", PROMPT, **a_or_b(stop=["bab", "never"])))
    assert stopped.text == free.text.split("bab")[0]
    assert stopped.finish_reason == "stop"
    assert stopped.token_ids == free.token_ids[: len(stopped.token_ids)]


def test_text_that_may_become_a_stop_string_is_held_back(engine: Engine) -> None:
    engine.add(make_add("a", PROMPT, **a_or_b(stop=["bab"])))
    collected = Collected()
    while engine.has_work:
        collected.take(step(engine))
        so_far = collected.sequences["a", 0]
        text = TOKENIZER.decode(so_far.token_ids)
        held = next((end for end in ("bab", "ba", "b") if text.endswith(end)), "")
        assert so_far.text + held == text


def test_logprobs_come_with_their_tokens(engine: Engine) -> None:
    finished = run_alone(engine, make_add("a", PROMPT, logprobs=2))
    assert [entry["token_id"] for entry in finished.logprobs] == finished.token_ids
    for entry in finished.logprobs:
        assert entry["top"][0] == (entry["token_id"], entry["token"], entry["logprob"])  # type: ignore[index]  # greedy


def test_each_of_n_sequences_is_what_it_would_be_alone(engine: Engine) -> None:
    together = run(engine, [make_add("a", PROMPT, n=4, **SAMPLED)])
    texts = [together.tokens("a", index) for index in range(4)]
    assert len({tuple(text) for text in texts}) == 4
    for index in range(4):
        others = [number for number in range(4) if number != index]
        alone = run(make_engine(MODEL), [make_add("a", PROMPT, n=4, finished_indexes=others, **SAMPLED)])
        assert alone.tokens("a", index) == texts[index]
        assert list(alone.sequences) == [("a", index)]


def test_eight_sequences_fit_through_one_free_block() -> None:
    engine = make_engine(MODEL, max_model_len=256, kv_cache_tokens=256)
    prompt = [5] * 235
    collected = run(engine, [make_add("a", prompt, n=8, **SAMPLED)])
    roomy = run(make_engine(MODEL), [make_add("a", prompt, n=8, **SAMPLED)])
    assert [collected.tokens("a", index) for index in range(8)] == [roomy.tokens("a", index) for index in range(8)]


def resume(command: AddJob, collected: Collected, num_tokens: list[int], num_chars: list[int]) -> AddJob:
    """The frame that a second attempt gets when so much of the first one's output was committed."""
    committed = [collected.tokens(command.job_id, index)[:num] for index, num in enumerate(num_tokens)]
    return make_add(
        command.job_id,
        command.prompt_token_ids,
        attempt=2,
        max_tokens=command.max_tokens,
        seed=command.seed,
        committed_token_ids=committed,
        num_emitted_chars=num_chars,
        **command.params,
    )


@pytest.mark.parametrize("params", [{}, SAMPLED, {**SAMPLED, "frequency_penalty": 1.5, "repetition_penalty": 1.2}])
@pytest.mark.parametrize("num_tokens", [1, 9, 30])
def test_a_resumed_job_goes_on_where_it_stood(engine: Engine, params: dict[str, Any], num_tokens: int) -> None:
    command = make_add("a", TALE, max_tokens=31, ignore_eos=True, **params)
    whole = run(engine, [command]).sequences["a", 0]
    chunks = Collected()
    engine.add(command)
    while len(chunks.sequences.get(("a", 0), Finished()).token_ids) < num_tokens:
        chunks.take(step(engine))
    engine.abort("a", 1, "")
    before = chunks.sequences["a", 0]
    after = run(engine, [resume(command, chunks, [num_tokens], [len(before.text)])]).sequences["a", 0]
    assert before.token_ids + after.token_ids == whole.token_ids
    assert before.text + after.text == whole.text
    assert after.finish_reason == "length"


def test_text_that_was_not_committed_is_sent_again(engine: Engine) -> None:
    command = make_add("a", PROMPT, **a_or_b())
    whole = run(engine, [command])
    after = run(engine, [resume(command, whole, [20], [13])]).sequences["a", 0]
    assert after.text == whole.sequences["a", 0].text[13:]
    assert after.token_ids == whole.tokens("a")[20:]


def test_a_stop_string_is_found_across_a_resume(engine: Engine) -> None:
    command = make_add("a", PROMPT, **a_or_b(stop=["bab"]))
    whole = run(engine, [command])
    text = whole.sequences["a", 0].text
    num_tokens = len(whole.tokens("a")) - 1  # all but the last letter of the stop string
    after = run(engine, [resume(command, whole, [num_tokens], [len(text)])]).sequences["a", 0]
    assert (after.token_ids, after.text, after.finish_reason) == (whole.tokens("a")[-1:], "", "stop")


@pytest.mark.parametrize("params", [{"max_tokens": 7}, {"logit_bias": {EOS_TOKEN_ID: 100.0}}, a_or_b(stop=["ab"])])
def test_a_sequence_that_had_ended_ends_without_a_forward_pass(engine: Engine, params: dict[str, Any]) -> None:
    command = make_add("a", PROMPT, **params)
    whole = run(engine, [command])
    finished = whole.sequences["a", 0]
    engine.add(resume(command, whole, [len(finished.token_ids)], [0]))
    done = engine.step(lambda members: pytest.fail("nothing was to be run"))
    (output,) = done.outputs
    assert (output.token_ids, output.text, output.finish_reason) == ([], finished.text, finished.finish_reason)
    assert not engine.has_work


def test_finished_sequences_of_a_resumed_job_stay_silent(engine: Engine) -> None:
    command = make_add("a", PROMPT, n=3, **SAMPLED)
    whole = run(engine, [command])
    again = make_add(
        "a",
        PROMPT,
        n=3,
        finished_indexes=[0, 2],
        committed_token_ids=[whole.tokens("a", 0), whole.tokens("a", 1)[:4], whole.tokens("a", 2)],
        num_emitted_chars=[9, 0, 9],
        **SAMPLED,
    )
    after = run(engine, [again])
    assert list(after.sequences) == [("a", 1)]
    assert after.tokens("a", 1) == whole.tokens("a", 1)[4:]


def test_an_aborted_job_says_its_last_words_in_the_next_step(engine: Engine) -> None:
    for name in ("stays", "goes"):
        engine.add(make_add(name, PROMPT, n=2, max_tokens=30, ignore_eos=True, **SAMPLED))
    collected = Collected()
    for _ in range(4):
        collected.take(step(engine))
    engine.abort("goes", 1, "cancelled")
    done = step(engine)
    last = [output for output in done.outputs if output.job_id == "goes"]
    assert [(output.index, output.token_ids, output.finish_reason) for output in last] == [
        (0, [], "cancelled"),
        (1, [], "cancelled"),
    ]
    collected.take(done)
    while engine.has_work:
        done = step(engine)
        assert not [output for output in done.outputs if output.job_id == "goes"]
        collected.take(done)
    assert collected.tokens("stays", 1) == run(
        make_engine(MODEL), [make_add("stays", PROMPT, n=2, max_tokens=30, ignore_eos=True, **SAMPLED)]
    ).tokens("stays", 1)


def test_an_abort_without_a_reason_is_silent(engine: Engine) -> None:
    engine.add(make_add("a", PROMPT))
    step(engine)
    engine.abort("a", 1, "")
    assert not engine.has_work
    assert engine.scheduler.pool.usage == 0


def test_an_abort_of_another_attempt_is_ignored(engine: Engine) -> None:
    engine.add(make_add("a", PROMPT, attempt=2, max_tokens=3))
    engine.abort("a", 1, "cancelled")
    collected = Collected()
    while engine.has_work:
        collected.take(step(engine))
    assert collected.sequences["a", 0].finish_reason == "length"


def test_a_job_that_was_waiting_is_aborted_too(engine: Engine) -> None:
    for number in range(12):
        engine.add(make_add(str(number), PROMPT, max_tokens=3))
    step(engine)
    engine.abort("11", 1, "deadline")
    collected = Collected()
    while engine.has_work:
        collected.take(step(engine))
    assert collected.sequences["11", 0] == Finished([], "", "deadline")


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"prompt_token_ids": [1, VOCAB_SIZE]}, InvalidRequest, f"token id {VOCAB_SIZE}"),
        ({"prompt_token_ids": [-1]}, InvalidRequest, "token id -1"),
        ({"prompt_token_ids": []}, InvalidRequest, "no tokens"),
        ({"prompt_token_ids": [1] * 256}, ContextLengthExceeded, "256 tokens"),
        ({"logit_bias": {VOCAB_SIZE: 1.0}}, InvalidRequest, "logit_bias"),
        ({"stop_token_ids": [VOCAB_SIZE + 5]}, InvalidRequest, "stop_token_ids"),
        ({"bad_token_ids": [VOCAB_SIZE]}, InvalidRequest, "bad_token_ids"),
        ({"temperature": float("nan")}, InvalidRequest, "are invalid"),
        ({"top_p": 7.0}, InvalidRequest, "are invalid"),
        ({"n": 2, "committed_token_ids": [[]]}, InvalidRequest, "n is 2"),
        ({"committed_token_ids": [[9999]]}, InvalidRequest, "9999"),
    ],
)
def test_what_cannot_run_is_refused_before_it_joins(
    engine: Engine, changes: dict[str, Any], error: type[Exception], words: str
) -> None:
    prompt = changes.pop("prompt_token_ids", PROMPT)
    with pytest.raises(error, match=words):
        engine.add(make_add("a", prompt, **changes))
    assert not engine.has_work


def test_a_prompt_one_short_of_the_context_gets_its_one_token(engine: Engine) -> None:
    finished = run_alone(engine, make_add("a", [5] * 255, max_tokens=50))
    assert len(finished.token_ids) == 1


class Tripwire(Exception):
    pass


@pytest.fixture
def trapped_token(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> int:
    """A token that makes the whole forward pass fail whenever it is among the inputs."""
    token_id = 301
    runner: Any = engine._runner
    forward = runner._model

    def guarded(input_ids: Tensor, **arguments: Any) -> Any:
        if (input_ids == token_id).any():
            raise Tripwire
        return forward(input_ids=input_ids, **arguments)

    monkeypatch.setattr(runner, "_model", guarded)
    return token_id


def test_a_failing_step_fails_the_guilty_job_alone(engine: Engine, trapped_token: int) -> None:
    good = [make_add(f"good {number}", TALE[number:], n=2, **SAMPLED) for number in range(4)]
    expected = run(make_engine(MODEL), good)
    guilty = make_add("guilty", [*PROMPT, trapped_token, 5, 6], n=2, **SAMPLED)
    collected = run(engine, [*good[:2], guilty, *good[2:]])
    assert collected.sequences == expected.sequences
    assert collected.failures["guilty"].code == "engine_error"
    assert "Tripwire" in collected.failures["guilty"].message
    assert engine.scheduler.pool.usage == 0


def test_a_job_that_fails_in_mid_text_says_nothing_more(engine: Engine, trapped_token: int) -> None:
    """The trapped token is drawn, not given: the step after it fails."""
    guilty = make_add("guilty", PROMPT, n=2, logit_bias={trapped_token: 100.0}, max_tokens=50)
    engine.add(guilty)
    engine.add(make_add("good", TALE))
    outputs = []
    while engine.has_work:
        done = step(engine)
        failed = [failure.job_id for failure in done.failures]
        outputs += [(output.job_id, output.index) for output in done.outputs]
        if failed:
            assert failed == ["guilty"]
            break
    while engine.has_work:
        assert {output.job_id for output in step(engine).outputs} == {"good"}


def test_infinities_of_one_job_never_reach_a_neighbour() -> None:
    """One token's embedding is infinite: its job's keys and values, and the blocks they lay in, are poisoned."""
    model = tiny_model(seed=3)
    with torch.no_grad():
        model.model.embed_tokens.weight[302] = float("inf")
    good = [make_add(f"good {number}", TALE[number:], max_tokens=40, ignore_eos=True) for number in range(4)]
    expected = run(make_engine(model, max_model_len=64), good)
    engine = make_engine(model, max_model_len=64, kv_cache_tokens=256)
    for command in good[:2]:
        engine.add(command)
    step(engine)
    collected = Collected()
    for number in range(3):
        engine.add(make_add(f"poison {number}", [*PROMPT, 302, number + 1]))
        collected.take(step(engine))
    collected.take(step(engine))
    rest = run(engine, good[2:])
    assert set(collected.failures) == {"poison 0", "poison 1", "poison 2"}
    collected.sequences |= rest.sequences
    for command in good[2:]:
        assert rest.sequences[command.job_id, 0] == expected.sequences[command.job_id, 0]


def test_a_later_reader_of_a_poisoned_block_reads_zeros() -> None:
    model = tiny_model(seed=3)
    with torch.no_grad():
        model.model.embed_tokens.weight[302] = float("inf")
    engine = make_engine(model, max_model_len=64, kv_cache_tokens=256)
    collected = run(engine, [make_add("poison", [302] * 50)])
    assert "poison" in collected.failures
    assert all(bool(layer.keys.isfinite().all()) for layer in engine._runner._layers)  # type: ignore[attr-defined]


def test_the_flight_recorder_hears_of_every_job_of_a_step(engine: Engine) -> None:
    engine.add(make_add("long", [5] * 100, max_tokens=2))
    engine.add(make_add("short", PROMPT, n=2, max_tokens=4))
    recorded: list[list[StepMember]] = []
    while engine.has_work:
        engine.step(lambda members: recorded.append(list(members)))
    assert recorded[0] == [StepMember("long", 1, "prefill")]
    assert recorded[1] == [StepMember("long", 1, "prefill"), StepMember("short", 1, "prefill")]
    assert recorded[-1] == [StepMember("short", 1, "decode")]


def test_usage_counts_every_token_once() -> None:
    engine = make_engine(MODEL, max_model_len=64, kv_cache_tokens=256)
    commands = [make_add(str(number), PROMPT[number:], max_tokens=45, ignore_eos=True) for number in range(6)]
    collected = run(engine, commands)
    stats = engine.stats()
    assert stats.num_preemptions > 0
    assert stats.num_generation_tokens == 6 * 45 == sum(len(f.token_ids) for f in collected.sequences.values())


def test_params_as_the_api_dumps_them_are_understood(engine: Engine) -> None:
    request = GenerationRequest.model_validate(
        {"model": "tiny", "prompt": "x", "params": {"logit_bias": {"7": 100}, "temperature": 0, "stop": ["q"]}}
    )
    for mode in ("python", "json"):
        params = request.params.model_dump(mode=mode)
        finished = run_alone(engine, make_add("a", PROMPT, **{**params, "max_tokens": 2}))
        assert finished.token_ids == [7, 7]
