"""/v1/admin: which workers serve which models and whose jobs wait for them, loading models, draining workers."""

import asyncio
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter
from starlette.requests import Request
from starlette.responses import Response

from api.errors import json_response
from api.inputs import preferred_wait
from api.model_queues import UNKNOWN_PLACE, ModelQueue
from api.services import Services, private_router, services_of
from dialects.openai_views import View
from domain.catalog import ModelEntry
from domain.errors import NotFound
from domain.eta import Load
from domain.jobs import WorkerState
from storage import workers
from storage.tables import Worker, WorkerDrain
from storage.tenant_queues import TenantQueueFigures, tenant_queues

router = private_router("Operations")

MAX_TENANT_QUEUES = 100  # of one list

POLL_SECONDS = 0.2  # between two reads of the workers while a client waits for them


class WorkerView(View):
    hostname: str
    state: WorkerState
    num_running: int
    max_num_seqs: int
    tokens_per_second: float
    cache_usage: Annotated[float | None, Field(description="Share of the key/value cache in use; null if unknown.")]
    memory_bytes: Annotated[
        int | None, Field(description="Of the device that the engine holds; without a device, its own.")
    ]
    load_percent: Annotated[int | None, Field(description="While it loads the model, if the engine can tell.")]
    ready_in_seconds: Annotated[
        float | None, Field(description="Estimated time until the model is loaded; null if it is, or unknown.")
    ]
    troubles: Annotated[
        dict[str, str],
        Field(description="What it finds wrong with itself: by codes of docs/runbooks.md, a sentence each."),
    ]
    started_at: datetime
    drained_since: datetime | None  # when an operator ordered the drain; null if the worker takes jobs


Status = Literal["loaded", "loading", "draining", "standby", "unloaded", "waiting"]


class ModelStatusView(View):
    """`is_loaded` is the state that was ordered; `status` is the most advanced state of any of the model's workers.
    `standby`: its workers serve other models and load this one when jobs wait for it. `waiting`: no live worker takes
    its jobs. `revision` is the one that newly accepted jobs get."""

    id: str
    is_loaded: bool
    status: Status
    revision: str
    max_model_len: int
    workers: list[WorkerView]


class ModelStatusListView(View):
    object: Literal["list"]
    data: list[ModelStatusView]


class TenantQueueView(View):
    model: str
    tenant: str
    queued: int
    running: int
    oldest_queued_seconds: float
    eta_seconds: Annotated[float | None, Field(description="Estimate for a job that this tenant submits now.")]


class TenantQueueListView(View):
    object: Literal["list"]
    data: list[TenantQueueView]
    has_more: bool


_STATUS = TypeAdapter(ModelStatusView)

ORDER: dict[str, Any] = {
    "responses": {200: {"model": ModelStatusView}, 202: {"model": ModelStatusView}},
    "openapi_extra": {
        "parameters": [{"name": "Prefer", "in": "header", "required": False, "schema": {"type": "string"}}]
    },
}


@router.get("/v1/admin/models")
async def list_model_statuses(request: Request) -> ModelStatusListView:
    services = services_of(request)
    live = await services.system_read(workers.list_live)
    unloaded = await services.system_read(workers.unloaded_models)
    drains = await services.system_read(workers.list_drains)
    data = [
        _status(services, spec, [worker for worker in live if worker.model == spec.id], spec.id not in unloaded, drains)
        for spec in services.catalog
    ]
    return ModelStatusListView(object="list", data=data)


@router.get("/v1/admin/queue")
async def list_tenant_queues(request: Request) -> TenantQueueListView:
    """The unfinished jobs of each tenant and model, the longest queues first; a hundred of them at most."""
    services = services_of(request)
    found = await services.system_read(tenant_queues, limit=MAX_TENANT_QUEUES + 1)
    queues = services.monitor.queues
    data = [_tenant_queue(queue, queues.get(queue.model)) for queue in found[:MAX_TENANT_QUEUES]]
    return TenantQueueListView(object="list", data=data, has_more=len(found) > MAX_TENANT_QUEUES)


def _tenant_queue(queue: TenantQueueFigures, of_all: ModelQueue | None) -> TenantQueueView:
    place = UNKNOWN_PLACE if of_all is None else of_all.place(of_all.joining(queue.tenant_id, Load(), 0))
    return TenantQueueView(
        model=queue.model,
        tenant=queue.tenant,
        queued=queue.num_queued,
        running=queue.num_running,
        oldest_queued_seconds=round(queue.oldest_queued_seconds, 3),
        eta_seconds=place["eta_seconds"],
    )


@router.post("/v1/admin/models/{model:path}/load", status_code=202, **ORDER)
async def load_model(model: str, request: Request) -> Response:
    """The model's workers start their engines and take its jobs again. Answers 202 once the order is committed; with
    `Prefer: wait=N`, 200 if the model has workers and all of them are ready within N seconds."""
    return await _order(request, model, WorkerState.READY)


@router.post("/v1/admin/models/{model:path}/unload", status_code=202, **ORDER)
async def unload_model(model: str, request: Request) -> Response:
    """The model's workers drain as they do on SIGTERM, then stop their engines, which frees the GPU, and keep running.
    Its jobs wait. Answers 202 once the order is committed; with `Prefer: wait=N`, 200 if every engine has stopped
    within N seconds."""
    return await _order(request, model, WorkerState.UNLOADED)


async def _order(request: Request, model: str, wanted: WorkerState) -> Response:
    """Idempotent: repeating an order changes nothing."""
    services = services_of(request)
    spec = services.catalog.get(model)
    wait_seconds = preferred_wait(request.headers.get("prefer"))
    is_loaded = wanted is WorkerState.READY
    changed_at = await services.system_write(workers.set_model_loaded, spec.id, is_loaded=is_loaded)
    await services.refresh_queues()
    gives_up_at = time.monotonic() + (wait_seconds or 0)
    while True:
        own = await services.system_read(workers.list_live, model=spec.id)
        is_done = _have_all_obeyed(own, wanted, changed_at)
        if is_done or time.monotonic() >= gives_up_at or services.draining.is_set():
            break
        await asyncio.sleep(POLL_SECONDS)
    view = _status(services, spec, own, is_loaded, await services.system_read(workers.list_drains))
    headers = {} if wait_seconds is None else {"preference-applied": f"wait={wait_seconds}"}
    status_code = 200 if wait_seconds and is_done else 202
    return json_response(_STATUS.dump_python(view, mode="json"), status_code, headers)


def _have_all_obeyed(own: Sequence[Worker], wanted: WorkerState, changed_at: datetime) -> bool:
    """A worker that has reported since the change knows of it, so the state that it reported takes it into account."""
    has_any = bool(own) or wanted is WorkerState.UNLOADED
    return has_any and all(worker.state is wanted and worker.seen_at > changed_at for worker in own)


@router.post("/v1/admin/workers/{hostname}/drain")
async def drain_worker(hostname: str, request: Request) -> WorkerView:
    """The worker takes no more jobs, gives running ones CELERIAC_DRAIN_SECONDS to finish, and keeps running. It notices
    the order within two seconds. The order applies to the worker's name, across restarts, until the worker is resumed;
    repeating it changes nothing."""
    services = services_of(request)
    await _live_worker(services, hostname)
    seconds = services.settings.drain_seconds
    await services.system_write(workers.drain, hostname, release_after_seconds=seconds)
    return await _worker_view(services, hostname)


@router.post("/v1/admin/workers/{hostname}/resume")
async def resume_worker(hostname: str, request: Request) -> WorkerView:
    """The worker takes jobs again."""
    services = services_of(request)
    await services.system_write(workers.resume, hostname)
    return await _worker_view(services, hostname)


async def _worker_view(services: Services, hostname: str) -> WorkerView:
    drains = await services.system_read(workers.list_drains)
    return _view(await _live_worker(services, hostname), {drain.hostname: drain.since for drain in drains})


async def _live_worker(services: Services, hostname: str) -> Worker:
    live = await services.system_read(workers.list_live)
    for worker in live:
        if worker.hostname == hostname:
            return worker
    known = ", ".join(sorted(worker.hostname for worker in live)) or "none"
    raise NotFound(f"there is no live worker named {hostname[:200]!r}; the live workers are: {known}")


def _status(
    services: Services, spec: ModelEntry, own: Sequence[Worker], is_loaded: bool, drains: Sequence[WorkerDrain]
) -> ModelStatusView:
    since_by_hostname = {drain.hostname: drain.since for drain in drains}
    states = {worker.state for worker in own}
    view = services.views.get(spec.id)
    status: Status = "waiting" if is_loaded else "unloaded"
    if WorkerState.READY in states:
        status = "loaded"
    elif WorkerState.LOADING in states:
        status = "loading"
    elif WorkerState.DRAINING in states:
        status = "draining"
    elif WorkerState.STANDBY in states:
        status = "standby"
    return ModelStatusView(
        id=spec.id,
        is_loaded=is_loaded,
        status=status,
        revision=view.revision,
        max_model_len=view.max_model_len,
        workers=[_view(worker, since_by_hostname) for worker in own],
    )


def _view(worker: Worker, drained_since: Mapping[str, datetime]) -> WorkerView:
    return WorkerView(
        hostname=worker.hostname,
        state=worker.state,
        num_running=worker.num_running,
        max_num_seqs=worker.max_num_seqs,
        tokens_per_second=round(worker.tokens_per_second, 1),
        cache_usage=None if worker.cache_usage is None else round(worker.cache_usage, 4),
        memory_bytes=worker.memory_bytes,
        load_percent=worker.load_percent,
        ready_in_seconds=worker.ready_in_seconds if worker.state is not WorkerState.READY else None,
        troubles=worker.troubles,
        started_at=worker.started_at,
        drained_since=drained_since.get(worker.hostname),
    )
