"""The Celery app for workers, the API, Flower and the command line, with its control commands and its one task.

All of them share every broker option. This module imports neither torch nor `gpu_worker`: the worker's own app module
decides what runs a GPU task.

The control commands (`celery -A tasks.app control|inspect`) are registered here because the command line only knows
those of its app; the worker's pool answers them. The runner records a drain in SQL, so a lost message does not leave a
worker in an unknown state.

The GPU task's id is the job's external id; it has no arguments, since everything else is in SQL. Its body never runs on
a GPU worker: there the pool hands the delivery to the engine (`gpu_worker/pool.py`).
"""

import logging
import warnings
from typing import Any

from celery import Celery, Task, bootsteps, signals, states
from celery.backends.base import DisabledBackend
from celery.exceptions import SecurityWarning
from celery.utils.log import get_logger
from celery.worker.consumer.connection import Connection
from celery.worker.control import control_command, inspect_command
from kombu import Exchange, Queue
from kombu.utils.url import maybe_sanitize_url

from observability import configure_logging
from settings import Settings, get_settings
from tasks.messages import GENERATE, PRIORITY_STEPS

logger = get_logger(__name__)


@inspect_command()
def engine_stats(state: Any, **_: Any) -> dict[str, Any]:
    """Statistics of the engine."""
    pool = state.consumer.pool
    if not hasattr(pool, "engine_figures"):
        return _NO_ENGINE
    figures: dict[str, Any] = pool.engine_figures()
    return figures


@control_command(args=[("exit", int), ("seconds", float)], signature="[exit=0 [seconds=CELERIAC_DRAIN_SECONDS]]")
def engine_drain(state: Any, exit: int = 0, seconds: float | None = None, **_: Any) -> dict[str, str]:
    """Take no new jobs and let the running ones finish; with exit=1, then stop the worker.

    Without exit=1 the order stays in force for the worker's name until engine_resume, even across restarts."""
    pool = state.consumer.pool
    if not hasattr(pool, "engine_figures"):
        return _NO_ENGINE
    release_after_seconds = get_settings().drain_seconds if seconds is None else seconds
    if exit:
        pool.worker_exit.drain("the engine_drain command", release_after_seconds=release_after_seconds)
    else:
        logger.warning("draining on the engine_drain command; running jobs have %.0f seconds", release_after_seconds)
        pool.runner.order_drain(release_after_seconds=release_after_seconds)
    return {"ok": "draining"}


@control_command()
def engine_resume(state: Any, **_: Any) -> dict[str, str]:
    """Take jobs again after engine_drain."""
    pool = state.consumer.pool
    if not hasattr(pool, "engine_figures"):
        return _NO_ENGINE
    logger.warning("taking jobs again on the engine_resume command")
    pool.runner.order_resume()
    return {"ok": "taking jobs"}


_NO_ENGINE = {"error": "this worker has no engine; choose one that has one with -d NAME"}


# A message is claimed and acked within seconds, so an unacked one of a dead worker may return early. The same in every
# process, since any process that consumes a queue or waits for a reply restores messages by its own value.
VISIBILITY_TIMEOUT_SECONDS = 60


def make_app(settings: Settings) -> Celery:
    """The app over the models of `settings.models_file`. A plain worker does not serve any queue: a model's queue needs
    `gpu_worker.app`."""
    redis = settings.redis_parts
    app = Celery("celeriac", broker=redis.for_celery, include=["tasks.app"])
    app.backend_cls = NoResults
    models = settings.load_catalog()
    default_queue = models.entry_of(models.default_id).queue  # even if that model is invalid
    app.conf.update(
        task_queues=[_queue(spec.queue) for spec in models],
        task_default_queue=default_queue,
        task_routes={GENERATE: {"queue": default_queue}},
    )
    app.conf.update(_SAFETY, **_BROKER, **_WORKER)
    app.conf.broker_transport_options = {**_TRANSPORT, **redis.sockets}
    app.conf.broker_use_ssl = dict(redis.tls) or None
    app.amqp.queues.deselect([spec.queue for spec in models])
    app.steps["consumer"].add(BrokerInStats)
    return app


class NoResults(DisabledBackend):
    """Results are in SQL. A revoke reads the task's state before it writes one; Celery's DisabledBackend raises, and
    the worker then logs a warning for every cancelled job."""

    def get_state(self, task_id: str) -> str:
        return str(states.STARTED)  # Celery leaves the end of this state to the code that runs the task


class BrokerInStats(bootsteps.StartStopStep):
    """The broker's part of `inspect stats`, which Flower shows. For a Unix socket, kombu reports the whole URL as the
    host name, including the password."""

    requires = (Connection,)

    def info(self, obj: Any) -> dict[str, object]:
        if not obj.connection:
            return {}
        broker = obj.connection.info()
        return {"broker": broker | {"hostname": maybe_sanitize_url(broker["hostname"]), "password": None}}


def _queue(name: str) -> Queue:
    """A queue with its own exchange: queues that share one would get each other's messages."""
    return Queue(name, Exchange(name, type="direct"), routing_key=name)


_SAFETY = {
    # Anyone who can write to Redis can send messages, so only JSON is read.
    "task_serializer": "json",
    "accept_content": ["json"],
    "event_serializer": "json",
    "task_create_missing_queues": False,
    # Results, retries and schedules are in SQL.
    "result_backend": None,
    "task_ignore_result": True,
    "task_send_sent_event": False,
}

_BROKER = {
    "broker_connection_retry_on_startup": True,
    "broker_connection_max_retries": None,
    # A failover or a full Redis raises channel errors, which would otherwise end the worker.
    "broker_channel_error_retry": True,
}

_TRANSPORT = {
    "visibility_timeout": VISIBILITY_TIMEOUT_SECONDS,
    "unacked_restore_interval": 5,
    "unacked_restore_throttle": 1,
    "socket_timeout": 5,
    "socket_connect_timeout": 5,
    "socket_keepalive": True,
    "health_check_interval": 10,
    "queue_order_strategy": "priority",
    "priority_steps": list(PRIORITY_STEPS),
    "client_name": "celeriac",
}

_WORKER = {
    "task_acks_late": False,  # acked once the claim is committed in SQL: from then on the lease protects the job
    "worker_prefetch_multiplier": 1,
    "worker_enable_prefetch_count_reduction": False,
    "worker_disable_rate_limits": True,  # a limit set in Flower would hold deliveries in memory
    "worker_cancel_long_running_tasks_on_connection_loss": False,
    "worker_soft_shutdown_timeout": 0,
    "worker_send_task_events": True,
    "worker_redirect_stdouts": False,
}

# Celery logs one or two lines per task: Flower has the events, and our own log lines cover what matters.
_LOGGERS_OF_EVERY_TASK = ("celery.worker.strategy", "celery.app.trace")


@signals.celeryd_init.connect
def _begin_the_log(instance: Any, **_: object) -> None:
    """Suppress the banner and the warning that Celery prints before it sets up logging."""
    instance.quiet = True
    warnings.simplefilter(
        "ignore", SecurityWarning
    )  # about workers that run as root and accept pickles; ours accept only JSON
    use_our_logging()


@signals.setup_logging.connect
def use_our_logging(**_: object) -> None:
    """Send all logging of this process to our handler, in the configured format."""
    settings = get_settings()
    configure_logging(settings.log_level, settings.log_format)
    for name in _LOGGERS_OF_EVERY_TASK:
        logging.getLogger(name).setLevel(logging.WARNING)


app = make_app(get_settings())


class WrongWorker(RuntimeError):
    """A generation task reached a worker that has no engine."""


@app.task(name=GENERATE, bind=True)
def generate(self: Task) -> None:
    """Generate text for the job whose external id is this task's id."""
    raise WrongWorker(
        f"{self.request.id} reached {self.request.hostname}, a worker without an engine; "
        "serve a model's queue with `celery -A gpu_worker.app worker`"
    )
