"""A Celery worker pool whose slots are those of the engines: tickets in, events of the claimed jobs out, in order.

Tickets are offered to the `JobRunner` of their model, which claims a job in SQL for each of them when its engine has
room, and emits events on its own thread. Only the hub thread may touch requests, Celery events and channels, so the
events wait in a queue until it applies them. (Celery's hub itself keeps callbacks in an unordered set.)

`WorkerExit` ends the worker: either after a drain, during which heartbeats, inspect and revoke still work, or
immediately, releasing its jobs. It replaces Celery's warm shutdown, which would stop the event loop first, and its cold
shutdown, which would cancel the requests. Signal handlers only start a thread, since the main thread may hold any lock
when a signal arrives.
"""

import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from threading import Lock, Thread
from time import monotonic, sleep
from types import FrameType
from typing import Any
from uuid import UUID

from celery.concurrency.base import BasePool, apply_target
from celery.utils.log import get_logger
from celery.worker import state
from kombu.message import Message

from domain.catalog import ModelSpec
from domain.jobs import WorkerState
from gpu_worker.deliveries import Deliveries, job_id_of
from gpu_worker.health import with_health
from gpu_worker.model_size import budget_bytes, need_bytes
from gpu_worker.residency import ModelMemory
from gpu_worker.serving import JobRunner, ModelRunners
from gpu_worker.threads import RunnerEvent, WorkerFailure
from gpu_worker.transport import Room
from metrics import Process, serve_metrics
from settings import Settings, get_settings
from text.models import complete

NO_ROOM = Room(credit=0, num_idle=0)


def served_models(settings: Settings) -> list[ModelSpec]:
    """The models that a GPU worker with these settings serves. Raises ModelNotFound, ModelUnavailable, or ValueError
    if a model's files cannot be used."""
    catalog = settings.load_catalog()
    return [complete(entry) for entry in map(catalog.get, settings.worker_models)] or [complete(catalog.first)]


def shared_memory(models: Sequence[ModelSpec], settings: Settings) -> ModelMemory:
    """The memory that these models share. A single model has it all, so nothing is estimated."""
    if len(models) == 1:
        return ModelMemory({models[0].id: 0})
    budget = budget_bytes(models) if settings.worker_memory is None else settings.worker_memory
    need_bytes_by_model = {model.id: need_bytes(model, budget_bytes=budget) for model in models}
    logger.info(
        "this worker serves %s within %s bytes; they need about %s",
        [*need_bytes_by_model],
        budget,
        [*need_bytes_by_model.values()],
    )
    return ModelMemory(need_bytes_by_model, budget_bytes=budget, residency_seconds=settings.model_residency_seconds)


class EnginePool(BasePool):
    """Connects Celery to the runner. Methods must be called on the hub thread unless documented otherwise."""

    body_can_be_buffer = True
    task_join_will_block = False

    make_runner: Callable[..., JobRunner] = JobRunner

    def __init__(self, limit: int, **options: Any) -> None:
        super().__init__(limit, **options)
        settings = get_settings()
        models = served_models(settings)
        self._lookahead_by_queue = {
            model.queue: max(1, model.max_num_seqs // 4) if settings.lookahead is None else settings.lookahead
            for model in models
        }
        self.paused_lookaheads: set[str] = set()  # the queues of which we hold no more than can start now
        self.is_draining = False
        hostname: str = options["initargs"][1]
        self.deliveries = Deliveries(self.app, hostname, self.cancel)
        self.consumer: Any = None
        self.worker_exit = WorkerExit(self)
        self.runner = ModelRunners(
            type(self).make_runner,
            models,
            shared_memory(models, settings),
            hostname=hostname,
            on_event=self._on_runner_event,
            on_unhealthy=self.worker_exit.fail,
        )
        self.metrics_url: str | None = None
        self._hub: Any = None
        self._events: deque[RunnerEvent] = deque()
        self._is_taking_due = False
        self._stop_lock = Lock()
        self._is_runner_stopped = False

    def on_start(self) -> None:
        settings = get_settings()
        self.metrics_url = serve_metrics(
            Process.WORKER, settings.worker_metrics_host, settings.worker_metrics_port, with_health(self.runner)
        )
        self.runner.start()
        self.worker_exit.install()

    def register_with_event_loop(self, hub: Any) -> None:
        self._hub = hub
        hub.call_soon(self.take_events)

    # Tickets in

    @property
    def lookahead(self) -> int:
        """How many messages may be in hand beyond those that can start now, over all queues."""
        return sum(num for queue, num in self._lookahead_by_queue.items() if queue not in self.paused_lookaheads)

    def room(self, queue: str) -> Room:
        """How many messages of this queue may be taken now: as many as the engine of its model could start, plus a
        small look-ahead; none while the model is not loaded, or its claims have failed."""
        runner = self.runner.by_queue[queue]
        stats = runner.stats()
        if self.is_draining or stats.state is not WorkerState.READY or stats.is_resting:
            return NO_ROOM
        num_free, is_paused = runner.num_free, queue in self.paused_lookaheads
        if num_free <= 0 and is_paused:
            return NO_ROOM
        num_in_hand = self.deliveries.num_in_hand(queue)
        lookahead = 0 if is_paused else self._lookahead_by_queue[queue]
        return Room(max(num_free + lookahead - num_in_hand, 0), max(num_free - num_in_hand, 0))

    def on_apply(
        self,
        target: Any,
        args: Any = (),
        kwargs: Any = None,
        callback: Any = None,
        accept_callback: Any = None,
        **_: Any,
    ) -> Any:
        """What Celery calls to run a task: one of its own built-in ones, since ours are claimed."""
        return apply_target(target, args, kwargs, callback, accept_callback)

    def take_ticket(self, message: Message) -> None:
        """Offer a ticket to the runner of its model. See `strategy`, which is called for each message of our task."""
        ticket = self.deliveries.take(message)
        if ticket is not None:
            self.runner.by_queue[ticket.queue].offer(ticket.id)

    def cancel(self, job_id: UUID) -> None:
        """Cancel a job that runs here. The request goes through SQL, so it may have moved to another worker."""
        self.runner.cancel(job_id)

    def cancel_queued(self, task_ids: Iterable[str]) -> None:
        """Cancel the jobs of a revoke that have not started, wherever they would start."""
        job_ids = [job_id for task_id in task_ids if (job_id := job_id_of(task_id)) is not None]
        waiting = [job_id for job_id in job_ids if job_id not in self.deliveries.running]
        if waiting:
            self.runner.cancel_queued(waiting)

    def stop_cancelled(self, task_ids: Iterable[str]) -> None:
        """Stop those of these jobs that run here. They have been cancelled in SQL, which costs this worker nothing."""
        state.revoked.update(task_ids)  # for a job whose claim is being committed
        for job_id in filter(None, map(job_id_of, task_ids)):
            if job_id in self.deliveries.running:
                self.runner.stop_cancelled(job_id)

    def give_back(self) -> int:
        """Requeue all tickets in hand that are not being used; returns how many."""
        return self.deliveries.give_back(self.runner.withdraw())

    def give_back_from(self, queue: str) -> int:
        """Like `give_back`, but only those of this queue."""
        return self.deliveries.give_back(self.runner.by_queue[queue].withdraw())

    # Events out

    def _on_runner_event(self, event: RunnerEvent) -> None:
        """Called on the runner's thread."""
        self._events.append(event)
        if not self._is_taking_due and self._hub is not None:
            self._is_taking_due = True
            self._hub.call_soon(self.take_events)

    def take_events(self) -> None:
        """Apply all events so far, in order."""
        self._is_taking_due = False  # first, so that an event that arrives from here on requests another call
        events = []
        while self._events:
            events.append(self._events.popleft())
        self.deliveries.apply(events)

    def wake_hub(self) -> None:
        """Wake the event loop, so that it notices what another thread has done. Any thread."""
        if self._hub is not None:
            self._hub.call_soon(self.take_events)

    # The end

    def begin_drain(self, *, release_after_seconds: float) -> None:
        """Take no more messages, requeue those in hand, and let running jobs end; then the process exits. Any
        thread."""
        self.is_draining = True
        self.runner.begin_drain(release_after_seconds=release_after_seconds)
        if self._hub is not None:
            self._hub.call_soon(self.give_back)

    @property
    def is_drained(self) -> bool:
        """Whether no jobs are running, and all events have been sent and deliveries requeued, provided that there is a
        connection. Any thread."""
        if self.runner.stats().num_running > 0:
            return False
        return self.deliveries.channel is None or not (self.deliveries.running or self.deliveries.in_hand)

    def stop_runner(self) -> None:
        """Release running jobs and end the engine. Calls after the first have no effect. Any thread."""
        with self._stop_lock:
            if not self._is_runner_stopped:
                self._is_runner_stopped = True
                self.runner.withdraw()  # closing the channel requeues their messages
                self.runner.stop(release=True)

    def on_stop(self) -> None:
        self.is_draining = True
        self.stop_runner()
        self.take_events()
        if self.consumer is not None:
            self.consumer._flush_events()

    on_terminate = on_stop

    def terminate_job(self, pid: int, signal: Any = None) -> None:
        """Does nothing, since there is no process to signal; `ClaimedTask.terminate` cancels the job."""

    # Flower and `celery inspect`

    @property
    def num_in_hand(self) -> int:
        return sum(map(self.deliveries.num_in_hand, self.runner.by_queue))

    def engine_figures(self) -> dict[str, Any]:
        """Figures for Flower, flat and short, since it shows them in one row."""
        stats = self.runner.stats()
        return {
            "credit": sum(self.room(queue).credit for queue in self.runner.by_queue),
            "in_hand": self.num_in_hand,
            "running": stats.num_running,
            "free": self.runner.num_free,
            "slots": stats.max_num_seqs,
            "ready": stats.is_engine_ready,
            "draining": self.is_draining or stats.state is WorkerState.DRAINING,
            "state": stats.state.value,
            "metrics": self.metrics_url,
            "tokens_per_second": round(stats.tokens_per_second, 1),
            **stats.engine,
        }

    def grow(self, n: int = 1) -> None:
        raise ValueError(f"the engine has {self.limit} slots; set max_num_seqs in models.toml and restart the worker")

    shrink = grow

    def _get_info(self) -> dict[str, Any]:
        stats = self.runner.stats()
        return {
            **super()._get_info(),
            "processes": [os.getpid()],
            "slots-running": stats.num_occupied,
            "slots-free": self.runner.num_free,
            "in-hand": self.num_in_hand,
            "look-ahead": self.lookahead,
            "engine-ready": stats.is_engine_ready,
            "state": stats.state.value,
        }


logger = get_logger(__name__)

EXIT_OK, EXIT_FAILURE = 0, 1

EXIT_LASTING = os.EX_CONFIG  # sysexits.h: a supervisor should not restart the worker until something has been fixed

_GRACE_SECONDS = 10.0  # after the drain, for the runner to release and report the jobs that are still running

_POLL_SECONDS = 0.05


class WorkerExit:
    """Ends one worker. The first SIGTERM or SIGINT drains it; a second one, or SIGQUIT, releases all jobs at once."""

    def __init__(self, pool: "EnginePool") -> None:
        self._pool = pool
        self._is_draining = False

    def install(self) -> None:
        """Replace Celery's signal handlers. Call on the main thread, after Celery has installed them."""
        for signal_number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signal_number, self._on_stop_signal)
        signal.signal(signal.SIGQUIT, self._on_quit_signal)

    def drain(self, reason: str, *, release_after_seconds: float | None = None) -> None:
        """Let running jobs end, then exit. `reason` is for the log. Returns immediately. Any thread."""
        if self._is_draining:
            return
        self._is_draining = True
        seconds = get_settings().drain_seconds if release_after_seconds is None else release_after_seconds
        Thread(target=self._drain, args=(reason, seconds), name="drain", daemon=True).start()

    def fail(self, failure: WorkerFailure) -> None:
        """Exit because the engine cannot be kept alive. The exit code tells a supervisor whether to restart the worker.
        The jobs must have been released already. Any thread."""
        logger.critical("exiting: %s", failure.reason)
        state.should_stop = EXIT_LASTING if failure.is_lasting else EXIT_FAILURE
        self._pool.wake_hub()

    def _on_stop_signal(self, signal_number: int, _: FrameType | None) -> None:
        name = signal.Signals(signal_number).name
        if self._is_draining:
            self._begin_quit(f"{name} while draining")
        else:
            self.drain(name)

    def _on_quit_signal(self, signal_number: int, _: FrameType | None) -> None:
        self._begin_quit(signal.Signals(signal_number).name)

    def _begin_quit(self, reason: str) -> None:
        Thread(target=self._quit, args=(reason,), name="quit", daemon=True).start()

    def _drain(self, reason: str, release_after_seconds: float) -> None:
        logger.warning(
            "draining on %s, then exiting; running jobs have %.0f seconds to end", reason, release_after_seconds
        )
        self._pool.begin_drain(release_after_seconds=release_after_seconds)
        deadline = monotonic() + release_after_seconds + _GRACE_SECONDS
        while not self._pool.is_drained:
            if monotonic() > deadline:
                logger.error("the drain took too long; releasing the remaining jobs")
                break
            sleep(_POLL_SECONDS)
        state.should_stop = EXIT_OK
        self._pool.wake_hub()

    def _quit(self, reason: str) -> None:
        logger.warning("exiting immediately on %s; running jobs go back to the queue", reason)
        state.should_terminate = EXIT_OK
        self._pool.wake_hub()
        self._pool.stop_runner()  # on this thread, since the main thread may be waiting for a broker that is down
