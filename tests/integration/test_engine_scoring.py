"""Logprobs of prompts: those of plain transformers at every position, however the prompt was computed; and best_of."""

from typing import Any

import msgspec
import pytest
import torch

from gpu_worker.engine.engine import Engine
from gpu_worker.engine.sampling import max_num_scored_tokens
from gpu_worker.engine_process.frames import AddJob
from tests.engine_driver import VOCAB_SIZE, Collected, Finished, make_add, make_engine, run, step, tiny_model
from tests.engine_parts import TOKENIZER
from tests.integration.test_engine_parity import ALL_CONFIGS

FAMILIES = ("llama", "gemma2", "qwen3", "cohere2", "falcon", "mamba")
NUM_TOP = 3
PROMPTS = [torch.randint(1, VOCAB_SIZE, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (1, 2, 33)]
TALE = TOKENIZER.encode("There was a fox who told tales to the moon, and the moon listened to every word").ids
MODEL = tiny_model()


def reference(model: Any, prompt: list[int]) -> list[tuple[float, list[int]]]:
    """By transformers alone: each token's logprob, and the most likely ids in its place."""
    own = model.config._attn_implementation
    model.set_attn_implementation("eager")
    with torch.inference_mode():
        logprobs = model(input_ids=torch.tensor([prompt]), use_cache=False).logits[0].float().log_softmax(-1)
    model.set_attn_implementation(own)
    return [
        (logprobs[position, token].item(), logprobs[position].topk(NUM_TOP).indices.tolist())
        for position, token in enumerate(prompt[1:])
    ]


def check_scores(collected: Collected, job_id: str, prompt: list[int], expected: list[tuple[float, list[int]]]) -> None:
    scores = collected.prompt_logprobs(job_id)
    assert scores is not None
    assert scores[0] is None
    entries = [entry for entry in scores if entry is not None]
    assert [entry["token_id"] for entry in entries] == prompt[1:]
    assert [entry["logprob"] for entry in entries] == pytest.approx([logprob for logprob, _ in expected], abs=1e-3)
    tops: list[Any] = [entry["top"] for entry in entries]
    assert [[token_id for token_id, _, _ in top] for top in tops] == [ids for _, ids in expected]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_scores_as_transformers_does(family: str) -> None:
    model = tiny_model(ALL_CONFIGS[family]())
    expected = [reference(model, prompt) for prompt in PROMPTS]
    engine = make_engine(model, max_num_batched_tokens=16, max_num_seqs=3)
    jobs = [make_add(str(n), prompt, prompt_logprobs=NUM_TOP, max_tokens=n) for n, prompt in enumerate(PROMPTS)]
    collected = run(engine, [*jobs, make_add("beside", TALE, temperature=1.0)])
    assert not collected.failures
    for number, prompt in enumerate(PROMPTS):
        check_scores(collected, str(number), prompt, expected[number])
        assert len(collected.tokens(str(number))) == number


@pytest.fixture
def engine() -> Engine:
    return make_engine(MODEL)


def test_a_prompt_found_in_the_cache_is_scored_whole(engine: Engine) -> None:
    run(engine, [make_add("before", TALE)])
    collected = run(engine, [make_add("a", TALE, prompt_logprobs=NUM_TOP), make_add("b", TALE)])
    check_scores(collected, "a", TALE, reference(MODEL, TALE))
    assert collected.sequences["a", 0].num_cached_tokens == 0
    assert collected.sequences["b", 0].num_cached_tokens == 64
    assert collected.tokens("a") == collected.tokens("b")


def test_few_positions_are_scored_in_a_step(engine: Engine) -> None:
    engine.scheduler.max_num_scored_tokens = 5
    collected = run(engine, [make_add(name, TALE, prompt_logprobs=NUM_TOP, max_tokens=2) for name in "ab"])
    for name in "ab":
        check_scores(collected, name, TALE, reference(MODEL, TALE))
    assert max_num_scored_tokens(152_000) * 152_000 * 4 <= 2**26


def test_scores_survive_a_preemption_in_mid_prompt(engine: Engine) -> None:
    engine.scheduler.max_num_scored_tokens = 30
    engine.add(make_add("a", TALE, prompt_logprobs=NUM_TOP, max_tokens=3))
    step(engine)
    (sequence,) = engine.scheduler.running
    engine.scheduler.preempt(sequence)
    assert 0 < len(sequence.prompt_logprobs) < len(TALE)
    check_scores(run(engine, []), "a", TALE, reference(MODEL, TALE))


def test_scores_come_once_for_all_n_and_not_again_after_a_resume(engine: Engine) -> None:
    job = make_add("a", TALE, prompt_logprobs=NUM_TOP, n=3, temperature=1.0)
    whole = run(engine, [job])  # fails itself where they are told twice
    check_scores(whole, "a", TALE, reference(MODEL, TALE))
    committed = [whole.tokens("a", index)[:4] for index in range(3)]
    resumed = msgspec.structs.replace(
        job, attempt=2, committed_token_ids=committed, num_emitted_chars=[0] * 3, has_prompt_logprobs=True
    )
    after = run(engine, [resumed])
    assert after.prompt_logprobs("a") is None
    assert [after.tokens("a", index) for index in range(3)] == [whole.tokens("a", index)[4:] for index in range(3)]


@pytest.mark.parametrize("family", ["llama", "falcon"])
def test_scoring_alone_draws_nothing_even_at_the_context_limit(family: str) -> None:
    model = tiny_model(ALL_CONFIGS[family]())
    engine = make_engine(model, max_model_len=33, kv_cache_tokens=256)
    prompt = PROMPTS[-1]
    collected = run(engine, [make_add("a", prompt, prompt_logprobs=NUM_TOP, max_tokens=0)])
    check_scores(collected, "a", prompt, reference(model, prompt))
    finished = collected.sequences["a", 0]
    assert (finished.token_ids, finished.text, finished.finish_reason) == ([], "", "length")
    assert engine.stats().num_generation_tokens == 0
    assert engine.scheduler.pool.usage == 0


def test_under_best_of_each_candidate_tells_the_sum_of_its_logprobs(engine: Engine) -> None:
    sampled: dict[str, Any] = {"temperature": 1.0, "seed": 4}
    plain = run(engine, [make_add("a", TALE, n=3, logprobs=0, **sampled)])
    collected = run(engine, [make_add("a", TALE, best_of=3, **sampled)])
    for index in range(3):
        candidate = collected.sequences["a", index]
        logprobs = [float(str(entry["logprob"])) for entry in plain.sequences["a", index].logprobs]
        assert (candidate.token_ids, candidate.logprobs) == (plain.tokens("a", index), [])
        assert candidate.sum_logprobs == pytest.approx(logprobs, abs=1e-3)


def adversaries() -> list[AddJob]:
    """Requests that are within every bound, and as hard on their neighbours as the bounds allow."""
    everything = {str(token): -100.0 for token in range(VOCAB_SIZE)}
    starts = [bytes([byte]).decode("latin-1") for byte in range(33, 49)]
    return [
        make_add("hot", TALE, temperature=2.0, seed=1),
        make_add("narrow", TALE, temperature=2.0, top_k=1, top_p=1e-9, min_p=1.0),
        make_add("down", TALE, logit_bias=everything, temperature=0.0),
        make_add("up and down", TALE, logit_bias={**everything, "7": 100.0}, temperature=2.0, repetition_penalty=10.0),
        make_add("stops", TALE, stop=[text + "x" * 100 for text in starts], temperature=1.5, max_tokens=60),
        make_add("limit", [5] * 63, max_tokens=1000, ignore_eos=True),
        make_add("scored limit", [6] * 64, max_tokens=0, prompt_logprobs=20),
        make_add("many", [8] * 40, n=8, temperature=1.0, max_tokens=20, min_tokens=20),
        make_add("best", TALE[:20], best_of=8, temperature=2.0, max_tokens=30, frequency_penalty=-2.0),
        make_add("banned", TALE, bad_token_ids=list(range(1, VOCAB_SIZE)), max_tokens=9, ignore_eos=True),
        make_add("nothing left", TALE, bad_token_ids=list(range(VOCAB_SIZE))),
        make_add("no end", TALE, bad_token_ids=list(range(1, VOCAB_SIZE)), min_tokens=5),
    ]


REFUSED: list[dict[str, Any]] = [
    {"prompt": [VOCAB_SIZE]},
    {"prompt": [-1]},
    {"prompt": [2**40]},
    {"prompt": [5] * 65},
    {"logit_bias": {VOCAB_SIZE: 0.0}},
    {"stop_token_ids": [VOCAB_SIZE]},
    {"bad_token_ids": [VOCAB_SIZE]},
]


def test_adversarial_requests_neither_stop_the_loop_nor_change_a_neighbour() -> None:
    """On a cache with room for one long text: whatever is not at its head waits for a block."""
    good = [make_add(f"good {n}", TALE[n:], temperature=0.8, seed=n, max_tokens=11, n=1 + n % 2) for n in range(6)]
    shape = {"max_model_len": 64, "max_num_seqs": 8, "max_num_batched_tokens": 48}
    expected = Collected()
    for command in [*good, *adversaries()]:
        alone = run(make_engine(MODEL, **shape, kv_cache_tokens=2048), [trimmed(command)])
        expected.sequences |= alone.sequences
        expected.failures |= alone.failures
    assert set(expected.failures) == {"nothing left", "no end"}
    engine = make_engine(MODEL, **shape, kv_cache_tokens=256)
    collected = Collected()
    for number, command in enumerate(adversaries()):
        for wrong in REFUSED:
            with pytest.raises(Exception, match=r"token|tokens|prompt"):
                engine.add(make_add("refused", **{"prompt": TALE[:8], **wrong}))
        engine.add(trimmed(command))
        if number % 2:
            engine.add(trimmed(good[number // 2]))
        collected.take(step(engine))
    collected = _finish(engine, collected)
    assert set(collected.failures) == set(expected.failures)
    for key, finished in expected.sequences.items():
        if key[0] not in expected.failures:
            assert _words(collected.sequences[key]) == _words(finished), key
    assert engine.stats().num_preemptions > 0
    assert engine.scheduler.pool.usage == 0


def trimmed(command: AddJob) -> AddJob:
    """Within a context of 64 tokens."""
    return (
        command
        if command.job_id in ("limit", "scored limit")
        else msgspec.structs.replace(command, prompt_token_ids=command.prompt_token_ids[:30])
    )


def _finish(engine: Engine, collected: Collected) -> Collected:
    while engine.has_work:
        collected.take(step(engine))
    return collected


def _words(finished: Finished) -> tuple[list[int], str, str | None]:
    return finished.token_ids, finished.text, finished.finish_reason
