"""The knobs of the fake back end that happen inside one process; the rest of it is held to the engine contract."""

from collections import Counter
from typing import Any

import pytest
from pydantic import ValidationError

from domain.catalog import ModelSpec
from domain.errors import OutOfMemory
from gpu_worker.engine.backends.fake import FakeBackend
from gpu_worker.engine.fake_tokens import END_TOKEN_ID, fake_text
from gpu_worker.engine_process.frames import AddJob, StepDone

PROMPT = [1, 2, 3]


def make_backend(*, max_num_seqs: int = 4, **knobs: Any) -> FakeBackend:
    fake = {"step_seconds": 0.0} | knobs
    return FakeBackend(
        ModelSpec(id="fake", path="none", backend="fake", max_model_len=256, max_num_seqs=max_num_seqs, fake=fake)
    )


def add(backend: FakeBackend, name: str = "job", *, n: int = 1, stop: tuple[str, ...] = (), **fields: Any) -> None:
    defaults: dict[str, Any] = {
        "job_id": name,
        "attempt": 1,
        "prompt_token_ids": PROMPT,
        "params": {"n": n, "stop": stop},
        "max_tokens": 10,
        "seed": 0,
        "priority": 0,
        "cache_salt": "",
        "committed_token_ids": [[]] * n,
        "num_emitted_chars": [0] * n,
        "finished_indexes": [],
    }
    backend.add(AddJob(**defaults | fields))


def run(backend: FakeBackend) -> list[StepDone]:
    steps = []
    while backend.has_work:
        steps.append(backend.step(lambda members: None))
    return steps


def test_the_text_is_what_a_test_can_say_beforehand() -> None:
    backend = make_backend()
    add(backend, seed=42)
    outputs = [output for done in run(backend) for output in done.outputs]
    assert "".join(output.text for output in outputs) == fake_text(PROMPT, 42, 0, 10)
    assert fake_text(PROMPT, 42, 0, 10) != fake_text(PROMPT, 43, 0, 10)


def test_tokens_per_step_shortens_the_run() -> None:
    backend = make_backend(tokens_per_step=4)
    add(backend)
    assert [len(done.outputs[0].token_ids) for done in run(backend)] == [4, 4, 2]


def test_an_end_token_ends_the_text_where_chance_has_it() -> None:
    backend = make_backend(end_chance=1.0)
    add(backend)
    (done,) = run(backend)
    assert (done.outputs[0].token_ids, done.outputs[0].text, done.outputs[0].finish_reason) == (
        [END_TOKEN_ID],
        "",
        "stop",
    )


def test_a_stop_string_is_told_with_the_end() -> None:
    backend = make_backend()
    add(backend)
    text = "".join(done.outputs[0].text for done in run(backend))
    add(backend, stop=("never comes", text[5:8]))
    outputs = [done.outputs[0] for done in run(backend)]
    assert outputs[-1].stop_string == text[5:8]
    assert "".join(output.text for output in outputs) == text[: text.index(text[5:8])]


def test_held_back_text_lags_and_comes_with_the_end() -> None:
    backend = make_backend(hold_back_chars=12)
    add(backend)
    texts = [done.outputs[0].text for done in run(backend)]
    assert texts[0] == texts[1] == ""
    assert len(texts[-1]) > 12


def test_text_that_may_become_a_stop_string_waits() -> None:
    text = fake_text(PROMPT, 0, 0, 10)
    stop = text[4:8] + "never comes"
    backend = make_backend()
    add(backend, stop=(stop,))
    outputs = [output for done in run(backend) for output in done.outputs]
    shown = ""
    for output in outputs[:-1]:
        shown += output.text
        assert not any(shown.endswith(stop[:length]) for length in range(1, 5))
    assert shown + outputs[-1].text == text


def test_jobs_of_higher_priority_join_first() -> None:
    backend = make_backend(max_num_seqs=1)
    for name, priority in (("low", 0), ("high", 5), ("middle", 1)):
        add(backend, name, priority=priority)
    order = [output.job_id for done in run(backend) for output in done.outputs if output.finish_reason]
    assert order == ["high", "middle", "low"]


def test_out_of_memory_preempts_the_youngest_and_all_complete() -> None:
    backend = make_backend(oom_above_n=2)
    for number in range(4):
        add(backend, f"job-{number}")
    steps = run(backend)
    tokens = Counter(output.job_id for done in steps for output in done.outputs for _ in output.token_ids)
    assert set(tokens.values()) == {10}
    assert steps[-1].stats.num_preemptions == 2
    assert max(len(done.outputs) for done in steps) == 2


def test_a_job_that_does_not_fit_alone_is_refused() -> None:
    with pytest.raises(OutOfMemory):
        add(make_backend(oom_above_n=2), n=3)


def test_only_the_job_with_the_seed_is_failed() -> None:
    backend = make_backend(fail_at_token=3, fail_seed=13)
    add(backend, "bad", seed=13)
    add(backend, "good")
    steps = run(backend)
    assert [failure.job_id for done in steps for failure in done.failures] == ["bad"]
    assert sum(len(output.token_ids) for done in steps for output in done.outputs if output.job_id == "good") == 10


def test_an_unknown_knob_is_refused() -> None:
    with pytest.raises(ValidationError, match="no_such_knob"):
        make_backend(no_such_knob=1)
