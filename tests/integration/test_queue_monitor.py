"""Positions in the queue, and what a database that was slow to answer costs those who ask later."""

import asyncio
import threading
from collections.abc import Iterable, Sequence
from typing import NoReturn
from uuid import UUID

import pytest
from sqlalchemy import text
from sqlalchemy.orm import Session

from api import model_queues, queue_monitor
from api.queue_monitor import QueueMonitor
from domain.catalog import Catalog, ModelSpec
from domain.eta import FairOrder, TenantQueue
from domain.jobs import new_id
from settings import Settings
from storage import job_queues
from storage.database import async_session_factory, open_statement_database
from storage.job_queues import QueuePosition
from tests.integration.api_harness import ApiServer, HandWorker, post_job
from tests.waiting import slowness, wait_until, wait_until_async

pytestmark = pytest.mark.anyio

SPEC = ModelSpec(id="test-model", path="none", backend="fake", max_model_len=64)


async def test_a_slow_answer_is_no_reason_to_ask_seldom(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    positions = job_queues.positions
    seconds = iter((1.5, 0.0))

    def slow_positions(session: Session, job_ids: Sequence[UUID]) -> dict[UUID, QueuePosition]:
        session.execute(text("SELECT pg_sleep(:seconds)"), {"seconds": next(seconds)})
        return positions(session, job_ids)

    monkeypatch.setattr(job_queues, "positions", slow_positions)
    database = open_statement_database(database_url)
    async with QueueMonitor(async_session_factory(database), Catalog([SPEC]), Settings()) as monitor:
        async with asyncio.timeout(5 * slowness()):  # four times the slow one would be six seconds
            assert await monitor.position(new_id(), SPEC.id) is None
            assert await monitor.position(new_id(), SPEC.id) is None
    await database.dispose()


async def test_an_unexpected_error_ends_neither_the_figures_nor_the_positions(
    database_url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*args: object) -> NoReturn:
        raise TypeError("a figure is missing")

    database = open_statement_database(database_url)
    with monkeypatch.context() as patch:
        patch.setattr(queue_monitor, "read_queues", broken)
        patch.setattr(job_queues, "positions", broken)
        patch.setattr(queue_monitor, "REFRESH_SECONDS", 0.05)
        monitor = QueueMonitor(async_session_factory(database), Catalog([SPEC]), Settings())
        async with monitor:
            with pytest.raises(TypeError):
                await monitor.position(new_id(), SPEC.id)
            await wait_until_async(lambda: "could not read the queues" in errors_in(caplog))
            patch.undo()
            assert await monitor.position(new_id(), SPEC.id) is None
            await wait_until_async(lambda: monitor.queues)
    await database.dispose()
    assert "could not find positions" in errors_in(caplog)


async def test_the_queues_of_many_tenants_are_ranked_beside_the_event_loop(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second's ranking of thousands of tenants takes longer than a stream may wait for its next token."""
    ranked_in: list[threading.Thread] = []

    class Ranking(FairOrder):
        def __init__(self, tenants: Iterable[TenantQueue]) -> None:
            ranked_in.append(threading.current_thread())
            super().__init__(tenants)

    monkeypatch.setattr(model_queues, "FairOrder", Ranking)
    database = open_statement_database(database_url)
    async with QueueMonitor(async_session_factory(database), Catalog([SPEC]), Settings()) as monitor:
        await monitor.read(max_age_seconds=0.0)
    await database.dispose()
    assert ranked_in
    assert threading.current_thread() not in ranked_in


async def test_only_the_queues_that_are_asked_for_are_ranked_anew(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranked: list[FairOrder] = []

    class Counted(FairOrder):
        def __init__(self, tenants: Iterable[TenantQueue]) -> None:
            super().__init__(tenants)
            ranked.append(self)

    monkeypatch.setattr(model_queues, "FairOrder", Counted)
    database = open_statement_database(database_url)
    specs = [SPEC, *(SPEC.model_copy(update={"id": f"quiet-{number}"}) for number in range(3))]
    monitor = QueueMonitor(async_session_factory(database), Catalog(specs), Settings())
    await monitor.read(max_age_seconds=0.0)
    assert len(ranked) == 4, "who asks first need not wait"
    monitor.queues[SPEC.id].last_place()
    for _ in range(2):
        ranked.clear()
        await monitor.read(max_age_seconds=0.0)
        assert len(ranked) == 1
        assert monitor.queues[SPEC.id].order is ranked[0]
    ranked.clear()
    assert monitor.queues["quiet-1"].last_place()["position"] == 0
    assert len(ranked) == 1
    await database.dispose()


def errors_in(caplog: pytest.LogCaptureFixture) -> set[str]:
    """Those logged with a traceback."""
    return {record.message for record in caplog.records if record.levelname == "ERROR" and record.exc_info}


def test_a_new_job_is_not_behind_those_that_have_just_begun(
    api_settings: Settings, hand_worker: HandWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The figures do not know that yet: they are read once a second, and here never again."""
    for name in ("REFRESH_SECONDS", "MAX_PAUSE_SECONDS", "STALE_SECONDS"):
        monkeypatch.setattr(queue_monitor, name, 3_600.0)
    with ApiServer(api_settings) as api, api.client() as client:
        ahead = [post_job(client) for _ in range(2)]
        wait_until(lambda: client.get("/v1/queue").json()["data"][0]["queued"] == 2)
        assert post_job(client)["queue"]["position"] == 2
        for job in ahead:
            hand_worker.claim(job["id"])
        assert post_job(client)["queue"]["position"] == 1
