"""Opens the services of an API process, each with what it needs of the others, and closes them in the reverse order."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial

import redis.asyncio

from api.authentication import Authenticator
from api.examiner import open_examiner
from api.limits import (
    LargeWork,
    StreamPlaces,
    places_of_downloads,
    places_of_large_bodies,
    places_of_uploads,
)
from api.pools import MAX_READS, MAX_WRITES, open_pools
from api.queue_monitor import QueueMonitor
from api.reasons import installation_reasons
from api.services import Services, turns_of_queries
from api.signals import Signal
from domain.catalog import Catalog
from observability import EventLoopMonitor
from settings import Settings
from storage.streams import StreamReader
from tasks import job_log
from tasks.accept import open_acceptor
from tasks.dispatch import Dispatcher
from tasks.submit import Submitter
from text.models import ModelViews, follow_models

REDIS_TIMEOUT_SECONDS = 2.0


@asynccontextmanager
async def open_services(settings: Settings, catalog: Catalog) -> AsyncIterator[Services]:
    """Neither the database nor Redis needs to be up: until they are, requests are refused."""
    job_log.begin([entry.id for entry in catalog.entries], [])
    views = await asyncio.to_thread(ModelViews, catalog)
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(EventLoopMonitor())
        pools = await stack.enter_async_context(open_pools(settings))
        client = open_redis(settings.redis_url)
        stack.push_async_callback(client.aclose)
        bells = open_redis(settings.redis_url, timeout_seconds=None)
        stack.push_async_callback(bells.aclose)
        dispatcher = Dispatcher(pools.system_statements, bells, catalog, settings)
        stack.push_async_callback(dispatcher.aclose)
        acceptor = await stack.enter_async_context(open_acceptor(settings, ring=dispatcher.ring))
        monitor = await stack.enter_async_context(QueueMonitor(pools.system_statements, catalog, settings))
        submitter = Submitter(settings, views, acceptor, ring=dispatcher.ring, estimate=monitor.estimate)
        stack.push_async_callback(submitter.aclose)
        authenticator = Authenticator(pools.system_statements, is_open=settings.auth == "none")
        stack.push_async_callback(authenticator.aclose)
        is_shared = settings.auth != "none"
        streams = StreamReader(settings.redis_url, pools.system_statements, is_shared=is_shared)
        draining = Signal()
        others = partial(installation_reasons, monitor, catalog, draining)
        examiner = await stack.enter_async_context(open_examiner(settings, others))
        large_work = LargeWork()
        stack.callback(large_work.close)
        services = Services(
            settings=settings,
            catalog=catalog,
            views=views,
            sessions=pools.sessions,
            statements=pools.statements,
            system_sessions=pools.system_sessions,
            system_statements=pools.system_statements,
            redis=client,
            authenticator=authenticator,
            submitter=submitter,
            dispatcher=dispatcher,
            monitor=monitor,
            streams=await stack.enter_async_context(streams),
            examiner=examiner,
            draining=draining,
            last_call=Signal(),
            slots=StreamPlaces(settings.max_streams, is_shared=is_shared),
            large_work=large_work,
            uploads=places_of_uploads(settings.max_uploads, is_shared=is_shared),
            downloads=places_of_downloads(is_shared=is_shared),
            large_bodies=places_of_large_bodies(is_shared=is_shared),
            read_turns=turns_of_queries(MAX_READS, is_shared=is_shared),
            write_turns=turns_of_queries(MAX_WRITES, is_shared=is_shared),
        )
        stack.push_async_callback(services.cancel_spawned)
        services.spawn(follow_models(views, on_check=submitter.prepare_grammars))
        yield services


def open_redis(url: str, *, timeout_seconds: float | None = REDIS_TIMEOUT_SECONDS) -> "redis.asyncio.Redis":
    """Without a timeout, the client sends at once, and not in a task of its own; the caller must have a deadline."""
    return redis.asyncio.Redis.from_url(
        url, socket_timeout=timeout_seconds, socket_connect_timeout=REDIS_TIMEOUT_SECONDS
    )
