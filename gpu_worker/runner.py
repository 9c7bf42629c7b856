"""The runner: a thread between Celery and the engine. It feeds the engine and owns the running batch.

`RunnerThread` waits for the engine, the storage thread and its callers. Only the storage thread uses SQL and Redis; its
answers come back through the mailbox. An outage of the database therefore stops neither the engine and its supervision
nor cancellations. gpu_worker/serving.py has the interface for Celery's hub thread.
"""

import logging
import math
import select
from collections.abc import Callable, Sequence
from time import monotonic
from uuid import UUID

import msgspec

from domain.catalog import ModelSpec
from domain.jobs import AttemptOutcome, WorkerState, external_id
from gpu_worker.batch import RunningBatch
from gpu_worker.cancels import Cancels
from gpu_worker.commits import FlushPacer, JobStorage
from gpu_worker.engine_process.frames import CannotLoad, Loading, Ready, Report, StepDone
from gpu_worker.engine_process.supervisor import EngineExit, Supervisor
from gpu_worker.intake import Intake, Offers
from gpu_worker.quarantine import Quarantine, QuarantineRules
from gpu_worker.reporting import WorkerReporter, WorkerTroubles
from gpu_worker.residency import ModelMemory, Residence
from gpu_worker.threads import (
    DispatchRequester,
    EngineMeter,
    Mailbox,
    RunnerEvent,
    RunnerEventKind,
    RunnerStats,
    StorageThread,
    WorkerFailure,
)
from metrics import engine_exits_total, generated_tokens_total, prompt_tokens_total
from settings import Settings
from storage.workers import Orders
from tasks import job_log

log = logging.getLogger(__name__)

HOUSEKEEPING_SECONDS = 0.1  # the longest wait, and therefore the precision of all timers

RETRY_SECONDS = 300.0  # after which a model that was given up is tried again, if its worker has others

RATE_SECONDS = 1.0  # the window over which tokens per second are measured


class RunnerThread:
    """The runner's thread, which executes `run`. To call any other method, post the call to `mailbox`."""

    def __init__(
        self,
        *,
        spec: ModelSpec,
        settings: Settings,
        owner: UUID,
        hostname: str,
        offers: Offers,
        on_event: Callable[[RunnerEvent], None],
        on_unhealthy: Callable[[WorkerFailure], None],
        quarantine_rules: QuarantineRules,
        memory: ModelMemory,
    ) -> None:
        self.mailbox = Mailbox()
        self._spec = spec
        self._offers = offers
        self._on_event = on_event
        self._on_unhealthy = on_unhealthy
        self._storage = JobStorage(settings, spec, owner, hostname)
        self._storage_thread = StorageThread(self.mailbox.post)
        self._dispatcher = DispatchRequester(spec, settings)
        self._residence = Residence(memory, spec.id, self._storage, self._storage_thread)
        self._supervisor = Supervisor(
            spec,
            heartbeat_seconds=settings.engine_heartbeat_seconds,
            load_seconds=settings.engine_load_seconds,
        )
        self._events: list[RunnerEvent] = []
        self._quarantine = Quarantine(quarantine_rules)
        self._batch = RunningBatch(
            self._supervisor,
            self._quarantine,
            FlushPacer(settings),
            self._storage,
            self._storage_thread,
            self._events.append,
        )
        self._intake = Intake(
            offers,
            self._storage,
            self._storage_thread,
            self._quarantine,
            on_claimed=self._batch.admit,
            on_exchanged=self._batch.exchange,
            on_spent=self._spend,
        )
        self._reporter = WorkerReporter(
            self._storage,
            self._storage_thread,
            spec=spec,
            owner=owner,
            hostname=hostname,
            on_answer=self._follow_orders,
        )
        self._troubles = WorkerTroubles(self._supervisor, self._dispatcher)
        self._cancels = Cancels(self._storage_thread, self._storage.request_cancel)
        self._queued_cancels = Cancels(self._storage_thread, self._storage.cancel_queued)
        self._meter = EngineMeter(spec.id)
        self._exits = engine_exits_total.labels(spec.id)
        job_log.begin([spec.id], [AttemptOutcome.RELEASED, AttemptOutcome.CRASHED])
        self._drain_seconds = settings.drain_seconds
        self._drain_deadline: float | None = None  # set while draining because the process is about to exit
        self._unload_deadline: float | None = None  # set while draining because the model is being unloaded
        self._order_deadline: float | None = None  # set while draining because an operator ordered it
        self._room_deadline: float | None = None  # set while the model makes room for another one of this worker
        self._is_loaded: bool | None = None  # whether the model should be loaded; None until read from SQL
        self._has_been_ready = False  # whether any engine of this worker has been ready
        self._failure: WorkerFailure | None = None  # why it was given up
        self.is_healthy = True  # whether the model has not been given up
        self._retry_at = math.inf  # when a model that was given up is tried again
        self._is_stopping = False
        self._rate_since, self._rate_tokens = monotonic(), 0
        self._tokens_per_second = 0.0
        self._generated_tokens = generated_tokens_total.labels(spec.id)
        self._prompt_tokens, self._counted_prompt_tokens = prompt_tokens_total.labels(spec.id), 0
        self.stats = self._make_stats()
        self.num_free = 0
        self.turned_at = monotonic()  # when the last turn began

    def run(self) -> None:
        """Run until stopped. After an unexpected error, the worker reports itself unhealthy and exits."""
        self._storage_thread.start()
        self._dispatcher.start()
        try:
            while not self._is_stopping:
                self._turn()
        except Exception as exc:
            log.exception("the runner failed")
            self._give_up(WorkerFailure(f"the runner failed: {type(exc).__name__}"))
        finally:
            self._close()

    # Calls

    def cancel(self, job_id: UUID) -> None:
        self._cancels.add([job_id])
        self._batch.cancel(job_id)

    def stop_cancelled(self, job_id: UUID) -> None:
        self._batch.cancel(job_id)

    def cancel_queued(self, job_ids: Sequence[UUID]) -> None:
        self._queued_cancels.add(job_ids)

    def begin_drain(self, release_after_seconds: float) -> None:
        self._drain_deadline = monotonic() + release_after_seconds
        self._batch.release_unstarted()

    def order_drain(self, release_after_seconds: float) -> None:
        """Like `begin_drain`, but stored in SQL: the order stands until it is revoked, even if this process ends."""
        self._order(lambda is_repeated: self._storage.order_drain(release_after_seconds))

    def order_resume(self) -> None:
        self._order(lambda is_repeated: self._storage.order_resume())

    def _order(self, write: Callable[[bool], None]) -> None:
        """Write an order to SQL. It is followed when the next report has read it from there, so that orders are
        followed in the order in which they were written."""
        self._storage_thread.submit(write, lambda answer: self._reporter.beat_soon())

    def forget_failure(self) -> None:
        """The worker is stopped on purpose: nobody needs to mend what was wrong with its model here."""
        self._failure = None

    def stop(self, release: bool) -> None:
        if release:
            self._batch.release_all()
        self._is_stopping = True

    # One turn

    def _turn(self) -> None:
        self._wait(monotonic())
        self.mailbox.run_all()
        for report in self._supervisor.receive():
            self._take_report(report)
        now = self.turned_at = monotonic()
        if now >= self._retry_at:
            log.warning("trying again the model that was given up")
            self.is_healthy, self._retry_at, self._failure = True, math.inf, None
            self._quarantine.forget_crashes()
        if self.is_healthy:
            self._watch_engine(now)
        else:  # what was still being claimed, or offered, when the model was given up
            self._batch.release_all()
            self._refuse(self._offers.take())
        if self._release_at is not None and now > self._release_at:
            self._batch.release_all()
        self._batch.fence(now)
        self._batch.flush_due(now)  # first, so that ends are stored before the jobs that follow are claimed
        self._take_jobs_in(now)
        self._count_rate(now)
        if self.is_healthy:
            self._reporter.beat(
                now,
                self._state,
                num_running=self._batch.num_occupied,
                tokens_per_second=self._tokens_per_second,
                cache_usage=self._meter.stats.cache_usage,
                memory_bytes=self._meter.stats.memory_bytes or None,
                load_share=self._supervisor.load_share,
                ready_in_seconds=None if self._supervisor.ready else self._residence.seconds_until_ready(now),
                troubles=self._troubles.found(
                    now, self._reporter.skew_seconds, self._reporter.seconds, self._intake.trouble
                ),
            )
        elif self._failure is not None:
            self._reporter.fail(now, self._failure.reason)
        self._emit_events()

    def _wait(self, now: float) -> None:
        """Wait until something arrives or is due, then write as much as the engine's socket takes."""
        poll = select.poll()
        poll.register(self.mailbox, select.POLLIN)
        for frame_socket in self._supervisor.readers():
            poll.register(frame_socket, select.POLLIN | (select.POLLOUT if frame_socket.has_outgoing else 0))
        until_due = self._batch.seconds_until_due(now)
        wait_seconds = HOUSEKEEPING_SECONDS if until_due is None else min(until_due, HOUSEKEEPING_SECONDS)
        poll.poll(math.ceil(wait_seconds * 1000))
        self._supervisor.flush()

    def _take_report(self, report: Report) -> None:
        if isinstance(report, Ready):
            log.info("the engine is ready", extra={"pid": report.pid, "device": report.device})
            self._quarantine.look_soon()
            self._has_been_ready = True
            self._meter.forget_engine()
            return
        if isinstance(report, Loading | CannotLoad):
            return  # the supervisor knows the progress; the EngineExit that follows a failure contains the reason
        self._meter.stats = report.stats
        if isinstance(report, StepDone):
            self._batch.absorb(report)

    def _watch_engine(self, now: float) -> None:
        is_idle = not self._batch and not self._intake.is_claiming
        self._settle_memory(now, is_idle=is_idle)
        if self._is_loaded is False and is_idle:
            self._supervisor.stop()
            self._meter.forget_engine()
        elif not self._residence.is_wanted and is_idle and self._supervisor.has_engine:
            self._supervisor.restart()
            self._meter.forget_engine()
        if not (self._is_loaded and self._residence.is_wanted) and not self._supervisor.has_engine:
            return
        exit_ = self._supervisor.watch(now)
        if exit_ is None:
            return
        self._exits.inc()
        self._meter.forget_engine()
        how = self._batch.report_exit(exit_)
        self._troubles.engine_ended(now, how)
        if failure := self._failure_of(exit_, how):
            self._give_up(failure)

    def _settle_memory(self, now: float, *, is_idle: bool) -> None:
        """Agree with the worker's other models whether this one should be loaded. If not, its running jobs end first,
        or go on when it is loaded again."""
        if self._is_loaded is None:
            return
        self._residence.update(
            now,
            is_allowed=self._is_loaded,
            engine=self._supervisor,
            is_busy=not is_idle,
            is_draining=self._release_at is not None,
        )
        if self._residence.is_wanted:
            self._room_deadline = None
            return
        self._room_deadline = self._room_deadline or now + self._drain_seconds
        self._batch.release_unstarted()
        if now > self._room_deadline:
            self._batch.release_texts()

    def _failure_of(self, exit_: EngineExit, how: str) -> WorkerFailure | None:
        """The reason not to start another engine; None if it is worth trying."""
        if exit_.why_not_loaded is not None:
            # If the model has been loaded before, its configuration is right, and memory may just be short for a while.
            reason = f"model {self._spec.id!r} cannot be loaded: {exit_.why_not_loaded}"
            remedy = "fix its files or models.toml, then start the worker again"
            return WorkerFailure(f"{reason}; {remedy}", is_lasting=not self._has_been_ready, is_of_model=True)
        if self._quarantine.is_worker_at_fault:
            reason = f"the engine of model {self._spec.id!r} keeps crashing; the last exit: {how}"
            return WorkerFailure(reason, is_of_model=True)
        return None

    def _follow_orders(self, orders: Orders) -> None:
        self._follow_drain_order(orders.release_after_seconds)
        self._follow_load_order(orders.is_loaded)

    def _follow_drain_order(self, release_after_seconds: float | None) -> None:
        if (release_after_seconds is None) is (self._order_deadline is None):
            return
        if release_after_seconds is None:
            log.warning("taking jobs again, as ordered")
            self._order_deadline = None
            return
        log.warning("draining, as ordered; running jobs have %.0f seconds to end", release_after_seconds)
        self._order_deadline = monotonic() + release_after_seconds
        self._batch.release_unstarted()

    def _follow_load_order(self, is_loaded: bool) -> None:
        """If the model should be unloaded, drain the engine, then stop it."""
        if is_loaded is self._is_loaded:
            return
        self._is_loaded, self._unload_deadline = is_loaded, None
        if not is_loaded:
            log.warning("unloading the model; running jobs have %.0f seconds to end", self._drain_seconds)
            self._unload_deadline = monotonic() + self._drain_seconds
            self._batch.release_unstarted()

    def _take_jobs_in(self, now: float) -> None:
        is_ordered = self._is_loaded is False or self._order_deadline is not None
        is_unwanted = is_ordered or not self._residence.is_wanted
        if is_unwanted:
            self._intake.forget_failures()
        if is_unwanted or self._intake.is_resting:
            self._refuse(self._offers.take())
        if self._supervisor.ready is None and self._quarantine.job is None:
            return
        self._quarantine.discharge_if_clear()
        if self._quarantine.job is not None and not self._intake.is_claiming:
            self._batch.serve_quarantine(now)
        elif self._can_take_jobs and self._quarantine.job is None:
            is_resting = not self._batch and not self._offers and not self._intake.is_claiming
            self._intake.look_into_quarantine(now, is_resting=is_resting, known=self._batch.job_ids)
        num_free = self._count_free()
        self._intake.claim(now, num_free=num_free, known=self._batch.job_ids)
        if not num_free and self._can_take_jobs and self._quarantine.job is None:
            self._intake.share(now, self._batch.may_leave, known=self._batch.job_ids)

    def _emit_events(self) -> None:
        """Emit pending events, after updating the figures, which the listener reads."""
        self.num_free = self._count_free()
        self.stats = self._make_stats()
        events = self._events[:]
        self._events.clear()
        for event in events:
            self._emit(event)

    def _emit(self, event: RunnerEvent) -> None:
        if event.kind in (RunnerEventKind.ENDED, RunnerEventKind.RELEASED):
            self._dispatcher.request()
        try:
            self._on_event(event)
        except Exception:  # a faulty listener must not end all jobs
            log.exception("the listener failed to handle an event", extra={"job_id": external_id(event.job_id)})

    def _spend(self, ticket_ids: Sequence[UUID]) -> None:
        self._events += [RunnerEvent(RunnerEventKind.SPENT, ticket_id) for ticket_id in ticket_ids]

    def _refuse(self, ticket_ids: Sequence[UUID]) -> None:
        self._events += [RunnerEvent(RunnerEventKind.REFUSED, ticket_id) for ticket_id in ticket_ids]

    # Figures

    @property
    def _release_at(self) -> float | None:
        """The monotonic time at which running jobs are released; None unless draining."""
        deadlines = (self._drain_deadline, self._unload_deadline, self._order_deadline)
        return min((at for at in deadlines if at is not None), default=None)

    @property
    def _state(self) -> WorkerState:
        if self._is_loaded is False and not self._supervisor.has_engine and not self._batch:
            return WorkerState.UNLOADED
        if self._release_at is not None:
            return WorkerState.DRAINING
        if not self._residence.is_wanted:
            return WorkerState.STANDBY
        is_served = self._supervisor.ready is not None and not self._meter.stats.waiting_for
        return WorkerState.READY if is_served else WorkerState.LOADING

    @property
    def _can_take_jobs(self) -> bool:
        return self.is_healthy and self._state is WorkerState.READY

    def _count_free(self) -> int:
        if not self._can_take_jobs or self._quarantine.job is not None or self._meter.stats.is_full:
            return 0
        if self._intake.is_resting:
            return 0
        return max(0, self._spec.max_num_seqs - self._batch.num_occupied)

    def _make_stats(self) -> RunnerStats:
        return RunnerStats(
            max_num_seqs=self._spec.max_num_seqs,
            num_running=len(self._batch),
            num_occupied=self._batch.num_occupied,
            num_offered=len(self._offers),
            is_engine_ready=self._supervisor.ready is not None,
            state=self._state,
            is_resting=self._intake.is_resting,
            tokens_per_second=self._tokens_per_second,
            engine=msgspec.structs.asdict(self._meter.stats),
        )

    def _count_rate(self, now: float) -> None:
        seconds = now - self._rate_since
        if seconds < RATE_SECONDS:
            return
        num_new = self._batch.num_tokens - self._rate_tokens
        self._tokens_per_second = num_new / seconds
        self._rate_since, self._rate_tokens = now, self._batch.num_tokens
        self._generated_tokens.inc(num_new)
        self._prompt_tokens.inc(self._batch.num_prompt_tokens - self._counted_prompt_tokens)
        self._counted_prompt_tokens = self._batch.num_prompt_tokens
        self._meter.count()
        self._residence.measure(self._meter.stats.memory_bytes)

    # The end

    def _give_up(self, failure: WorkerFailure) -> None:
        """Release all jobs and report that this worker cannot continue with this model: the process exits unless it has
        others. Then a model that has been served before is tried again."""
        self.is_healthy, self._failure = False, failure
        self._retry_at = math.inf if failure.is_lasting else monotonic() + RETRY_SECONDS
        self._batch.release_all()
        self._supervisor.stop()
        self._residence.leave()
        self._on_unhealthy(failure)

    def _close(self) -> None:
        """Finish the storage calls that have been submitted, emit their events, and free all resources."""
        self._dispatcher.stop()
        self._reporter.leave(None if self._failure is None else self._failure.reason)
        self._supervisor.stop()
        self._storage_thread.stop()
        self.mailbox.run_all()
        self._emit_events()
        self._storage.close()
        self.mailbox.close()
