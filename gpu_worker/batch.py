"""Every job claimed by this worker, from its claim to its end.

What the kernel counts of its OOM killer: it tells a SIGKILL that memory explains from one that somebody sent.

Every job claimed by this worker, from its claim to its end: into the engine, out in chunks, and what interrupts it.

Belongs to the runner's thread. A job leaves by exactly one of: its finalisation, a fence (SQL or our own clock says
that it is not ours any more), a release, a crash report.
"""

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from time import monotonic
from uuid import UUID

from domain.jobs import FinishReason, JobStatus, Lane
from gpu_worker.commits import FlushOutcome, JobFlush, JobStorage, Publisher, commit
from gpu_worker.engine_process.frames import AbortJob, EmbeddingOutput, JobFailed, SequenceOutput, StepDone
from gpu_worker.engine_process.supervisor import EngineExit, Supervisor, weights_of_suspicion
from gpu_worker.job import RunningEmbedding, RunningJob, make_running
from gpu_worker.threads import Answer, RunnerEvent, RunnerEventKind, StorageThread
from metrics import inter_token_latency_seconds
from storage.jobs import ClaimedJob, Held, Returned

log = logging.getLogger(__name__)

OWN_CGROUPS = Path("/proc/self/cgroup")

CGROUP_ROOT = Path("/sys/fs/cgroup")

HOST_COUNTERS = Path("/proc/vmstat")

COUNTER = "oom_kill"  # of processes killed, by that name in both files


class OomKills:
    """Of our own control group and those below it (cgroup v2), else of the whole host."""

    def __init__(self, paths: Sequence[Path] | None = None) -> None:
        self._paths = [*_own_group(), HOST_COUNTERS] if paths is None else paths
        self._num_seen = self._count()

    def is_possible(self) -> bool:
        """Whether the OOM killer has killed since this was last asked; True where nobody counts."""
        num_before, self._num_seen = self._num_seen, self._count()
        return self._num_seen is None or self._num_seen != num_before

    def _count(self) -> int | None:
        for path in self._paths:
            with suppress(OSError):
                words_by_line = [line.split() for line in path.read_text().splitlines()]
                return next((int(words[1]) for words in words_by_line if words[:1] == [COUNTER]), None)
        return None


def _own_group() -> list[Path]:
    """`memory.events` of the group that we and the engine are in; the root group has none."""
    with suppress(OSError):
        groups = [line.removeprefix("0::/") for line in OWN_CGROUPS.read_text().splitlines() if line.startswith("0::/")]
        return [CGROUP_ROOT / group / "memory.events" for group in groups]
    return []


MAX_NEIGHBOUR_SECONDS = 1.0  # so long a suspect waits for the ends of those that run beside it

LEASE_MARGIN = 0.1  # of the lease: by then we must know that it was renewed


class RunningBatch:
    """`emit` gets the events of all jobs, in order; those that leave room or a queued job behind among them."""

    def __init__(
        self,
        supervisor: Supervisor,
        publisher: Publisher,
        storage: JobStorage,
        thread: StorageThread,
        emit: Callable[[RunnerEvent], None],
    ) -> None:
        self._supervisor = supervisor
        self._publisher = publisher
        self._storage = storage
        self._thread = thread
        self._emit = emit
        self._jobs: dict[UUID, RunningJob] = {}
        self._jobs_by_name: dict[str, RunningJob] = {}
        self._oom_kills = OomKills()
        self._isolated: RunningJob | None = None  # a suspect: it waits until it is alone, and others wait for it
        # In this worker's life: tokens that were received, and prompt tokens of jobs that had an output.
        self.num_tokens = self.num_prompt_tokens = 0
        self._latency = inter_token_latency_seconds.labels(storage.model)

    def __len__(self) -> int:
        return len(self._jobs)

    @property
    def num_sequences(self) -> int:
        return sum(job.num_sequences for job in self._jobs.values())

    @property
    def job_ids(self) -> frozenset[UUID]:
        return frozenset(self._jobs)

    @property
    def has_isolated(self) -> bool:
        return self._isolated is not None

    # In

    def admit(self, claimed: Sequence[ClaimedJob], sent_at: float) -> None:
        """Jobs whose claim committed; the claim was sent at `sent_at`."""
        for claim in claimed:
            self._admit(make_running(claim, claimed_at=sent_at))

    def adopt(self, job_ids: Sequence[UUID]) -> None:
        """Deliveries of jobs that run here already, having been claimed without one."""
        for job_id in job_ids:
            self._emit(RunnerEvent(RunnerEventKind.CLAIMED, job_id))

    def start_isolated(self, now: float) -> None:
        """Let the isolated job run as soon as it is alone, in an engine that has had no other. For a suspect the others
        make room before long, and go on elsewhere or after it: its trial is short."""
        job = self._isolated
        if job is None or job.is_in_engine or job.is_ending:
            return
        if len(self._jobs) > 1:
            if job.is_suspect and now - job.started_at > MAX_NEIGHBOUR_SECONDS:
                self.release([other for other in self._jobs.values() if other is not job])
        elif not self._supervisor.is_fresh:
            self._supervisor.restart()
        elif self._supervisor.ready is not None:
            self._run(job)

    def clear_isolated(self) -> bool:
        """Let others join a suspect that has shown by now that it can run. Whether that happened now."""
        if self._isolated is None or not self._isolated.is_cleared:
            return False
        log.info("a suspect is cleared", extra={"job_id": self._isolated.name, "attempt": self._isolated.attempt})
        self._isolated = None
        return True

    def _admit(self, job: RunningJob) -> None:
        stale = self._jobs.get(job.id)
        if stale is not None:  # an earlier attempt, lost to a rescue that we did not hear of
            self._silence(stale)
            self._forget(stale)
        self._jobs[job.id] = self._jobs_by_name[job.name] = job
        self._emit(RunnerEvent(RunnerEventKind.CLAIMED, job.id))
        if job.claimed.lane is Lane.ISOLATED:
            log.warning("a suspect is run alone", extra={"job_id": job.name, "attempt": job.attempt})
            self._isolated = job
        elif self._supervisor.ready is None and not job.is_over:
            self.release([job])  # the engine died while the claim was under way
        elif not job.is_over and not job.is_suspect:  # else only its finalisation was missing; the next flush brings it
            self._run(job)

    def start_suspects(self) -> None:
        """Let those run that were in an engine which crashed, one cohort at a time: another crash then halves the set
        of suspects. The others wait, out of the engine, until these have ended or proven themselves."""
        waiting = [job for job in self._jobs.values() if self._is_waiting_suspect(job)]
        if not waiting or self._supervisor.ready is None:
            return
        running = [job for job in self._jobs.values() if job.is_in_engine and job.is_suspect]
        cohort = (running or waiting)[0].cohort
        for job in waiting:
            if job.cohort == cohort:
                self._run(job)

    def _is_waiting_suspect(self, job: RunningJob) -> bool:
        is_standard = job.claimed.lane is Lane.STANDARD
        return is_standard and job.is_suspect and not job.is_in_engine and not job.is_ending

    def _run(self, job: RunningJob) -> None:
        job.is_in_engine = True
        self._supervisor.send(job.command())

    def release_unstarted(self) -> None:
        """Give back the isolated job that still waits to be alone."""
        if self._isolated is not None and not self._isolated.is_in_engine:
            self.release([self._isolated])

    # Out

    def absorb(self, done: StepDone) -> None:
        """What a step produced; of jobs that left meanwhile, nothing is kept."""
        now = monotonic()
        gaps: Counter[float] = Counter()  # between two outputs of a sequence; those that decode together have the same
        for output in done.outputs:
            self.num_tokens += len(output.token_ids)
            if (job := self._running(output)) is not None:
                self._note_output(job)
                if output.token_ids and (gap := job.hear(output.index, now)) is not None:
                    gaps[gap] += 1
                job.absorb(output)
        for gap, count in gaps.items():
            self._latency.observe_many(gap, count)
        for vectors in done.embeddings:
            if isinstance(job := self._running(vectors), RunningEmbedding):
                self._note_output(job)
                job.absorb_embedding(vectors)
        for failure in done.failures:
            if (job := self._running(failure)) is not None:
                log.warning(
                    "the engine gave a job up: %s", failure.code, extra={"job_id": job.name, "attempt": job.attempt}
                )
                job.fail(failure)

    def _note_output(self, job: RunningJob) -> None:
        if not job.has_output:
            job.has_output = True
            self.num_prompt_tokens += len(job.claimed.prompt_token_ids)

    def seconds_until_due(self, now: float) -> float | None:
        return self._publisher.seconds_until_due(self._jobs.values(), now)

    def flush_due(self, now: float) -> None:
        """Commit and publish what is due; renew the leases of jobs that had nothing to say."""
        flushes = self._publisher.take_due(self._jobs.values(), now)
        if flushes:
            self._commit(flushes, on_settled=self._publisher.settle)

    def flush(self, jobs: Sequence[RunningJob]) -> None:
        """Commit what these jobs have to say, now."""
        flushes = self._publisher.take(jobs, monotonic())
        if flushes:
            self._commit(flushes, on_settled=lambda outcome: None)

    def _commit(self, flushes: list[JobFlush], *, on_settled: Callable[[FlushOutcome | None], None]) -> None:
        def on_done(answer: Answer[FlushOutcome]) -> None:
            on_settled(answer.value)
            for flush in flushes:
                self._settle(flush, answer)

        def on_error(exc: Exception) -> None:
            on_settled(None)
            log.error("chunks could not be committed; their jobs are left to another attempt", exc_info=exc)
            for flush in flushes:
                self._lose(flush.job)

        self._thread.submit(lambda is_repeated: commit(self._storage, flushes), on_done, on_error)

    def _settle(self, flush: JobFlush, answer: Answer[FlushOutcome]) -> None:
        """Act on what SQL said of one job of a flush; its end may be on the way with a later one."""
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
            log.warning("fenced off: the job has another owner", extra={"job_id": job.name, "attempt": job.attempt})
            self._lose(job)
        else:
            job.leased_at = answer.sent_at
            self._obey(job, held)

    def _obey(self, job: RunningJob, held: Held) -> None:
        if held.is_cancel_requested:
            self._abort(job, FinishReason.CANCELLED)
        elif held.is_past_deadline:
            self._abort(job, FinishReason.DEADLINE)

    # Interruptions

    def cancel(self, job_id: UUID) -> None:
        """End the job with what it has, if it runs here; SQL is the caller's matter."""
        job = self._jobs.get(job_id)
        if job is not None:
            self._abort(job, FinishReason.CANCELLED)

    def release(self, jobs: Sequence[RunningJob]) -> None:
        """Give jobs back to the queue with all that they have produced, uncharged."""
        jobs = [job for job in jobs if not job.is_ending]
        self.flush(jobs)
        jobs = [job for job in jobs if not job.is_ending]
        if not jobs:
            return
        for job in jobs:
            self._silence(job)
            self._forget(job)
        job_ids = [job.id for job in jobs]
        self._thread.submit(
            lambda is_repeated: self._storage.release(job_ids),
            lambda answer: self._emit_released(job_ids),
            lambda exc: self._emit_released(job_ids),
        )

    def release_all(self) -> None:
        self.release(list(self._jobs.values()))

    def fence(self, now: float) -> None:
        """Stop what we may not own any more by our own clock. SQL's fence is what counts; this one frees the engine."""
        lease_seconds = self._storage.lease_seconds * (1 - LEASE_MARGIN)
        lapsed = [job for job in self._jobs.values() if not job.is_ending and now - job.leased_at > lease_seconds]
        if lapsed:
            log.warning("%d leases could not be renewed in time; their jobs are stopped", len(lapsed))
            self.release(lapsed)

    def report_exit(self, exit_: EngineExit) -> None:
        """The engine is gone: keep what arrived before, charge and release its jobs, and plan its restart."""
        in_engine = [job for job in self._jobs.values() if job.is_in_engine]
        self.flush(in_engine)
        lost = [job for job in in_engine if not job.is_ending]
        weights = weights_of_suspicion(exit_, [(job.name, job.attempt) for job in lost])
        weight_by_job_id = {job.id: weights[job.name, job.attempt] for job in lost}
        is_alone = self._isolated is not None and lost == [self._isolated]
        if exit_.is_outside_kill and (is_alone or not self._oom_kills.is_possible()):
            # Somebody's kill is no job's doing. Memory may be another's, too: alone and accused would mean guilty.
            weight_by_job_id = dict.fromkeys(weight_by_job_id, 0)
        self._supervisor.note_crash(
            is_explained=is_alone and any(weight_by_job_id.values()),
            suspects=frozenset(job_id for job_id, weight in weight_by_job_id.items() if weight),
            is_outside_kill=exit_.is_outside_kill,
        )
        log.error("the engine ended: %s", exit_.description, extra={"num_jobs": len(lost)})
        if self._supervisor.is_crash_looping:
            self.release(lost)  # it is the worker, not the jobs
        elif lost:
            self._report_crash(lost, weight_by_job_id)

    def _report_crash(self, lost: list[RunningJob], weight_by_job_id: dict[UUID, int]) -> None:
        for job in lost:
            self._forget(job)

        def on_done(answer: Answer[list[Returned]]) -> None:
            status_by_job_id = {returned.job_id: returned.status for returned in answer.value}
            for job in lost:
                self._emit_returned(job, status_by_job_id.get(job.id, JobStatus.QUEUED))

        self._thread.submit(
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
        """Once per job; its last words come with the engine's next step."""
        if job.abort_reason is not None or job.is_over:
            return
        job.abort_reason = reason
        if job.is_in_engine:
            self._supervisor.send(AbortJob(job.name, job.attempt, reason.value))
        else:
            job.cut_off(reason)

    def _lose(self, job: RunningJob) -> None:
        """It is not ours any more."""
        if self._jobs.get(job.id) is job:
            self._silence(job)
            self._forget(job)
            self._emit_released([job.id])

    def _silence(self, job: RunningJob) -> None:
        if job.is_in_engine:
            self._supervisor.send(AbortJob(job.name, job.attempt, ""))

    def _forget(self, job: RunningJob) -> None:
        del self._jobs[job.id], self._jobs_by_name[job.name]
        if job is self._isolated:
            self._isolated = None

    def _running(self, news: SequenceOutput | EmbeddingOutput | JobFailed) -> RunningJob | None:
        job = self._jobs_by_name.get(news.job_id)
        return job if job is not None and job.attempt == news.attempt and not job.is_ending else None
