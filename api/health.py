"""How this API process and what it stands on are doing. Open to everybody but /metrics, and tells no secrets."""

import asyncio
from typing import Literal

from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from redis.exceptions import RedisError
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

from api.deps import private_router, services_of
from api.job_schemas import View
from api.services import Services

CHECK_SECONDS = 2.0

public = APIRouter()
router = private_router()

Answer = Literal["ok", "unavailable"]


class LiveView(View):
    status: Literal["ok"] = "ok"


class ReadyView(View):
    status: Literal["ok", "draining", "unavailable"]


class HealthView(View):
    """`degraded` still accepts jobs: Redis is away (slower, nothing lost), or no worker is there to run them."""

    status: Literal["ok", "degraded", "unhealthy"]
    database: Answer
    redis: Answer
    draining: bool
    models: list[str]
    workers: int
    queued: int
    running: int
    streams: int


@public.get("/health/live")
async def live() -> LiveView:
    """The process answers. Restart it only when this fails."""
    return LiveView()


@public.get("/health/ready", responses={503: {"model": ReadyView}})
async def ready(request: Request, response: Response) -> ReadyView:
    """Whether requests should be sent here."""
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
    """The whole picture. 503 only where jobs cannot be accepted."""
    services = services_of(request)
    database, redis = await asyncio.gather(_check_database(services), _check_redis(services))
    queues = services.monitor.queues.values()
    num_workers = sum(queue.num_workers for queue in queues)
    is_whole = redis == "ok" and num_workers > 0 and not services.draining.is_set()
    response.status_code = 200 if database == "ok" else 503
    return HealthView(
        status="unhealthy" if database != "ok" else "ok" if is_whole else "degraded",
        database=database,
        redis=redis,
        draining=services.draining.is_set(),
        models=[spec.id for spec in services.catalog],
        workers=num_workers,
        queued=sum(queue.num_queued for queue in queues),
        running=sum(queue.num_running for queue in queues),
        streams=services.slots.num_open,
    )


@router.get("/metrics")
async def metrics() -> Response:
    """Prometheus. A scraper sends the key as `Authorization: Bearer`."""
    return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)


async def _check_database(services: Services) -> Answer:
    try:
        async with asyncio.timeout(CHECK_SECONDS), services.sessions() as session:
            await session.execute(text("SELECT 1"))
    except (SQLAlchemyError, OSError, TimeoutError):
        return "unavailable"
    return "ok"


async def _check_redis(services: Services) -> Answer:
    try:
        async with asyncio.timeout(CHECK_SECONDS):
            await services.redis.ping()
    except (RedisError, OSError, TimeoutError):
        return "unavailable"
    return "ok"
