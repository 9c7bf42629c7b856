"""GET /v1/queue: what every model has to do, and how fast it is done."""

from typing import Literal

from fastapi import Request
from pydantic import Field
from sqlalchemy.exc import SQLAlchemyError

from api.deps import private_router, services_of
from api.queue_monitor import ModelQueue
from api.views import View
from domain.errors import StorageUnavailable
from domain.waiting import WaitingFor
from storage.job_queries import QueuePosition

router = private_router()


class ModelQueueView(View):
    model: str
    queued: int
    running: int
    workers: int
    slots: int
    oldest_queued_seconds: float
    tokens_ahead: int
    tokens_per_second: float
    eta_seconds: float | None
    waiting_for: dict[WaitingFor, int] = Field(description="Queued jobs by what they wait for.")


class QueueListView(View):
    object: Literal["list"] = "list"
    data: list[ModelQueueView]


@router.get("/v1/queue")
async def read_queue(request: Request) -> QueueListView:
    """Of all tenants together: numbers only. `eta_seconds` is that of a job submitted now."""
    try:
        queues = await services_of(request).monitor.read()
    except (SQLAlchemyError, OSError) as exc:
        raise StorageUnavailable("the database does not answer; retry in a moment", retry_after_seconds=2) from exc
    return QueueListView(data=[_view(queue) for queue in queues.values()])


def _view(queue: ModelQueue) -> ModelQueueView:
    return ModelQueueView(
        model=queue.model,
        queued=queue.num_queued,
        running=queue.num_running,
        workers=queue.num_workers,
        slots=queue.num_slots,
        oldest_queued_seconds=queue.oldest_queued_seconds,
        tokens_ahead=queue.queued_tokens + queue.running_tokens,
        tokens_per_second=queue.tokens_per_second,
        eta_seconds=queue.eta_seconds(QueuePosition(queue.num_queued, queue.queued_tokens)),
        waiting_for={reason: waiting.num_jobs for reason, waiting in queue.waiting.items()},
    )
