"""Positions in the queue, and what a database that was slow to answer costs those who ask later."""

import asyncio
from collections.abc import Sequence
from uuid import UUID

import pytest
from sqlalchemy import text
from sqlalchemy.orm import Session

from api.queue_monitor import QueueMonitor
from domain.catalog import Catalog, ModelSpec
from domain.jobs import new_id
from settings import Settings
from storage import job_queries
from storage.database import async_session_factory, open_statement_database
from storage.job_queries import QueuePosition
from tests.waiting import slowness

pytestmark = pytest.mark.anyio

SPEC = ModelSpec(id="test-model", path="none", backend="fake", max_model_len=64)


async def test_a_slow_answer_is_no_reason_to_ask_seldom(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    positions = job_queries.positions
    seconds = iter((1.5, 0.0))

    def slow_positions(session: Session, job_ids: Sequence[UUID]) -> dict[UUID, QueuePosition]:
        session.execute(text("SELECT pg_sleep(:seconds)"), {"seconds": next(seconds)})
        return positions(session, job_ids)

    monkeypatch.setattr(job_queries, "positions", slow_positions)
    database = open_statement_database(database_url)
    async with QueueMonitor(async_session_factory(database), Catalog([SPEC]), Settings()) as monitor:
        async with asyncio.timeout(5 * slowness()):  # four times the slow one would be six seconds
            assert await monitor.position(new_id(), SPEC.id) is None
            assert await monitor.position(new_id(), SPEC.id) is None
    await database.dispose()
