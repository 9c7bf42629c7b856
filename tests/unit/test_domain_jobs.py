"""The words of a job: statuses, transitions, and the result that a stream amounts to."""

import pytest

from domain.jobs import ALLOWED_TRANSITIONS, TERMINAL_STATUSES, FinishReason, JobStatus, Usage
from domain.requests import TokenChunk, TokenLogprob
from storage.partial_results import REASON_BY_STATUS, partial_result


def test_terminal_statuses_absorb_and_the_others_lead_on() -> None:
    assert set(ALLOWED_TRANSITIONS) == set(JobStatus)
    for status, following in ALLOWED_TRANSITIONS.items():
        assert status.is_terminal == (not following)
    assert {status for status in JobStatus if status.is_terminal} == TERMINAL_STATUSES


def test_every_status_can_be_reached_from_queued() -> None:
    reached = {JobStatus.QUEUED}
    for _ in JobStatus:
        reached |= {following for status in reached for following in ALLOWED_TRANSITIONS[status]}
    assert reached == set(JobStatus)


def test_completed_needs_a_worker() -> None:
    """Nothing but a running attempt may complete a job."""
    before = [before for before, after in ALLOWED_TRANSITIONS.items() if JobStatus.COMPLETED in after]
    assert before == [JobStatus.IN_PROGRESS]


def test_a_partial_result_is_the_stream_put_together() -> None:
    chunks = [
        TokenChunk(sequence_number=1, index=1, text="b", token_ids=(1,)),
        TokenChunk(sequence_number=2, index=0, text="", token_ids=(2, 3)),  # held back: half a character
        TokenChunk(sequence_number=3, index=0, text="ä", token_ids=(4,)),
        TokenChunk(sequence_number=4, index=1, text="c", token_ids=(), finish_reason=FinishReason.STOP),
    ]
    result = partial_result(chunks, num_prompt_tokens=9, cut_off_by=FinishReason.DEADLINE)
    assert [(c.index, c.text, c.finish_reason, c.num_tokens) for c in result.choices] == [
        (0, "ä", FinishReason.DEADLINE, 3),
        (1, "bc", FinishReason.STOP, 1),
    ]
    assert result.usage == Usage(prompt_tokens=9, completion_tokens=4)


def test_a_partial_result_keeps_the_logprobs() -> None:
    logprobs = [TokenLogprob(token=text, token_id=number, logprob=-0.5) for number, text in enumerate("ab")]
    chunks = [
        TokenChunk(sequence_number=n + 1, text=p.token, token_ids=(n,), logprobs=(p,)) for n, p in enumerate(logprobs)
    ]
    [choice] = partial_result(chunks, num_prompt_tokens=1, cut_off_by=FinishReason.CANCELLED).choices
    assert choice.logprobs == tuple(logprobs)


@pytest.mark.parametrize("status", sorted(TERMINAL_STATUSES - {JobStatus.COMPLETED}))
def test_every_ending_without_a_worker_says_what_cut_the_output_off(status: JobStatus) -> None:
    assert status in REASON_BY_STATUS
