"""The worker's runners, one per model, as Celery's hub thread sees them: methods that are thread-safe and do not block.

Each runner has its own engine process, storage thread and row in `workers`. What they share is the worker's name and
its memory (gpu_worker/residency.py), so at any moment only some of them may have an engine.
"""

import logging
from collections.abc import Callable, Sequence
from threading import Thread
from time import monotonic
from uuid import UUID, uuid4

from domain.catalog import ModelSpec
from domain.jobs import WorkerState
from gpu_worker.intake import Offers
from gpu_worker.quarantine import SHIPPED_RULES, QuarantineRules
from gpu_worker.residency import ModelMemory
from gpu_worker.runner import RunnerThread
from gpu_worker.threads import RunnerEvent, RunnerStats, WorkerFailure
from settings import Settings, get_settings
from text.models import complete

log = logging.getLogger(__name__)

#: The state of a worker with several models is the first of these that any of its models is in.
STATES = (
    WorkerState.READY,
    WorkerState.LOADING,
    WorkerState.DRAINING,
    WorkerState.STANDBY,
    WorkerState.UNLOADED,
)


class JobRunner:
    """Runs one engine with one thread. All methods are thread-safe, and all except `stop` return immediately.

    `on_event` is called on the runner's thread, with the events in order. `on_unhealthy` is called once, if the engine
    cannot be kept alive. By then the jobs have been released, and the process should exit.
    """

    def __init__(
        self,
        *,
        model: str,
        owner: UUID,
        hostname: str,
        on_event: Callable[[RunnerEvent], None],
        on_unhealthy: Callable[[WorkerFailure], None] | None = None,
        settings: Settings | None = None,
        quarantine_rules: QuarantineRules = SHIPPED_RULES,
        memory: ModelMemory | None = None,
    ) -> None:
        """`memory` is what the worker's models share; without it, this one is alone."""
        settings = settings or get_settings()
        self._offers = Offers()
        self._runner = RunnerThread(
            spec=complete(settings.load_catalog().get(model)),
            settings=settings,
            owner=owner,
            hostname=hostname,
            offers=self._offers,
            on_event=on_event,
            on_unhealthy=on_unhealthy or (lambda failure: None),
            quarantine_rules=quarantine_rules,
            memory=memory or ModelMemory({model: 0}),
        )
        self._thread = Thread(target=self._runner.run, name="job-runner", daemon=True)

    def start(self) -> None:
        """Start the engine process and the thread."""
        self._thread.start()

    def offer(self, ticket_id: UUID) -> None:
        """Offer a ticket. It is used to claim a job, together with others, as soon as the engine has room."""
        self._offers.add(ticket_id)
        self._runner.mailbox.post(lambda: None)

    def withdraw(self) -> list[UUID]:
        """Take back all tickets that have not been used yet, in order of arrival. No events will follow for them."""
        return self._offers.take()

    def cancel(self, job_id: UUID) -> None:
        """Cancel a job. Its owner finds the request in SQL; our own engine is told directly."""
        self._runner.mailbox.post(lambda: self._runner.cancel(job_id))

    def stop_cancelled(self, job_id: UUID) -> None:
        """Stop a job that has been cancelled in SQL, if it runs here."""
        self._runner.mailbox.post(lambda: self._runner.stop_cancelled(job_id))

    def cancel_queued(self, job_ids: Sequence[UUID]) -> None:
        """Cancel those of these jobs that are queued, of whatever model."""
        self._runner.mailbox.post(lambda: self._runner.cancel_queued(job_ids))

    def begin_drain(self, *, release_after_seconds: float) -> None:
        """Claim no more jobs, let running jobs end, and release those that are still running after the given time."""
        self._runner.mailbox.post(lambda: self._runner.begin_drain(release_after_seconds))

    def order_drain(self, *, release_after_seconds: float) -> None:
        """Like `begin_drain`, but stored under the worker's name: it outlives the process, until `order_resume` is
        called."""
        self._runner.mailbox.post(lambda: self._runner.order_drain(release_after_seconds))

    def order_resume(self) -> None:
        """Revoke an `order_drain`, whoever gave it."""
        self._runner.mailbox.post(self._runner.order_resume)

    def forget_failure(self) -> None:
        """Leave no reason behind why the model was given up, if it was."""
        self._runner.mailbox.post(self._runner.forget_failure)

    def stop(self, *, release: bool) -> None:
        """End the thread and the engine process. With `release`, first put running jobs back into the queue. Blocks."""
        if not self._thread.is_alive():
            return
        self._runner.mailbox.post(lambda: self._runner.stop(release))
        self._thread.join()

    @property
    def is_healthy(self) -> bool:
        """Whether the model has not been given up."""
        return self._runner.is_healthy

    @property
    def num_free(self) -> int:
        """How many sequences the engine could take on top of those claimed; 0 while it is draining or not ready."""
        return self._runner.num_free

    def stats(self) -> RunnerStats:
        return self._runner.stats

    @property
    def seconds_since_turn(self) -> float:
        """How long ago the thread last looked at its engine and its messages; it does so several times a second."""
        return monotonic() - self._runner.turned_at


class ModelRunners:
    """All runners of one worker. `on_unhealthy` is called if the worker cannot go on: a model that cannot be loaded, or
    whose engine keeps crashing, does not end it as long as others are served."""

    def __init__(
        self,
        make_runner: Callable[..., JobRunner],
        models: Sequence[ModelSpec],
        memory: ModelMemory,
        *,
        hostname: str,
        on_event: Callable[[RunnerEvent], None],
        on_unhealthy: Callable[[WorkerFailure], None],
    ) -> None:
        self._on_unhealthy = on_unhealthy
        self._has_failed = False  # all of it, which is why it stops
        self.by_queue: dict[str, JobRunner] = {}
        for model in models:
            self.by_queue[model.queue] = make_runner(
                model=model.id,
                owner=uuid4(),
                hostname=hostname,
                on_event=on_event,
                on_unhealthy=lambda failure, model_id=model.id: self._lose(model_id, failure),
                memory=memory,
            )

    def start(self) -> None:
        for runner in self.by_queue.values():
            runner.start()

    def withdraw(self) -> list[UUID]:
        return [ticket_id for runner in self.by_queue.values() for ticket_id in runner.withdraw()]

    def cancel(self, job_id: UUID) -> None:
        for runner in self.by_queue.values():  # a task does not tell which of them runs its job
            runner.cancel(job_id)

    def stop_cancelled(self, job_id: UUID) -> None:
        for runner in self.by_queue.values():
            runner.stop_cancelled(job_id)

    def cancel_queued(self, job_ids: Sequence[UUID]) -> None:
        next(iter(self.by_queue.values())).cancel_queued(job_ids)

    def begin_drain(self, *, release_after_seconds: float) -> None:
        for runner in self.by_queue.values():
            runner.begin_drain(release_after_seconds=release_after_seconds)

    def order_drain(self, *, release_after_seconds: float) -> None:
        for runner in self.by_queue.values():
            runner.order_drain(release_after_seconds=release_after_seconds)

    def order_resume(self) -> None:
        for runner in self.by_queue.values():
            runner.order_resume()

    def stop(self, *, release: bool) -> None:
        """Stop all of them, at the same time, since each may have an engine to wait for. Blocks."""
        if not self._has_failed:
            for runner in self.by_queue.values():
                runner.forget_failure()
        stops = [
            Thread(target=runner.stop, kwargs={"release": release}, name="runner-stop", daemon=True)
            for runner in self.by_queue.values()
        ]
        for stop in stops:
            stop.start()
        for stop in stops:
            stop.join()

    @property
    def num_free(self) -> int:
        return sum(runner.num_free for runner in self.by_queue.values())

    def stats(self) -> RunnerStats:
        """Those of the only model, or the sums over all models and the engine's figures of the first loaded one."""
        all_stats = [runner.stats() for runner in self.by_queue.values()]
        return RunnerStats(
            max_num_seqs=sum(stats.max_num_seqs for stats in all_stats),
            num_running=sum(stats.num_running for stats in all_stats),
            num_occupied=sum(stats.num_occupied for stats in all_stats),
            num_offered=sum(stats.num_offered for stats in all_stats),
            is_engine_ready=any(stats.is_engine_ready for stats in all_stats),
            state=min((stats.state for stats in all_stats), key=STATES.index),
            is_resting=all(stats.is_resting for stats in all_stats),
            tokens_per_second=sum(stats.tokens_per_second for stats in all_stats),
            engine=min(all_stats, key=lambda stats: STATES.index(stats.state)).engine,
        )

    @property
    def seconds_since_turn(self) -> float:
        """Of the runner that has been silent for longest."""
        return max(runner.seconds_since_turn for runner in self.by_queue.values())

    def _lose(self, model_id: str, failure: WorkerFailure) -> None:
        """Called on the runner's thread, when its own model is not healthy any more."""
        if failure.is_of_model and any(runner.is_healthy for runner in self.by_queue.values()):
            log.critical("this worker goes on without a model: %s", failure.reason, extra={"model": model_id})
        else:
            self._has_failed = True
            self._on_unhealthy(failure)
