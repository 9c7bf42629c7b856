"""GET /v1/admin/models: which workers serve what. For keys with the admin role only."""

from datetime import datetime
from typing import Literal

from fastapi import Request

from api.deps import private_router, require_admin, services_of
from api.job_schemas import View
from storage import workers
from storage.tables import Worker

router = private_router()


class WorkerView(View):
    hostname: str
    num_running: int
    max_num_seqs: int
    tokens_per_second: float
    draining: bool
    loaded_since: datetime


class ModelStatusView(View):
    """`waiting`: no live worker takes jobs of it, so they wait. `revision` is that of newly accepted jobs."""

    id: str
    status: Literal["loaded", "draining", "waiting"]
    revision: str
    max_model_len: int
    workers: list[WorkerView]


class ModelStatusListView(View):
    object: Literal["list"] = "list"
    data: list[ModelStatusView]


@router.get("/v1/admin/models")
async def list_model_statuses(request: Request) -> ModelStatusListView:
    require_admin(request)
    services = services_of(request)
    live = await services.read(workers.list_live)
    data = []
    for spec in services.catalog:
        own = [worker for worker in live if worker.model == spec.id]
        is_loaded = any(not worker.is_draining for worker in own)
        data.append(
            ModelStatusView(
                id=spec.id,
                status="loaded" if is_loaded else "draining" if own else "waiting",
                revision=services.views.get(spec.id).revision,
                max_model_len=spec.max_model_len,
                workers=[_view(worker) for worker in own],
            )
        )
    return ModelStatusListView(data=data)


def _view(worker: Worker) -> WorkerView:
    return WorkerView(
        hostname=worker.hostname,
        num_running=worker.num_running,
        max_num_seqs=worker.max_num_seqs,
        tokens_per_second=round(worker.tokens_per_second, 1),
        draining=worker.is_draining,
        loaded_since=worker.started_at,
    )
