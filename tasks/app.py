"""The Celery app: one object for workers, API, Flower and the command line, so that all share every broker option.

Nothing here reaches torch or `gpu_worker`: what runs a GPU task is decided by the worker's own app module.
"""

import logging
import warnings
from typing import Any

from celery import Celery, bootsteps, signals
from celery.exceptions import SecurityWarning
from celery.worker.consumer.connection import Connection
from kombu import Exchange, Queue
from kombu.utils.url import maybe_sanitize_url

from domain.catalog import Catalog
from observability import configure_logging
from settings import Settings, get_settings
from tasks import control  # noqa: F401  (registers the remote-control commands)
from tasks.messages import GENERATE, PRIORITY_STEPS

# A message is in hand for seconds before it is claimed and acked, so an unacked one of a dead worker may return early.
# The same number in every process: whoever drains a queue or waits for a reply restores by its own.
VISIBILITY_TIMEOUT_SECONDS = 60


def make_app(settings: Settings) -> Celery:
    """The app over the models of `settings.models_file`. A plain worker serves no queue: a model's needs
    `gpu_worker.app`."""
    redis = settings.redis_parts
    app = Celery("celeriac", broker=redis.for_celery, include=["tasks.generate"])
    models = Catalog.load(settings.models_file)
    default_queue = models.entry_of(models.default_id).queue  # also where that one model makes no sense
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


class BrokerInStats(bootsteps.StartStopStep):
    """What `inspect stats`, and Flower with it, tell of the broker. Kombu has the whole URL of a Unix socket, with its
    password, for the name of a host."""

    requires = (Connection,)

    def info(self, obj: Any) -> dict[str, object]:
        if not obj.connection:
            return {}
        broker = obj.connection.info()
        return {"broker": broker | {"hostname": maybe_sanitize_url(broker["hostname"]), "password": None}}


def _queue(name: str) -> Queue:
    """With an exchange of its own: queues that share one would each get what is meant for another."""
    return Queue(name, Exchange(name, type="direct"), routing_key=name)


_SAFETY = {
    # Whoever can write to Redis can send messages: nothing but JSON is read.
    "task_serializer": "json",
    "accept_content": ["json"],
    "event_serializer": "json",
    "task_create_missing_queues": False,
    # Results, retries and schedules are SQL's.
    "result_backend": None,
    "task_ignore_result": True,
    "task_send_sent_event": False,
}

_BROKER = {
    "broker_connection_retry_on_startup": True,
    "broker_connection_max_retries": None,
    # A failover or a full Redis answers with channel errors: without this they end the worker.
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
    "task_acks_late": False,  # acked when the SQL claim committed: from then on the lease protects the job
    "worker_prefetch_multiplier": 1,
    "worker_enable_prefetch_count_reduction": False,
    "worker_disable_rate_limits": True,  # a limit set from Flower would park deliveries in memory
    "worker_cancel_long_running_tasks_on_connection_loss": False,
    "worker_soft_shutdown_timeout": 0,
    "worker_send_task_events": True,
    "worker_redirect_stdouts": False,
}


# One line or two per task: events tell it to Flower, and our own lines tell what matters.
_LOGGERS_OF_EVERY_TASK = ("celery.worker.strategy", "celery.app.trace")


@signals.celeryd_init.connect
def _begin_the_log(instance: Any, **_: object) -> None:
    """Celery has a banner to print and a warning to give before it asks how to log."""
    instance.quiet = True
    warnings.simplefilter("ignore", SecurityWarning)  # a worker of root's that reads pickles; ours reads JSON alone
    log_as_every_process_does()


@signals.setup_logging.connect
def log_as_every_process_does(**_: object) -> None:
    """Every line of this process is one of ours, from now on."""
    settings = get_settings()
    configure_logging(settings.log_level, settings.log_format)
    for name in _LOGGERS_OF_EVERY_TASK:
        logging.getLogger(name).setLevel(logging.WARNING)


app = make_app(get_settings())
