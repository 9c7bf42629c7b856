"""The Celery app of a GPU worker: `celery -A gpu_worker.app worker`. One worker serves one model on one engine."""

import logging
import os
import re
import secrets
import socket
import sys
from typing import Any

from celery import signals
from kombu.transport import TRANSPORT_ALIASES

from domain.catalog import ModelSpec
from domain.errors import CeleriacError
from gpu_worker import control  # noqa: F401  (registers the remote-control commands)
from gpu_worker.consumer import EngineStep, EngineWorker
from gpu_worker.delivery import Delivery
from gpu_worker.pool import served_model
from observability import configure_logging
from settings import Settings, get_settings
from tasks.app import app
from tasks.generate import generate

__all__ = ["app"]


def _model_or_leave(settings: Settings) -> ModelSpec:
    """What a look at the files tells is wrong is said in one line, and ends the worker before it has begun."""
    try:
        return served_model(settings)
    except (CeleriacError, OSError, ValueError) as exc:
        configure_logging(settings.log_level, settings.log_format)
        logging.getLogger(__name__).critical("leaving: %s", exc)
        sys.exit(os.EX_CONFIG)


settings = get_settings()
model = _model_or_leave(settings)

for alias in ("redis", "rediss"):
    TRANSPORT_ALIASES[alias] = "gpu_worker.transport:ClaimingTransport"

app.conf.update(
    worker_pool="gpu_worker.pool:EnginePool",  # do not pass -P: it takes no dotted name
    worker_consumer="gpu_worker.consumer:EngineConsumer",
    worker_concurrency=model.max_num_seqs,
)
app.Worker = app.subclass_with_self(EngineWorker)
app.events_cls = "gpu_worker.consumer:EngineEvents"
app.steps["consumer"].add(EngineStep)
app.amqp.queues.select([model.queue])
generate.Request = Delivery


@signals.celeryd_init.connect
def _choose_node_name(instance: Any, **_: Any) -> None:
    """Two workers of one name look like one to Flower and inspect, so a name nobody chose is made unique."""
    if instance.hostname != f"celery@{socket.gethostname()}":
        return  # chosen by -n
    readable = re.sub(r"[^A-Za-z0-9.-]+", "-", model.id)
    name = settings.worker_name or f"gpu-{readable}-{secrets.token_hex(4)}"
    instance.hostname = name if "@" in name else f"{name}@{socket.gethostname()}"
