"""All jobs that this worker has claimed, from claim to end: sends them to the engine, stores their output, ends them.

Used only by the runner's thread. A job leaves the batch in exactly one way: it is finalised, fenced off (by SQL, or
because its lease has expired by our own clock), released, or reported as crashed.
"""

import logging
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from time import monotonic
from uuid import UUID

from domain.errors import EngineError
from domain.jobs import FinishReason, JobStatus, Lane
from gpu_worker.commits import FlushOutcome, FlushPacer, JobFlush, JobStorage, commit
from gpu_worker.engine_process.frames import (
    AbortJob,
    EmbeddingOutput,
    JobFailed,
    JobReturned,
    PauseJob,
    SequenceOutput,
    StepDone,
)
from gpu_worker.engine_process.supervisor import EngineExit, Supervisor
from gpu_worker.job import RunningEmbedding, RunningJob, make_running
from gpu_worker.pausing import Candidate, Exchange, candidates, pause
from gpu_worker.quarantine import Action, Quarantine
from gpu_worker.threads import Answer, RunnerEvent, RunnerEventKind, StorageThread
from metrics import inter_token_latency_seconds, jobs_paused_total, jobs_recomputed_tokens_total
from storage.jobs import ClaimedJob, Returned

log = logging.getLogger(__name__)

NUM_REMEMBERED = 10_000  # claims that are over, so that one with the same attempt is recognised

LEASE_MARGIN = 0.1  # share of the lease before whose last part we must know that it was renewed


class RunningBatch:
    """`emit` is called with the events of all jobs, in order."""

    def __init__(
        self,
        supervisor: Supervisor,
        quarantine: Quarantine,
        pacer: FlushPacer,
        storage: JobStorage,
        thread: StorageThread,
        emit: Callable[[RunnerEvent], None],
    ) -> None:
        self._supervisor = supervisor
        self._quarantine = quarantine
        self._pacer = pacer
        self._storage = storage
        self._storage_thread = thread
        self._emit = emit
        self._jobs: dict[UUID, RunningJob] = {}
        self._jobs_by_name: dict[str, RunningJob] = {}
        self._last_attempts: OrderedDict[UUID, int] = OrderedDict()  # of jobs that have left, newest last
        # Since this worker started: tokens received, and prompt tokens of the jobs that have had output.
        self.num_tokens = self.num_prompt_tokens = 0
        self._latency = inter_token_latency_seconds.labels(storage.model)
        jobs_paused_total.labels(storage.model)  # at 0 from the start
        self._num_recomputed_tokens = jobs_recomputed_tokens_total.labels(storage.model)

    def __len__(self) -> int:
        return len(self._jobs)

    @property
    def num_occupied(self) -> int:
        """How many of the engine's slots are taken: those of jobs that are over are free before their ends are stored,
        and the next jobs need not wait for that."""
        return sum(job.num_sequences for job in self._jobs.values() if not job.is_over)

    @property
    def job_ids(self) -> frozenset[UUID]:
        return frozenset(self._jobs)

    # In

    def admit(self, claimed: Sequence[ClaimedJob], sent_at: float) -> None:
        """Start these jobs. `sent_at` is the monotonic time just before the claim was sent: no lease began earlier."""
        for claim in claimed:
            self._admit(make_running(claim, claimed_at=sent_at))

    def may_leave(self, now: float) -> list[Candidate]:
        """The jobs that may be paused or give way. None while others are being paused: their slots are given away
        already, but their tenants still count as having them."""
        ready = self._supervisor.ready
        if ready is None or any(job.is_pausing for job in self._jobs.values()):
            return []
        quantum = self._storage.pause_quantum_seconds
        return candidates(self._jobs.values(), now, quantum_seconds=quantum, keeps_prefixes=ready.keeps_prefixes)

    def exchange(self, done: Exchange, sent_at: float) -> None:
        """Pause the jobs that leave, and start those that were claimed for their slots. Embeddings stay."""
        for job_id, taker_id in done.leaving.items():
            job = self._jobs.get(job_id)
            if isinstance(job, RunningEmbedding):
                job.gave_way_to = taker_id
                continue
            self._replace_beside(job_id, taker_id)
            if job is not None and job.is_going_on:
                job.is_pausing = True
                self._supervisor.send(PauseJob(job.name, job.attempt))
        self.admit(done.claimed, sent_at)

    def _replace_beside(self, job_id: UUID, taker_id: UUID) -> None:
        """If an embedding had given way to a job, it has now given way to the one that takes that one's slot."""
        for job in self._jobs.values():
            if isinstance(job, RunningEmbedding) and job.gave_way_to == job_id:
                job.gave_way_to = taker_id

    def serve_quarantine(self, now: float) -> None:
        """Take the next action for the job that must run alone, if there is one."""
        job = self._quarantine.job
        if job is None or job.is_ending:
            return
        action = self._quarantine.next_action(
            now,
            is_alone=len(self._jobs) == 1,
            is_engine_fresh=self._supervisor.is_fresh,
            is_engine_ready=self._supervisor.ready is not None,
        )
        if action is Action.RELEASE_OTHERS:
            self.release([other for other in self._jobs.values() if other is not job])
        elif action is Action.REPLACE_ENGINE:
            self._supervisor.restart()
        elif action is Action.START:
            self._run(job)

    def _admit(self, job: RunningJob) -> None:
        stale = self._jobs.get(job.id)
        if stale is not None:  # an earlier attempt that the janitor has rescued without our noticing
            self._silence(stale)
            self._forget(stale)
        self._jobs[job.id] = self._jobs_by_name[job.name] = job
        self._emit(RunnerEvent(RunnerEventKind.CLAIMED, job.id))
        if self._last_attempts.get(job.id) == job.attempt:
            # A crash of the database has lost the first claim. The engine's output of it may still be on its way.
            self.release([job])
        elif job.claimed.lane is Lane.ISOLATED:
            self._quarantine.admit(job)
        elif self._supervisor.ready is None and not job.is_over:
            self.release([job])  # the engine died while the job was being claimed
        elif job.num_completion_tokens and not job.is_over and self._storage.passes_messages:
            self._begin_anew(job)
        elif not job.is_over:  # otherwise it only needs to be finalised, which the next flush does
            self._run(job)

    def _run(self, job: RunningJob) -> None:
        job.is_in_engine = True
        self._supervisor.send(job.command(passes_messages=self._storage.passes_messages))

    def _begin_anew(self, job: RunningJob) -> None:
        """For a job with output that its server cannot continue: as its entry says."""
        if self._storage.remote_resume == "fail":
            reason = "the answer was interrupted, and its server cannot continue it; submit the job again"
            job.fail(JobFailed(job.name, job.attempt, EngineError.code, reason))
            return
        self._forget(job)
        self._storage_thread.submit(
            lambda is_repeated: self._storage.start_over([job.id]),
            lambda answer: self._emit_released([job.id]),
            lambda exc: self._emit_released([job.id]),
        )

    def release_unstarted(self) -> None:
        """Release the job that is waiting to run alone, if there is one."""
        job = self._quarantine.job
        if job is not None and not job.is_in_engine:
            self.release([job])

    # Out

    def absorb(self, done: StepDone) -> None:
        """Add a step's outputs to their jobs. Outputs of jobs that have left in the meantime are ignored."""
        now = monotonic()
        self._charge(done.stats.step_seconds)
        gaps: Counter[float] = Counter()  # seconds since a sequence's last output; equal for all that decode together
        for output in done.outputs:
            self.num_tokens += len(output.token_ids)
            if (job := self._running(output)) is not None:
                self._note_output(job, now)
                if job.claimed.seconds_paused is not None:
                    self._num_recomputed_tokens.inc(job.num_recomputed_tokens(output))
                if output.token_ids and (gap := job.hear(output.index, now)) is not None:
                    gaps[gap] += 1
                job.absorb(output)
        for gap, count in gaps.items():
            self._latency.observe_many(gap, count)
        for vectors in done.embeddings:
            if isinstance(job := self._running(vectors), RunningEmbedding):
                self._note_output(job, now)
                job.absorb_embedding(vectors)
        for failure in done.failures:
            if (job := self._running(failure)) is not None:
                log.warning(
                    "the engine could not run a job: %s",
                    failure.code,
                    extra={"job_id": job.name, "attempt": job.attempt},
                )
                job.fail(failure)
        returned = [job for news in done.returned if (job := self._running(news)) is not None]
        self._put_back([job for job in returned if job.is_pausing], lambda job_ids: pause(self._storage, job_ids))
        self.release([job for job in returned if not job.is_pausing])

    def _charge(self, seconds: float) -> None:
        """Divide the time of a step over the sequences in the engine."""
        inside = [job for job in self._jobs.values() if job.is_in_engine and not job.is_over]
        share = seconds / max(1, sum(job.num_sequences for job in inside))
        for job in inside:
            job.engine_seconds += share * job.num_sequences

    def _note_output(self, job: RunningJob, now: float) -> None:
        if job.first_output_at is None:
            job.first_output_at = now
            self.num_prompt_tokens += len(job.claimed.prompt_token_ids)

    def seconds_until_due(self, now: float) -> float | None:
        return self._pacer.seconds_until_due(self._jobs.values(), now)

    def flush_due(self, now: float) -> None:
        """Commit and publish the output that is due, and renew the leases of jobs without output."""
        flushes = self._pacer.take_due(self._jobs.values(), now)
        if flushes:
            self._commit(flushes, on_finished=self._pacer.finish)

    def flush(self, jobs: Sequence[RunningJob]) -> None:
        """Commit the output of these jobs now."""
        flushes = self._pacer.take(jobs, monotonic())
        if flushes:
            self._commit(flushes, on_finished=lambda outcome: None)

    def _commit(self, flushes: list[JobFlush], *, on_finished: Callable[[FlushOutcome | None], None]) -> None:
        def on_done(answer: Answer[FlushOutcome]) -> None:
            on_finished(answer.value)
            for flush in flushes:
                self._finish(flush, answer)

        def on_error(exc: Exception) -> None:
            on_finished(None)
            log.error("chunks could not be committed; other attempts will continue their jobs", exc_info=exc)
            for flush in flushes:
                self._lose(flush.job)

        self._storage_thread.submit(lambda is_repeated: commit(self._storage, flushes), on_done, on_error)

    def _finish(self, flush: JobFlush, answer: Answer[FlushOutcome]) -> None:
        """Apply the outcome of a flush to one of its jobs. A later flush of the job may already be on its way."""
        job = flush.job
        if self._jobs.get(job.id) is not job:
            return
        status = answer.value.ended.get(job.id)
        held = answer.value.held.get(job.id)
        if status is not None:
            self._forget(job)
            runtime_seconds = monotonic() - job.started_at
            self._emit(RunnerEvent(RunnerEventKind.ENDED, job.id, status, runtime_seconds, job.summary()))
        elif held is None or held.attempt != job.attempt or flush.finalisation is not None:
            log.warning(
                "another worker owns the job now; stopping it here", extra={"job_id": job.name, "attempt": job.attempt}
            )
            self._lose(job)
        else:
            job.leased_at = answer.sent_at
            if held.is_cancel_requested:
                self._abort(job, FinishReason.CANCELLED)
            elif held.is_past_deadline:
                job.has_run_out = held.has_run_out
                self._abort(job, FinishReason.DEADLINE)

    # Interruptions

    def cancel(self, job_id: UUID) -> None:
        """End the job with the output that it has so far, if it runs here. The caller must update SQL."""
        job = self._jobs.get(job_id)
        if job is not None:
            self._abort(job, FinishReason.CANCELLED)

    def release(self, jobs: Sequence[RunningJob]) -> None:
        """Requeue these jobs, with all their output and without counting a failure."""
        self._put_back(jobs, self._storage.release)

    def _put_back(self, jobs: Sequence[RunningJob], requeue: Callable[[list[UUID]], None]) -> None:
        jobs = [job for job in jobs if not job.is_ending]
        self.flush(jobs)
        jobs = [job for job in jobs if not job.is_ending]
        if not jobs:
            return
        for job in jobs:
            self._silence(job)
            self._forget(job)
        job_ids = [job.id for job in jobs]
        self._storage_thread.submit(
            lambda is_repeated: requeue(job_ids),
            lambda answer: self._emit_released(job_ids),
            lambda exc: self._emit_released(job_ids),
        )

    def release_texts(self) -> None:
        """Release what would go on where it stopped. Embeddings would begin again, and perhaps never end."""
        self.release([job for job in self._jobs.values() if not isinstance(job, RunningEmbedding)])

    def release_all(self) -> None:
        self.release(list(self._jobs.values()))

    def fence(self, now: float) -> None:
        """Stop jobs whose leases have expired by our own clock. Correctness depends on the fence in SQL; this only
        frees the engine early."""
        lease_seconds = self._storage.lease_seconds * (1 - LEASE_MARGIN)
        lapsed = [job for job in self._jobs.values() if not job.is_ending and now - job.leased_at > lease_seconds]
        if lapsed:
            log.warning("could not renew the leases of %d jobs in time; stopping them", len(lapsed))
            self.release(lapsed)

    def report_exit(self, exit_: EngineExit) -> str:
        """The engine has ended: commit what it sent before, report its jobs as crashed, and plan its restart. Returns
        in words how it ended."""
        in_engine = [job for job in self._jobs.values() if job.is_in_engine]
        self.flush(in_engine)
        lost = [job for job in in_engine if not job.is_ending]
        verdict = self._quarantine.judge(exit_, lost)
        self._supervisor.plan_restart(verdict.num_crashes_before)
        log.error("the engine ended: %s", verdict.how, extra={"num_jobs": len(lost)})
        if self._quarantine.is_worker_at_fault:
            self.release(lost)
        elif lost:
            self._report_crash(lost, verdict.weight_by_job_id)
        return verdict.how

    def _report_crash(self, lost: list[RunningJob], weight_by_job_id: dict[UUID, int]) -> None:
        for job in lost:
            self._forget(job)

        def on_done(answer: Answer[list[Returned]]) -> None:
            status_by_job_id = {returned.job_id: returned.status for returned in answer.value}
            for job in lost:
                self._emit_returned(job, status_by_job_id.get(job.id, JobStatus.QUEUED))

        self._storage_thread.submit(
            lambda is_repeated: self._storage.report_crash(weight_by_job_id),
            on_done,
            lambda exc: self._emit_released([job.id for job in lost]),
        )

    def _emit_returned(self, job: RunningJob, status: JobStatus) -> None:
        if status.is_terminal:
            runtime_seconds = monotonic() - job.started_at
            self._emit(RunnerEvent(RunnerEventKind.ENDED, job.id, status, runtime_seconds, "engine crashed"))
        else:
            self._emit_released([job.id])

    def _emit_released(self, job_ids: Sequence[UUID]) -> None:
        for job_id in job_ids:
            self._emit(RunnerEvent(RunnerEventKind.RELEASED, job_id))

    def _abort(self, job: RunningJob, reason: FinishReason) -> None:
        """Tell the engine to abort the job, once. Its final output comes with the engine's next step."""
        if job.abort_reason is not None or job.is_over:
            return
        job.abort_reason = reason
        if job.is_in_engine:
            self._supervisor.send(AbortJob(job.name, job.attempt, reason.value))
        else:
            job.cut_off(reason)

    def _lose(self, job: RunningJob) -> None:
        """Drop a job that this worker no longer owns."""
        if self._jobs.get(job.id) is job:
            self._silence(job)
            self._forget(job)
            self._emit_released([job.id])

    def _silence(self, job: RunningJob) -> None:
        if job.is_in_engine:
            self._supervisor.send(AbortJob(job.name, job.attempt, ""))

    def _forget(self, job: RunningJob) -> None:
        del self._jobs[job.id], self._jobs_by_name[job.name]
        self._last_attempts[job.id] = job.attempt
        self._last_attempts.move_to_end(job.id)
        if len(self._last_attempts) > NUM_REMEMBERED:
            self._last_attempts.popitem(last=False)
        self._quarantine.discharge(job)

    def _running(self, news: SequenceOutput | EmbeddingOutput | JobFailed | JobReturned) -> RunningJob | None:
        job = self._jobs_by_name.get(news.job_id)
        return job if job is not None and job.attempt == news.attempt and not job.is_ending else None
