"""What a running job makes of the engine's outputs: numbered chunks, a result, a status."""

import pytest

from domain.jobs import FinishReason, JobStatus
from domain.requests import GenerationRequest, GenerationResult, SamplingParams, TokenChunk
from gpu_worker.engine_process.frames import AddJob, JobFailed
from gpu_worker.job import RunningJob
from storage.partial_results import partial_result
from tests.runner_parts import make_output, make_running


def command_of(job: RunningJob) -> AddJob:
    command = job.command()
    assert isinstance(command, AddJob)
    return command


def test_outputs_since_the_last_chunk_become_one_chunk_per_sequence() -> None:
    job = make_running(n=2)
    job.absorb(make_output(job, "a", (1,)))
    job.absorb(make_output(job, "b", (2,)))
    job.absorb(make_output(job, "c", (3,), index=1))
    assert job.take_chunks() == [
        TokenChunk(sequence_number=1, index=0, text="ab", token_ids=(1, 2)),
        TokenChunk(sequence_number=2, index=1, text="c", token_ids=(3,)),
    ]
    assert job.take_chunks() == []


def test_tokens_whose_text_is_held_back_are_committed_all_the_same() -> None:
    job = make_running()
    job.absorb(make_output(job, "", (1,)))
    assert job.take_chunks() == [TokenChunk(sequence_number=1, token_ids=(1,))]


def test_the_first_chunk_of_an_attempt_and_the_end_are_urgent_and_nothing_between() -> None:
    job = make_running()
    assert not job.is_urgent
    job.absorb(make_output(job, "a"))
    assert job.is_urgent
    job.take_chunks()
    job.absorb(make_output(job, "b"))
    assert not job.is_urgent
    job.absorb(make_output(job, "c", finish_reason="stop"))
    assert job.is_urgent


def test_an_ended_sequence_takes_nothing_more() -> None:
    job = make_running(n=2)
    job.absorb(make_output(job, "a", finish_reason="stop"))
    job.absorb(make_output(job, "b", finish_reason="cancelled"))
    assert [chunk.text for chunk in job.take_chunks()] == ["a"]
    assert not job.is_over


def test_a_resumed_job_tells_the_engine_where_each_sequence_stands() -> None:
    committed = [
        TokenChunk(sequence_number=1, index=0, text="ab", token_ids=(1, 2)),
        TokenChunk(sequence_number=2, index=1, text="", token_ids=(5,)),
        TokenChunk(sequence_number=3, index=2, text="z", token_ids=(6,), finish_reason=FinishReason.STOP),
        TokenChunk(sequence_number=4, index=0, text="c", token_ids=(3,)),
    ]
    job = make_running(n=3, attempt=2, committed_chunks=committed)
    command = command_of(job)
    assert command.committed_token_ids == [[1, 2, 3], [5], [6]]
    assert command.num_emitted_chars == [3, 0, 1]
    assert command.finished_indexes == [2]
    assert command.attempt == 2
    job.absorb(make_output(job, "d"))
    assert job.take_chunks()[0].sequence_number == 5


def test_the_result_is_the_committed_prefix_and_what_came_after_it() -> None:
    job = make_running(committed_chunks=[TokenChunk(sequence_number=1, text="ab", token_ids=(1, 2))])
    job.absorb(make_output(job, "c", (3,), num_cached_tokens=2))
    job.absorb(make_output(job, "d", (4,), finish_reason="length"))
    job.take_chunks()
    ending = job.finalisation()
    assert ending.status is JobStatus.COMPLETED
    assert ending.last_sequence_number == 2
    assert isinstance(ending.result, GenerationResult)
    assert ending.result.choices[0].text == "abcd"
    assert ending.result.choices[0].num_tokens == 4
    assert ending.result.usage.model_dump() == {"prompt_tokens": 3, "completion_tokens": 4, "cached_tokens": 2}
    assert job.summary() == "4 tokens, length"


def test_the_stop_string_that_ended_it_is_in_the_last_chunk_and_in_the_result() -> None:
    job = make_running()
    job.absorb(make_output(job, "a"))
    job.take_chunks()
    job.absorb(make_output(job, "b", finish_reason="stop", stop_string="END"))
    [last] = job.take_chunks()
    assert last.stop_string == "END"
    for result in (
        job.finalisation().result,
        make_running(committed_chunks=[last]).finalisation().result,
        partial_result([last], num_prompt_tokens=3, cut_off_by=FinishReason.CANCELLED),
    ):
        assert isinstance(result, GenerationResult)
        assert result.choices[0].stop_string == "END"


@pytest.mark.parametrize(
    ("reasons", "status"),
    [
        (["stop", "length"], JobStatus.COMPLETED),
        (["stop", "cancelled"], JobStatus.CANCELLED),
        (["deadline", "deadline"], JobStatus.EXPIRED),
    ],
)
def test_a_job_ends_as_the_sequence_that_was_cut_off(reasons: list[str], status: JobStatus) -> None:
    job = make_running(n=2)
    for index, reason in enumerate(reasons):
        job.absorb(make_output(job, "a", index=index, finish_reason=reason))
    job.take_chunks()
    assert job.finalisation().status is status


@pytest.mark.parametrize(("has_run_out", "code"), [(True, "run_timeout_exceeded"), (False, "deadline_exceeded")])
def test_a_late_job_ends_with_the_name_of_its_clock(has_run_out: bool, code: str) -> None:
    job = make_running()
    job.has_run_out = has_run_out
    job.absorb(make_output(job, "a", finish_reason="deadline"))
    job.take_chunks()
    error = job.finalisation().error
    assert error is not None
    assert error.code == code


def scored(token_id: int) -> dict[str, object]:
    return {"token": "x", "token_id": token_id, "logprob": -0.5, "top": []}


def test_the_logprobs_of_the_prompt_ride_on_the_first_chunk_and_are_not_asked_for_again() -> None:
    job = make_running(n=2)
    assert not command_of(job).has_prompt_logprobs
    job.absorb(make_output(job, "a", index=1, prompt_logprobs=[None, scored(2), scored(3)]))
    job.absorb(make_output(job, "b"))
    first, second = job.take_chunks()
    assert first.prompt_logprobs is not None
    assert [entry and entry.token_id for entry in first.prompt_logprobs] == [None, 2, 3]
    assert second.prompt_logprobs is None
    successor = make_running(n=2, attempt=2, committed_chunks=[first, second])
    assert command_of(successor).has_prompt_logprobs
    for index in range(2):
        successor.absorb(make_output(successor, finish_reason="stop", index=index))
    assert all(chunk.prompt_logprobs is None for chunk in successor.take_chunks())
    result = successor.finalisation().result
    assert isinstance(result, GenerationResult)
    assert result.prompt_logprobs == first.prompt_logprobs


def test_under_best_of_the_result_holds_the_best_over_all_attempts() -> None:
    params = SamplingParams(n=2, best_of=3, temperature=1.0)
    request = GenerationRequest(model="test-model", prompt="x", params=params)
    committed = [
        TokenChunk(sequence_number=1, index=0, text="a", token_ids=(1,), sum_logprobs=-0.1),
        TokenChunk(sequence_number=2, index=1, text="b", token_ids=(2,), sum_logprobs=-2.0),
        TokenChunk(sequence_number=3, index=2, text="c", token_ids=(3,), sum_logprobs=-1.0),
    ]
    job = make_running(request=request, attempt=2, committed_chunks=committed)
    assert job.num_sequences == 3
    for index, logprob in enumerate([-3.0, -0.2, -0.4]):
        job.absorb(make_output(job, "!", (9,), index=index, sum_logprobs=logprob))
        job.absorb(make_output(job, "", (), index=index, finish_reason="length" if index == 2 else "stop"))
    chunks = job.take_chunks()
    assert [chunk.sum_logprobs for chunk in chunks] == [-3.0, -0.2, -0.4]
    ending = job.finalisation()
    assert isinstance(ending.result, GenerationResult)
    choices = [(choice.index, choice.candidate, choice.text, choice.mean_logprob) for choice in ending.result.choices]
    assert choices == [(0, 2, "c!", -0.7), (1, 1, "b!", -1.1)]
    assert ending.finish_reason is FinishReason.LENGTH
    assert ending.result.usage.completion_tokens == 6
    partial = partial_result(
        [*committed, *chunks], num_prompt_tokens=3, cut_off_by=FinishReason.CANCELLED, params=params
    )
    assert partial.choices == ending.result.choices


def test_a_failed_job_keeps_the_words_and_the_retry_advice_of_its_error() -> None:
    job = make_running()
    job.absorb(make_output(job, "a"))
    job.fail(JobFailed(job.name, 1, "out_of_memory", "it does not fit"))
    assert len(job.take_chunks()) == 1
    ending = job.finalisation()
    assert ending.error is not None
    assert (ending.status, ending.result, ending.error.code) == (JobStatus.FAILED, None, "out_of_memory")
    assert not ending.error.retryable
    assert job.summary() == "out_of_memory"


def test_a_job_that_never_reached_the_engine_is_cut_off_without_tokens() -> None:
    job = make_running(n=2)
    job.cut_off(FinishReason.CANCELLED)
    assert [(chunk.index, chunk.text, chunk.finish_reason) for chunk in job.take_chunks()] == [
        (0, "", "cancelled"),
        (1, "", "cancelled"),
    ]
    assert job.finalisation().status is JobStatus.CANCELLED
