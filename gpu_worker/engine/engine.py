"""The engine: each step admits sequences, runs the model, commits the drawn tokens and returns the outputs.

A bad job never affects another, and the end of every job is reported.

If the model runner supports it, the engine runs one step ahead: while the device is still drawing a step's tokens, the
next step of the same sequences is queued on the device and reads the tokens from its memory. Each call of `step`
commits one step.
"""

import logging
import time
from collections.abc import Sequence as Rows
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

from domain.errors import EngineError, OutOfMemory
from domain.jobs import FinishReason
from gpu_worker.engine.backends import RecordStep, StepMember
from gpu_worker.engine.reports import StepResult
from gpu_worker.engine.runner import DrawAgain, ModelRunner
from gpu_worker.engine.sampling import Drawn, GrammarFailed, describe
from gpu_worker.engine.scheduler import ModelLimits, ScheduledRow, Scheduler, make_engine_job
from gpu_worker.engine.sequence import EngineJob, Grammars, Sequence
from gpu_worker.engine_process.frames import AddJob, EngineStats, JobFailed, StepDone
from text.tokenizers import token_table_of

log = logging.getLogger(__name__)

STEPS_PER_MEMORY_READING = 64  # each reading costs a system call


@dataclass(frozen=True, slots=True)
class LaunchedStep:
    rows: Rows[ScheduledRow]
    launched: Any  # what ModelRunner.launch returned


class Engine:
    def __init__(self, *, scheduler: Scheduler, runner: ModelRunner, tokenizer: Tokenizer, limits: ModelLimits) -> None:
        self.scheduler = scheduler
        self._runner = runner
        self._tokenizer = tokenizer
        self._tokens = token_table_of(tokenizer)
        self._limits = limits
        self._grammars = Grammars(tokenizer, limits.vocab_size, limits.eos_token_ids)
        self._jobs: dict[tuple[str, int], EngineJob] = {}
        self._ended: list[Sequence] = []  # ended since the last step: aborted, or complete when they were added
        self._ahead: LaunchedStep | None = None  # the step after the last committed one, if it is launched already
        self._num_jobs = self._num_steps = self._num_generation_tokens = self._num_prompt_tokens = 0
        self._step_seconds = 0.0
        self._memory_bytes = runner.memory_bytes()

    @property
    def has_work(self) -> bool:
        return bool(self._jobs or self._ended)

    def add(self, command: AddJob) -> None:
        """Add a job to the batch. Raises a CeleriacError if it can never run, and then keeps nothing of it."""
        job = make_engine_job(command, self._limits, self._tokenizer, self._grammars, arrival=self._num_jobs)
        self._num_jobs += 1
        self._jobs[job.id, job.attempt] = job
        for sequence in job.sequences:
            if sequence.is_finished:
                self._ended.append(sequence)
            else:
                self.scheduler.add(sequence)
        self._forget_if_done(job)

    def abort(self, job_id: str, attempt: int, reason: str) -> None:
        """Remove the job, if it is here. The next step returns its final outputs; none if `reason` is empty."""
        job = self._jobs.pop((job_id, attempt), None)
        if job is None:
            return
        for sequence in job.sequences:
            if not sequence.is_finished:
                self._leave(sequence)
                sequence.finish(FinishReason(reason) if reason else FinishReason.CANCELLED)
                self._ended.append(sequence)
        if not reason:
            self._ended = [sequence for sequence in self._ended if sequence.job is not job]

    def step(self, record: RecordStep) -> StepDone:
        """Run one step of the batch and commit it. `record` is called with the step's jobs before the model runs."""
        started = time.perf_counter()
        result = StepResult({sequence: [] for sequence in self._ended})
        self._ended = []
        ahead, self._ahead = self._ahead, None
        if ahead is not None and any(self._is_running(row.sequence) for row in ahead.rows):
            drawn = self._run(ahead.rows, ahead, record, result)
        else:
            drawn = self._run(self._schedule(record), None, record, result)
        for row, token in drawn:
            self._commit(row, token, result)
        self._num_steps += 1
        if self._num_steps % STEPS_PER_MEMORY_READING == 0:
            self._memory_bytes = self._runner.memory_bytes()
        self._step_seconds = time.perf_counter() - started
        return StepDone(outputs=result.outputs(), failures=result.failures, stats=self.stats())

    def stats(self) -> EngineStats:
        scheduler = self.scheduler
        return EngineStats(
            num_steps=self._num_steps,
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting),
            num_preemptions=scheduler.num_preemptions,
            num_generation_tokens=self._num_generation_tokens,
            num_prompt_tokens=self._num_prompt_tokens,
            num_prefix_cache_queries=scheduler.num_prefix_cache_queries,
            num_prefix_cache_hits=scheduler.num_prefix_cache_hits,
            cache_usage=scheduler.pool.usage,
            step_seconds=self._step_seconds,
            memory_bytes=self._memory_bytes,
        )

    def _schedule(self, record: RecordStep) -> list[ScheduledRow]:
        scheduled = self.scheduler.schedule()
        for sequence in scheduled.preempted:
            self._runner.discard(sequence)
        if scheduled.rows:
            record(_members(scheduled.rows))
            self._runner.copy_blocks(scheduled.copies)
        return scheduled.rows

    def _run(
        self, rows: Rows[ScheduledRow], step: LaunchedStep | None, record: RecordStep, result: StepResult
    ) -> list[tuple[ScheduledRow, Drawn | None]]:
        """Compute `rows`, launched already if `step` is given, and launch the step after them if that is possible.

        Returns the rows that were computed, each with its draw.
        """
        if not rows:
            return []
        try:
            launched = self._runner.launch(rows) if step is None else step.launched
            self._ahead = self._launch_ahead(rows, record)
            drawn = list(zip(rows, self._runner.collect(launched), strict=True))
        except self._runner.fatal_errors:
            raise  # the device's context is lost, and with it every sequence: the process must end
        except Exception as exc:
            self._ahead = None  # it may depend on the step that failed
            return self._run_again(rows, exc, result)
        self.scheduler.budget.count_good_step()
        return drawn

    def _launch_ahead(self, rows: Rows[ScheduledRow], record: RecordStep) -> LaunchedStep | None:
        if not self._runner.can_run_ahead(rows):
            return None
        ahead = self.scheduler.schedule_ahead(rows)
        if not ahead:
            return None
        record(_members([*rows, *ahead]))
        try:
            return LaunchedStep(ahead, self._runner.launch(ahead))
        except self._runner.fatal_errors:
            raise
        except Exception as exc:
            log.warning("could not launch the next step ahead", extra={"num_rows": len(ahead), "error": repr(exc)})
            return None  # it will be scheduled again in its turn, and fail or succeed then

    def _run_again(
        self, rows: Rows[ScheduledRow], exc: Exception, result: StepResult
    ) -> list[tuple[ScheduledRow, Drawn | None]]:
        """After a failure, bisect: run each half on its own, until the row that fails is alone, and fail its job. If
        memory ran out, preempt the later half instead and make steps smaller."""
        rows = [row for row in rows if self._is_running(row.sequence)]
        if isinstance(exc, DrawAgain):
            return self._run_part(rows, result)
        if isinstance(exc, GrammarFailed):
            self._fail(exc.job, exc, result)
            return self._run_part(rows, result)
        if isinstance(exc, self._runner.memory_errors):
            return self._run_less(rows, exc, result)
        if len(rows) == 1:
            self._fail(rows[0].sequence.job, exc, result)
            return []
        log.warning("step failed; running each half on its own", extra={"num_rows": len(rows), "error": repr(exc)})
        middle = len(rows) // 2
        return self._run_part(rows[:middle], result) + self._run_part(rows[middle:], result)

    def _run_part(self, rows: Rows[ScheduledRow], result: StepResult) -> list[tuple[ScheduledRow, Drawn | None]]:
        rows = [row for row in rows if self._is_running(row.sequence)]
        if not rows:
            return []
        try:
            return list(zip(rows, self._runner.collect(self._runner.launch(rows)), strict=True))
        except self._runner.fatal_errors:
            raise
        except Exception as exc:
            return self._run_again(rows, exc, result)

    def _run_less(
        self, rows: Rows[ScheduledRow], exc: Exception, result: StepResult
    ) -> list[tuple[ScheduledRow, Drawn | None]]:
        """Out of memory: shrink the budget, preempt the lower-ranking half and run the rest. A single row is retried in
        smaller chunks before its job fails."""
        self._runner.free_memory()
        budget = self.scheduler.budget
        if len(rows) == 1 and (rows[0].num_new_tokens <= budget.tokens // 2 or budget.is_least):
            self._fail(rows[0].sequence.job, exc, result)
            return []
        budget.shrink()
        log.warning(
            "the step ran out of memory; steps become smaller",
            extra={"num_rows": len(rows), "max_num_batched_tokens": budget.tokens},
        )
        if len(rows) <= 1:
            return []  # its next chunk is smaller
        ranked = sorted(rows, key=lambda row: row.sequence.rank)
        middle = len(ranked) // 2
        for row in ranked[middle:]:
            self.scheduler.preempt(row.sequence)
            self._runner.discard(row.sequence)
        return self._run_part(ranked[:middle], result)

    def _commit(self, row: ScheduledRow, drawn: Drawn | None, result: StepResult) -> None:
        """Record the row's computed tokens, append its drawn token, and end the sequence if it is complete."""
        sequence = row.sequence
        if not self._is_running(sequence):
            return  # the sequence ended during this step, or its job failed because of a sibling
        num_prompt_left = max(0, sequence.num_prompt_tokens - sequence.num_computed_tokens)
        self._num_prompt_tokens += min(row.num_new_tokens, num_prompt_left)
        if drawn is not None and drawn.prompt_scores:
            del sequence.prompt_logprobs[sequence.num_computed_tokens + 1 :]  # scored before a preemption
            first = sequence.num_computed_tokens + 1
            sequence.prompt_logprobs += [
                describe(self._tokens, sequence, first + number, score)
                for number, score in enumerate(drawn.prompt_scores)
            ]
        sequence.num_computed_tokens += row.num_new_tokens
        if drawn is not None and drawn.token_id is not None:
            # Only now: finite logits show that every block behind them can be trusted by other jobs.
            self.scheduler.pool.publish(sequence)
            self._num_generation_tokens += 1
            result.take(sequence, drawn, self._tokens)
        if sequence.is_scoring and sequence.num_computed_tokens >= sequence.num_prompt_tokens:
            self._tell_scores(sequence, result)
        if sequence.is_finished:
            self._leave(sequence)
            self._forget_if_done(sequence.job)

    def _tell_scores(self, sequence: Sequence, result: StepResult) -> None:
        """Report the prompt's scores: once per job, with its first token. If the job asks for no tokens, the sequence
        ends here."""
        sequence.job.is_scored = True
        result.token_ids.setdefault(sequence, [])
        result.prompt_logprobs[sequence] = sequence.prompt_logprobs
        if not sequence.job.max_tokens:
            sequence.finish(FinishReason.LENGTH)

    def _fail(self, job: EngineJob, exc: Exception, result: StepResult) -> None:
        log.error("job failed in a step", exc_info=exc, extra={"job_id": job.id, "attempt": job.attempt})
        del self._jobs[job.id, job.attempt]
        suspect_blocks: list[int] = []
        for sequence in job.sequences:
            suspect_blocks += self.scheduler.pool.forget(sequence)
            self._leave(sequence)
            result.forget(sequence)
        self._runner.wipe_blocks(suspect_blocks)
        is_memory = isinstance(exc, (*self._runner.memory_errors, MemoryError)) or "can't allocate memory" in str(exc)
        code = OutOfMemory.code if is_memory else EngineError.code
        # The exception's text goes only to the log: clients should not see the paths or shapes that it may contain.
        reason = exc.message if isinstance(exc, GrammarFailed) else type(exc).__name__
        message = f"the model could not run this job: {reason}"
        result.failures.append(JobFailed(job_id=job.id, attempt=job.attempt, code=code, message=message))

    def _leave(self, sequence: Sequence) -> None:
        self.scheduler.remove(sequence)
        self._runner.discard(sequence)

    def _is_running(self, sequence: Sequence) -> bool:
        job = sequence.job
        return self._jobs.get((job.id, job.attempt)) is job and not sequence.is_finished

    def _forget_if_done(self, job: EngineJob) -> None:
        if all(sequence.is_finished for sequence in job.sequences):
            del self._jobs[job.id, job.attempt]


def _members(rows: Rows[ScheduledRow]) -> list[StepMember]:
    """One member per job; a job with any prompt chunk in the step counts as prefill."""
    phase_by_job: dict[EngineJob, bool] = {}
    for row in rows:
        job, is_prompt = row.sequence.job, row.start < row.sequence.num_prompt_tokens
        phase_by_job[job] = phase_by_job.get(job, False) or is_prompt or row.num_new_tokens > 1
    return [
        StepMember(job.id, job.attempt, "prefill" if is_long else "decode") for job, is_long in phase_by_job.items()
    ]
