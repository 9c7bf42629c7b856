"""The Celery app of a GPU worker: `celery -A gpu_worker.app worker`. Each model that it serves has an engine.

Celery's control commands that a GPU worker implements differently are here as well; our own commands are in
`tasks.app`. They all run on Celery's hub thread, so they answer from memory and must not block.
"""

import logging
import os
import re
import secrets
import socket
import sys
from collections.abc import Sequence
from typing import Any

from celery import signals
from celery.utils.functional import maybe_list
from celery.worker import control as stock
from celery.worker.control import control_command
from kombu.transport import TRANSPORT_ALIASES

from domain.catalog import ModelSpec
from domain.errors import CeleriacError
from gpu_worker.consumer import EngineStep, EngineWorker
from gpu_worker.deliveries import strategy
from gpu_worker.pool import served_models
from gpu_worker.reporting import report_failed_start
from observability import configure_logging
from settings import Settings, get_settings
from tasks.app import app, generate


@control_command(name="shutdown")
def shutdown(state: Any, msg: str = "", **_: Any) -> dict[str, str]:
    """Shut down worker(s), like SIGTERM."""
    state.consumer.pool.worker_exit.drain("the shutdown command")
    return {"ok": "draining, then exiting"}


@control_command(name="revoke", variadic="task_id", signature="[id1 [id2 [... [idN]]]]")
def revoke(
    state: Any,
    task_id: str | Sequence[str],
    terminate: bool = False,
    signal: str | None = None,
    is_stored: bool = False,
    **options: Any,
) -> Any:
    """Revoke task by task id (or list of ids). `is_stored`: the API sends it, which has cancelled them in SQL."""
    task_ids = maybe_list(task_id) or []
    if is_stored:
        state.consumer.pool.stop_cancelled(task_ids)
        return {"ok": f"{len(task_ids)} tasks flagged as revoked"}
    answer = stock.revoke(state, task_id, terminate=terminate, signal=signal, **options)
    state.consumer.pool.cancel_queued(task_ids)
    return answer


__all__ = ["app"]


def _models_or_leave(settings: Settings) -> list[ModelSpec]:
    """The models to serve. If the configuration or a model's files are faulty, log one line and exit before the worker
    starts."""
    try:
        return served_models(settings)
    except (CeleriacError, OSError, ValueError) as exc:
        configure_logging(settings.log_level, settings.log_format)
        logging.getLogger(__name__).critical("exiting: %s", exc)
        report_failed_start(settings, _full_name(settings.worker_name or "gpu"), str(exc))
        sys.exit(os.EX_CONFIG)


def _full_name(name: str) -> str:
    return name if "@" in name else f"{name}@{socket.gethostname()}"


settings = get_settings()

models = _models_or_leave(settings)

for alias in ("redis", "rediss"):
    TRANSPORT_ALIASES[alias] = "gpu_worker.transport:BulkTransport"

app.conf.update(
    worker_pool="gpu_worker.pool:EnginePool",  # do not pass -P: it does not accept a dotted name
    worker_consumer="gpu_worker.consumer:EngineConsumer",
    worker_concurrency=sum(model.max_num_seqs for model in models),
)

app.Worker = app.subclass_with_self(EngineWorker)

app.steps["consumer"].add(EngineStep)

app.amqp.queues.select([model.queue for model in models])

generate.Strategy = strategy


@signals.celeryd_init.connect
def _choose_node_name(instance: Any, **_: Any) -> None:
    """Make the default node name unique: Flower and inspect treat two workers with the same name as one."""
    if instance.hostname != f"celery@{socket.gethostname()}":
        return  # set with -n
    readable = re.sub(r"[^A-Za-z0-9.-]+", "-", models[0].id) + (f"-and-{len(models) - 1}-more" if models[1:] else "")
    name = settings.worker_name or f"gpu-{readable}-{secrets.token_hex(4)}"
    instance.hostname = _full_name(name)
