"""The engine as it runs on a device, one step ahead of itself, with captured passes and draws that stay there: on a CPU
it must give what the plain engine gives."""

import logging
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from gpu_worker.engine.backends import StepMember
from gpu_worker.engine.engine import Engine
from gpu_worker.engine_process.frames import StepDone
from tests.device_engine import ReplayedFunction, make_device_engine
from tests.engine_driver import Collected, make_add, make_engine, run, step, tiny_model
from tests.engine_traces import NUM_DISTINCT_JOBS, run_traces
from tests.integration.test_engine_parity import CONFIGS, generate
from tests.thorough import IS_THOROUGH

# Traces of these seeds preempt, which few do.
SEEDS, NUM_TRACES, NUM_JOBS = ((2, 3), 14, NUM_DISTINCT_JOBS) if IS_THOROUGH else ((3,), 10, 24)

PROMPTS = [[5, 6, 7], list(range(20, 60)), [9] * 17]


@pytest.fixture
def engine() -> Engine:
    return make_device_engine()


def drain(engine: Engine, collected: Collected) -> Collected:
    while engine.has_work:
        collected.take(step(engine))
    return collected


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_every_request_gets_the_tokens_of_its_solo_run(seed: int, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "gpu_worker")  # the traps are meant to spring
    for report in run_traces(seed, NUM_TRACES, make_device_engine, num_jobs=NUM_JOBS):
        assert report.contaminated == []
    assert report.num_preemptions > 0
    assert min(report.num_cancelled, report.num_resumed, report.num_failed, report.num_cached_tokens) > 0


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "qwen3-moe", "gemma3", "gpt2", "opt", "cohere2"])
def test_families_give_the_tokens_of_generate(family: str) -> None:
    expected = [generate(tiny_model(CONFIGS[family]()), prompt) for prompt in PROMPTS]
    engine = make_device_engine(tiny_model(CONFIGS[family]()), max_num_batched_tokens=24)
    hot = [make_add(f"hot {number}", prompt, temperature=1.5, n=2) for number, prompt in enumerate(PROMPTS)]
    greedy = [make_add(str(number), prompt, max_tokens=14) for number, prompt in enumerate(PROMPTS)]
    collected = run(engine, [*hot, *greedy])
    assert [collected.tokens(str(number)) for number in range(len(PROMPTS))] == expected


def test_decodes_are_replayed_and_the_rest_is_not() -> None:
    capture = ReplayedFunction()
    engine = make_device_engine(capture=capture)
    run(engine, [make_add(str(number), prompt, max_tokens=9, ignore_eos=True) for number, prompt in enumerate(PROMPTS)])
    assert capture.num_replays == 8  # the ninth token of each comes with its prompt


def test_a_step_is_launched_before_the_tokens_of_the_last_one_are_known(engine: Engine) -> None:
    engine.add(make_add("a", PROMPTS[0], max_tokens=5, ignore_eos=True))
    num_launched = []
    launch = engine._runner.launch
    engine._runner.launch = lambda rows: num_launched.append(len(rows)) or launch(rows)  # type: ignore[method-assign,func-returns-value]
    progress = []
    while engine.has_work:
        done = step(engine)
        progress.append((len(num_launched), sum(len(output.token_ids) for output in done.outputs)))
    assert progress == [(2, 1), (3, 1), (4, 1), (5, 1), (5, 1)]


def test_a_text_that_ended_by_its_stop_string_says_nothing_more(engine: Engine) -> None:
    free = run(make_engine(), [make_add("a", PROMPTS[1], max_tokens=40, ignore_eos=True)]).sequences["a", 0]
    stop = free.text[10:12]
    expected = run(make_engine(), [make_add("a", PROMPTS[1], max_tokens=40, ignore_eos=True, stop=[stop])])
    assert run(engine, [make_add("a", PROMPTS[1], max_tokens=40, ignore_eos=True, stop=[stop])]) == expected


def test_an_abort_between_launch_and_commit_is_the_last_word(engine: Engine) -> None:
    collected = Collected()
    engine.add(make_add("gone", PROMPTS[0], max_tokens=50, ignore_eos=True))
    engine.add(make_add("stays", PROMPTS[1], max_tokens=20, ignore_eos=True))
    for _ in range(5):
        collected.take(step(engine))
    engine.abort("gone", 1, "cancelled")
    drain(engine, collected)
    assert len(collected.tokens("gone")) == 5
    assert collected.sequences["gone", 0].finish_reason == "cancelled"
    alone = run(make_engine(), [make_add("stays", PROMPTS[1], max_tokens=20, ignore_eos=True)])
    assert collected.tokens("stays") == alone.tokens("stays")


def test_a_job_that_joins_while_others_run_ahead_gets_its_own_tokens(engine: Engine) -> None:
    collected = Collected()
    commands = [make_add(str(n), prompt, max_tokens=30, ignore_eos=True) for n, prompt in enumerate(PROMPTS)]
    for command in commands:
        engine.add(command)
        for _ in range(4):
            collected.take(step(engine))
    assert drain(engine, collected).sequences == run(make_engine(), commands).sequences


def test_everybody_whose_step_is_under_way_is_recorded(engine: Engine) -> None:
    engine.add(make_add("a", PROMPTS[0], max_tokens=3, ignore_eos=True))
    engine.add(make_add("b", PROMPTS[0], max_tokens=6, ignore_eos=True))
    records: list[Sequence[StepMember]] = []
    while engine.has_work:
        done: StepDone = engine.step(records.append)
        assert {output.job_id for output in done.outputs} <= {member.job_id for member in records[-1]}


@pytest.mark.parametrize("num_jobs", [1, 3])
def test_filters_that_keep_many_tokens_are_drawn_again_rightly(num_jobs: int) -> None:
    """A flat distribution: top_p keeps more than the most likely 256 of 320 tokens."""
    params: dict[str, Any] = {"temperature": 2.0, "top_p": 0.99, "max_tokens": 12, "logit_bias": {}}
    model, twin = tiny_model(), tiny_model()
    for each in (model, twin):
        with torch.no_grad():
            each.lm_head.weight.mul_(0.05)
    commands = [make_add(str(seed), PROMPTS[0], seed=seed, **params) for seed in range(num_jobs)]
    assert run(make_device_engine(model), commands) == run(make_engine(twin), commands)


def test_a_penalised_text_runs_ahead_as_it_does_step_by_step() -> None:
    params = {"repetition_penalty": 1.4, "presence_penalty": 0.5, "frequency_penalty": 0.9, "max_tokens": 40}
    commands = [make_add(str(n), prompt, ignore_eos=True, **params) for n, prompt in enumerate(PROMPTS)]
    assert run(make_device_engine(), commands) == run(make_engine(), commands)


def test_running_out_of_memory_makes_steps_smaller_and_fails_nobody(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model()
    forward = model.forward

    def scarce(input_ids: torch.Tensor, **arguments: Any) -> Any:
        if input_ids.shape[1] > 20:
            raise torch.OutOfMemoryError("no memory for more than 20 tokens")
        return forward(input_ids=input_ids, **arguments)

    engine = make_device_engine(model, max_num_batched_tokens=64, max_num_seqs=4)
    model.forward = scarce
    commands = [make_add(str(n), prompt, max_tokens=6, ignore_eos=True) for n, prompt in enumerate(PROMPTS)]
    collected = run(engine, commands)
    assert collected == run(make_engine(), commands)
    assert engine.scheduler.budget.tokens < 64
    assert engine.stats().num_preemptions > 0


def test_a_job_too_large_for_the_memory_even_alone_fails(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model()
    forward = model.forward

    def scarce(input_ids: torch.Tensor, **arguments: Any) -> Any:
        if bool((input_ids == 77).any()):
            raise torch.OutOfMemoryError("no memory for this one")
        return forward(input_ids=input_ids, **arguments)

    model.forward = scarce
    engine = make_device_engine(model)
    good, bad = make_add("good", PROMPTS[1], max_tokens=6, logit_bias={"77": -100.0}), make_add("bad", [77] * 30)
    collected = run(engine, [bad, good])
    assert collected.failures["bad"].code == "out_of_memory"
    assert collected.tokens("good") == run(make_engine(), [good]).tokens("good")
