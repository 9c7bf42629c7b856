"""Which running jobs give their slots to which waiting ones."""

from types import SimpleNamespace
from typing import Any
from uuid import UUID, uuid4

import pytest

from domain.jobs import FinishReason
from domain.requests import EmbeddingRequest, TokenChunk
from gpu_worker.batch import RunningBatch
from gpu_worker.commits import FlushPacer
from gpu_worker.engine_process.frames import EngineStats, StepDone
from gpu_worker.pausing import NUM_TURNS, Candidate, Exchange, candidates, choose
from gpu_worker.quarantine import Quarantine
from settings import Settings
from storage.jobs import ClaimedJob
from storage.shares import NextJob, Shares
from tests.runner_parts import make_claimed, make_output, make_running

A, B, C = (UUID(int=number) for number in (1, 2, 3))


def seen(running: dict[UUID, int], waiting: list[NextJob], *, received: dict[UUID, float] | None = None) -> Shares:
    """Of tenants of equal weight."""
    tenants = {*running, *(job.tenant_id for job in waiting)}
    return Shares(running, dict.fromkeys(tenants, 1.0), received or dict.fromkeys(tenants, 0.0), waiting)


def exchanges(
    running: dict[UUID, int],
    waiting: list[UUID],
    *,
    weights: dict[UUID, float] | None = None,
    received: dict[UUID, float] | None = None,
    num_quanta: float = 1.0,
) -> list[tuple[UUID, UUID]]:
    """Who takes a slot from whom, if this worker runs all jobs that run."""
    may_leave = [Candidate(uuid4(), tenant, 0, num_quanta) for tenant, number in running.items() for _ in range(number)]
    weights = {tenant: (weights or {}).get(tenant, 1.0) for tenant in {*running, *waiting}}
    received = {tenant: (received or {}).get(tenant, 0.0) for tenant in weights}
    shares = Shares(running, weights, received, [NextJob(uuid4(), tenant) for tenant in waiting])
    return [(job.tenant_id, one.tenant_id) for job, leaving in choose(shares, may_leave) for one in leaving]


@pytest.mark.parametrize(
    ("running", "waiting", "expected"),
    [
        ({A: 4}, [A, A], []),  # nobody else waits
        ({A: 4}, [], []),
        ({A: 4}, [B], [(B, A)]),
        ({A: 4}, [A, B, B, B, B], [(B, A), (B, A)]),  # up to its share, and the first one keeps its own
        ({A: 2, B: 2}, [A, B], []),
        ({A: 3, B: 1}, [B, B], [(B, A)]),
        ({A: 3}, [B, B], [(B, A)]),  # half a slot more would be due, but no whole one
        ({A: 1, B: 1}, [A, B], []),  # who has a slot does not take another one's only one
        ({A: 64}, [B] * 100, [(B, A)] * 32),
    ],
)
def test_a_tenant_keeps_its_share_and_gives_up_the_rest(
    running: dict[UUID, int], waiting: list[UUID], expected: list[tuple[UUID, UUID]]
) -> None:
    assert exchanges(running, waiting) == expected


def test_shares_are_by_weight() -> None:
    assert exchanges({A: 6}, [B] * 6, weights={A: 1, B: 2}) == [(B, A)] * 4
    assert exchanges({A: 6}, [B] * 6, weights={A: 2, B: 1}) == [(B, A)] * 2


def test_of_many_slots_only_some_go_round_at_once() -> None:
    tenants = [uuid4() for _ in range(60)]
    running, waiting = dict.fromkeys(tenants[:40], 1), tenants[40:]
    ahead: dict[UUID, float] = dict.fromkeys(running, 100)
    assert len(exchanges(running, waiting, received=ahead)) == 2
    assert len(exchanges(running, waiting, received=ahead, num_quanta=9.0)) == 2
    assert len(exchanges({tenants[0]: 40}, waiting, received=ahead)) == 20, "what is more than a share is given at once"


def test_a_slot_that_neither_is_due_all_the_time_goes_to_who_has_received_less() -> None:
    ahead: dict[UUID, float] = {A: 100, B: 50}
    assert exchanges({A: 2, B: 1}, [B, B], received=ahead) == [(B, A)], "and only one: then A has less than its share"
    assert exchanges({A: 1, B: 2}, [A], received=ahead) == []
    assert exchanges({A: 1}, [B], received=ahead) == [(B, A)], "more tenants than slots"
    assert exchanges({A: 2, B: 2}, [B], received=ahead) == [], "both have what they are due"
    by_weight: dict[UUID, float] = {A: 1, B: 2, C: 4}
    assert exchanges({A: 1, B: 1, C: 2}, [C], weights=by_weight, received={A: 9, B: 1, C: 8}) == [(C, A)]
    assert exchanges({B: 1, C: 3}, [A], weights=by_weight, received={A: 7, B: 9, C: 8}) == [(A, C)]


def test_one_that_has_received_more_gets_a_turn_that_is_shorter_the_lower_its_weight() -> None:
    heavy, ahead = {A: 3.0, B: 1.0}, {B: 50.0}
    assert exchanges({A: 1}, [B], weights=heavy, received=ahead, num_quanta=3 * NUM_TURNS - 0.1) == []
    assert exchanges({A: 1}, [B], weights=heavy, received=ahead, num_quanta=3 * NUM_TURNS) == [(B, A)]
    assert exchanges({B: 1}, [A], weights=heavy, received={A: 50.0}, num_quanta=NUM_TURNS) == [(A, B)]


def test_the_tenant_that_has_most_gives_first_or_the_one_that_has_run_longest() -> None:
    assert exchanges({A: 3, B: 5}, [C, C]) == [(C, B), (C, B)]
    shares = seen({A: 1, B: 1}, [NextJob(uuid4(), C), NextJob(uuid4(), C)], received={A: 1.0, B: 1.0, C: 0.0})
    for order in (1, -1):
        may_leave = [Candidate(uuid4(), A, 0, 3.0), Candidate(uuid4(), B, 0, 2.0)][::order]
        assert [one.tenant_id for _, leaving in choose(shares, may_leave) for one in leaving] == [A], "and only one"


def test_each_sequence_of_a_job_is_a_slot() -> None:
    """One job with eight sequences holds as much as eight jobs, and takes as much."""
    wide, one = Candidate(uuid4(), A, 0, 1.0, num_sequences=8), NextJob(uuid4(), B)
    assert choose(seen({A: 8, B: 1}, [one], received={A: 1.0, B: 2.0}), [wide]) == [], "its tenant runs something"
    assert choose(seen({A: 8, B: 1}, [one], received={A: 2.0, B: 1.0}), [wide]) == [(one, [wide])]
    assert choose(seen({A: 8}, [one, one], received={A: 2.0, B: 1.0}), [wide]) == [(one, [wide])]
    narrow = [Candidate(uuid4(), A, 0, 1.0) for _ in range(8)]
    [(_, leaving)] = choose(seen({A: 8}, [NextJob(uuid4(), B, num_sequences=3)]), narrow)
    assert len(leaving) == 3
    [(_, leaving)] = choose(seen({A: 8}, [NextJob(uuid4(), B, num_sequences=8)]), narrow)
    assert len(leaving) == 4, "up to its share"


def test_what_other_workers_run_counts_and_stays_there() -> None:
    """Here runs none of the tenant that has too much."""
    shares = seen({A: 7, B: 1}, [NextJob(uuid4(), C)])
    assert choose(shares, [Candidate(uuid4(), B, 0, 9.0)]) == []
    [(_, [leaving])] = choose(shares, [Candidate(uuid4(), B, 0, 9.0), Candidate(uuid4(), A, 0, 1.0)])
    assert leaving.tenant_id == A


def test_a_tenant_whose_jobs_have_just_ended_gives_nothing() -> None:
    assert choose(seen({A: 2}, [NextJob(uuid4(), B)]), [Candidate(uuid4(), C, 0, 1.0)]) == []


def test_the_least_urgent_job_leaves_and_of_equals_the_newest() -> None:
    low, old, new, high = (
        Candidate(UUID(int=number), A, priority, 1.0) for number, priority in enumerate((-1, 0, 0, 5))
    )
    shares = seen({A: 4}, [NextJob(uuid4(), B), NextJob(uuid4(), B)])
    for may_leave in ([low, old, new, high], [high, new, old, low]):
        assert [one for _, leaving in choose(shares, may_leave) for one in leaving] == [low, new]


class TestWhichJobsMayLeave:
    def test_a_job_runs_for_a_quantum_after_its_first_token(self) -> None:
        job = make_running()
        job.is_in_engine = True
        assert candidates([job], 1e9, quantum_seconds=2.0) == [], "it computes its prompt"
        job.first_output_at = job.started_at + 0.5
        assert candidates([job], job.first_output_at + 1.9, quantum_seconds=2.0) == []
        [candidate] = candidates([job], job.first_output_at + 4.0, quantum_seconds=2.0)
        assert candidate.num_quanta == pytest.approx(2.0)
        assert candidates([job], job.first_output_at + 1e9, quantum_seconds=float("inf")) == []

    def test_a_job_that_was_long_in_starting_runs_as_long_again(self) -> None:
        job = make_running()
        job.is_in_engine = True
        job.first_output_at = job.started_at + 30.0
        assert candidates([job], job.first_output_at + 29.0, quantum_seconds=2.0) == []
        assert candidates([job], job.first_output_at + 31.0, quantum_seconds=2.0)

    def test_who_leaves_already_or_is_suspected_may_not(self) -> None:
        jobs = [make_running(num_suspicions=int(number == 0)) for number in range(5)]
        for job in jobs:
            job.is_in_engine = True
            job.first_output_at = job.started_at
        jobs[1].is_pausing = jobs[2].is_ending = True
        jobs[3].abort_reason = FinishReason.CANCELLED
        jobs[4].absorb(make_output(jobs[4], "x", finish_reason="stop"))
        assert candidates(jobs, 1e9, quantum_seconds=2.0) == []


def make_batch(sent: list[Any], *, keeps_prefixes: bool) -> RunningBatch:
    storage: Any = SimpleNamespace(model="test-model", pause_quantum_seconds=2.0, passes_messages=False, release=None)
    supervisor: Any = SimpleNamespace(ready=SimpleNamespace(keeps_prefixes=keeps_prefixes), send=sent.append)
    thread: Any = SimpleNamespace(submit=lambda *calls: None)
    return RunningBatch(supervisor, Quarantine(), FlushPacer(Settings()), storage, thread, lambda event: None)


def make_claimed_embedding() -> ClaimedJob:
    return make_claimed(request=EmbeddingRequest(model="test-model", inputs=("x",)), input_lengths=[3])


def test_an_embedding_gives_way_to_one_job_after_the_other_and_goes_on() -> None:
    """Whatever its engine keeps of texts."""
    sent: list[Any] = []
    batch = make_batch(sent, keeps_prefixes=False)
    embedding, first, second = make_claimed_embedding(), make_claimed(), make_claimed()
    batch.admit([embedding, make_claimed()], 0.0)
    text = list(batch._jobs.values())[1]
    batch.absorb(StepDone([make_output(text)], [], EngineStats()))
    assert batch.may_leave(text.started_at) == [], "its turn has just begun"
    assert [candidate.job_id for candidate in batch.may_leave(1e9)] == [embedding.id]
    batch.exchange(Exchange([first], {embedding.id: first.id}), 0.0)
    assert [type(command).__name__ for command in sent] == ["EmbedJob", "AddJob", "AddJob"], "nothing is paused"
    assert (batch.num_occupied, batch.may_leave(1e9)) == (3, [])
    batch.absorb(StepDone([make_output(batch._jobs[first.id], "x", finish_reason="stop")], [], EngineStats()))
    assert [candidate.job_id for candidate in batch.may_leave(1e9)] == [embedding.id], "the one beside it has ended"
    batch.exchange(Exchange([second], {embedding.id: second.id}), 0.0)
    assert (batch.num_occupied, batch.may_leave(1e9)) == (3, [])


def test_a_job_beside_an_embedding_is_paused_for_another_one_without_a_third() -> None:
    batch = make_batch([], keeps_prefixes=True)
    embedding, first, second = make_claimed_embedding(), make_claimed(), make_claimed()
    batch.admit([embedding], 0.0)
    batch.exchange(Exchange([first], {embedding.id: first.id}), 0.0)
    batch.absorb(StepDone([make_output(batch._jobs[first.id])], [], EngineStats()))
    assert [candidate.job_id for candidate in batch.may_leave(1e9)] == [first.id]
    batch.exchange(Exchange([second], {first.id: second.id}), 0.0)
    batch._forget(batch._jobs[first.id])  # as when it has been put back
    assert (batch.num_occupied, batch.may_leave(1e9)) == (2, [])


def test_nobody_leaves_while_others_are_being_paused() -> None:
    batch = make_batch([], keeps_prefixes=True)
    batch.admit([make_claimed() for _ in range(3)], 0.0)
    jobs = list(batch._jobs.values())
    batch.absorb(StepDone([make_output(job) for job in jobs], [], EngineStats()))
    assert len(batch.may_leave(1e9)) == 3
    batch.exchange(Exchange([], {jobs[0].id: uuid4()}), 0.0)
    assert batch.may_leave(1e9) == []
    batch._forget(jobs[0])  # as when it has been put back
    assert len(batch.may_leave(1e9)) == 2


def test_a_slot_is_free_as_soon_as_the_engine_is_done_with_it() -> None:
    batch = make_batch([], keeps_prefixes=True)
    batch.admit([make_claimed() for _ in range(3)], 0.0)
    first = next(iter(batch._jobs.values()))
    batch.absorb(StepDone([make_output(first, "x", finish_reason="stop")], [], EngineStats()))
    batch.flush_due(1e9)
    assert (len(batch), batch.num_occupied) == (3, 2)


def test_what_a_resumed_job_had_to_compute_again_is_what_the_cache_did_not_have() -> None:
    """Of each of its texts, once."""
    chunks = [TokenChunk(sequence_number=index + 1, index=index, text="", token_ids=(5, 6)) for index in range(2)]
    job = make_running(n=3, committed_chunks=chunks)  # the third has not begun
    outputs = [make_output(job, "x", index=index, num_cached_tokens=number) for index, number in enumerate((4, 1, 0))]
    assert [job.num_recomputed_tokens(output) for output in outputs] == [1, 4, 0]
    for output in outputs:
        job.hear(output.index, 1.0)
    assert [job.num_recomputed_tokens(output) for output in outputs] == [0, 0, 0]
