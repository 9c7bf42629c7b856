"""/health, /metrics and /v1/queue: the state of the API process and its dependencies, and of every model's queue.

The health routes need no key, as they reveal no secrets and nothing about single jobs.
"""

import asyncio
from datetime import datetime
from typing import Annotated, Literal

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import Field
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError
from starlette.requests import Request

from api.errors import database_unavailable
from api.model_queues import ModelQueue
from api.openapi import TEXT
from api.queue_monitor import STALE_SECONDS, Finding
from api.reasons import FATAL, OF_REDIS, ReasonCode, advice
from api.services import Services, private_router, services_of
from dialects.openai_views import View
from domain.errors import NotOffered
from domain.jobs import WaitingFor
from storage.maintenance import RecentJobs, Spread

CHECK_SECONDS = 2.0  # how long the database may take to answer

MAX_AGE_SECONDS = 0.25  # of what is shown: anyone may ask

public = APIRouter(tags=["Operations"])

router = private_router("Operations")

ComponentStatus = Literal["ok", "unavailable"]


class LiveView(View):
    status: Literal["ok"]


class ReadyView(View):
    status: Literal["ok", "draining", "unavailable"]


class SpreadView(View):
    """Seconds; null if there is no job to measure."""

    p50: float | None
    p95: float | None
    p99: float | None
    mean: float | None


class RequestsView(View):
    total: int
    errors: int
    success_rate: float | None


class ThroughputView(View):
    qps: float
    tokens_generated: int


class MetricsView(View):
    """About the newest jobs accepted within the last `window_seconds`, at most 1,000. `errors` counts failed jobs.
    Times begin when a job was accepted: `latency` is that to completion, `queue` that to the start, `ttft` that to the
    commit of the first token."""

    window_seconds: float
    requests: RequestsView
    throughput: ThroughputView
    latency: SpreadView
    queue: SpreadView
    ttft: SpreadView


class MaintenanceView(View):
    """For each clock (`janitor`, `batches`, `webhooks`), the time since the last tick of any maintenance process.
    `silent`: a clock has not ticked for CELERIAC_MAINTENANCE_SILENCE_SECONDS."""

    status: Literal["ok", "silent"]
    seconds_since_last_tick: dict[str, float]


class FindingView(View):
    """Jobs of a model have been waiting for something other than a free slot for at least `seconds`: more than a
    minute, or ten seconds if nobody serves the model."""

    model: str
    waiting_for: WaitingFor
    jobs: int
    seconds: float
    message: str


class HealthView(View):
    """`workers_drained_since` lists the workers that an operator has drained.

    `degraded`: jobs are accepted, but something is wrong, for which `reasons` has a sentence each: with the database
    (locks, connections, its clock), with Redis (streams are slower, nothing is lost), with workers, maintenance or a
    model, or jobs are stuck (`findings`). `unhealthy`: no job can be accepted.
    """

    status: Literal["ok", "degraded", "unhealthy"]
    reasons: Annotated[list[str], Field(description="Why the status is not `ok`: a sentence each.")]
    database: ComponentStatus
    redis: ComponentStatus
    draining: bool
    models: list[str]
    models_unloaded: list[str]
    models_unavailable: list[str]
    model_loaded: bool
    workers: int
    workers_drained_since: dict[str, datetime]
    queue_size: int
    running: int
    streams: int
    maintenance: MaintenanceView
    findings: list[FindingView]
    metrics: MetricsView | None


@public.get("/health/live")
async def live() -> LiveView:
    """Liveness: 200 whenever the process can answer. Restart it only if this fails."""
    return LiveView(status="ok")


@public.get("/health/ready", responses={503: {"model": ReadyView}})
async def ready(request: Request, response: Response) -> ReadyView:
    """Readiness: 200 if requests should be sent to this process, else 503."""
    services = services_of(request)
    status: Literal["ok", "draining", "unavailable"] = "ok"
    if services.draining.is_set():
        status = "draining"
    elif await _check_database(services) != "ok":
        status = "unavailable"
    response.status_code = 200 if status == "ok" else 503
    return ReadyView(status=status)


@public.get("/health", responses={503: {"model": HealthView}})
async def health(request: Request, response: Response) -> HealthView:
    """The state of the whole installation. 503 only if jobs cannot be accepted."""
    services = services_of(request)
    has_read = services.monitor.has_read
    found = await services.examiner.look(max_age_seconds=MAX_AGE_SECONDS)
    if not has_read and not found.has(FATAL):  # right after the start
        await services.monitor.refresh(max_age_seconds=STALE_SECONDS)
        found = await services.examiner.look(max_age_seconds=MAX_AGE_SECONDS)
    queues = services.monitor.queues.values()
    num_workers = sum(queue.num_workers for queue in queues)
    response.status_code = 503 if found.has(FATAL) else 200
    can_ask = not found.has(frozenset({ReasonCode.DATABASE_UNAVAILABLE}))
    return HealthView(
        status="unhealthy" if found.has(FATAL) else "degraded" if found.reasons else "ok",
        reasons=[reason.sentence for reason in found.reasons],
        database="unavailable" if found.has(FATAL) else "ok",
        redis="unavailable" if found.has(OF_REDIS) else "ok",
        draining=services.draining.is_set(),
        models=[spec.id for spec in services.catalog],
        models_unavailable=list(services.catalog.unavailable),
        models_unloaded=[queue.model for queue in queues if not queue.is_loaded],
        model_loaded=num_workers > 0,  # a worker is counted once it has loaded its model
        workers=num_workers,
        workers_drained_since=dict(services.monitor.drained_since),
        queue_size=sum(queue.num_queued for queue in queues),
        running=sum(queue.num_running for queue in queues),
        streams=services.slots.num_taken,
        maintenance=MaintenanceView(
            status="silent" if services.monitor.silent_clocks else "ok",
            seconds_since_last_tick={
                clock: round(age, 3) for clock, age in services.monitor.seconds_since_ticks.items()
            },
        ),
        findings=[_finding_view(finding) for finding in services.monitor.findings],
        metrics=_metrics(await services.monitor.recent()) if can_ask else None,
    )


@router.get("/metrics", response_class=Response, responses={200: TEXT})
async def metrics(request: Request) -> Response:
    """Prometheus metrics of this process and of the whole installation. If keys are required, this needs one with
    the scope `metrics` or `admin`; a scraper sends it as `Authorization: Bearer`. Where several processes share a port,
    each has them on a port of its own."""
    ports = request.app.state.ports
    if ports is not None and request.scope["server"][1] == ports.shared:
        raise NotOffered(
            f"port {ports.shared} is shared by {len(ports.own)} processes, each of which counts for itself; scrape "
            f"each of them on its own port: {', '.join(map(str, ports.own))}"
        )
    return Response(await services_of(request).exposition.text(), media_type=CONTENT_TYPE_LATEST)


def _finding_view(finding: Finding) -> FindingView:
    return FindingView(
        model=finding.model,
        waiting_for=finding.reason,
        jobs=finding.num_jobs,
        seconds=finding.seconds,
        message=advice(finding),
    )


def _metrics(recent: RecentJobs | None) -> MetricsView | None:
    if recent is None:
        return None
    success_rate = recent.num_completed / recent.num_ended if recent.num_ended else None
    return MetricsView(
        window_seconds=recent.seconds,
        requests=RequestsView(total=recent.num_ended, errors=recent.num_failed, success_rate=success_rate),
        throughput=ThroughputView(qps=recent.num_ended / recent.seconds, tokens_generated=recent.num_tokens),
        latency=_spread(recent.latency),
        queue=_spread(recent.wait),
        ttft=_spread(recent.time_to_first_token),
    )


def _spread(spread: Spread) -> SpreadView:
    return {"p50": spread.p50, "p95": spread.p95, "p99": spread.p99, "mean": spread.mean}


async def _check_database(services: Services) -> ComponentStatus:
    try:
        async with asyncio.timeout(CHECK_SECONDS), services.sessions() as session:
            await session.execute(text("SELECT 1"))
    except (SQLAlchemyError, OSError, TimeoutError):
        return "unavailable"
    return "ok"


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
    load_percent: Annotated[int | None, Field(description="How far the model has been loaded, while it is loading.")]
    waiting_for: Annotated[dict[WaitingFor, int], Field(description="Number of queued jobs by what they wait for.")]


class QueueListView(View):
    object: Literal["list"]
    data: list[ModelQueueView]


@router.get("/v1/queue")
async def read_queue(request: Request) -> QueueListView:
    """The queue of every model, over all tenants. `eta_seconds` is an estimate for a job submitted now."""
    try:
        queues = await services_of(request).monitor.read()
    except (SQLAlchemyError, OSError) as exc:
        raise database_unavailable() from exc
    return QueueListView(object="list", data=[_view(queue) for queue in queues.values()])


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
        eta_seconds=queue.last_place()["eta_seconds"],
        load_percent=queue.load_percent,
        waiting_for={reason: waiting.num_jobs for reason, waiting in queue.waiting.items()},
    )
