"""A sample of bench/hostile.py: nothing that one key sends is a server error, and another tenant's operations work."""

import asyncio
from collections.abc import Callable

import httpx
import pytest
from sqlalchemy.orm import Session, sessionmaker

from bench.hostile_kinds import KINDS
from bench.hostile_requests import ATTACKS, OPERATIONS, attack
from bench.request_cost import MODEL
from domain.catalog import Catalog, ModelSpec
from settings import ROOT, Settings
from storage import tenants
from storage.tables import Tenant
from tests.integration.api_harness import ApiServer
from tests.waiting import slowness

pytestmark = pytest.mark.slow

CATALOG = Catalog([ModelSpec(id=MODEL, path=str(ROOT / "models" / MODEL), max_model_len=1024)])


@pytest.fixture
def api_settings(database_url: str, redis_url: str) -> Settings:
    return Settings(database_url=database_url, redis_url=redis_url, auth="api_key", max_streams=16, max_uploads=4)


def test_whatever_a_tenant_sends_another_one_can_work(
    api_settings: Settings,
    session_factory: sessionmaker[Session],
    make_tenant: Callable[..., Tenant],
    caplog: pytest.LogCaptureFixture,
) -> None:
    with session_factory.begin() as session:
        one, other = (tenants.create_key(session, make_tenant().id) for _ in range(2))

    attacks = [*4 * ATTACKS, *KINDS.items()]

    async def run(url: str) -> list[str]:
        hostile = httpx.AsyncClient(base_url=url, headers={"authorization": f"Bearer {one}"}, timeout=2 * slowness())
        patient = httpx.AsyncClient(base_url=url, headers={"authorization": f"Bearer {other}"}, timeout=600)
        async with hostile, patient:
            attacking = asyncio.create_task(attack(hostile, attacks, num_requests=len(attacks), num_at_once=26, seed=1))
            for operation in OPERATIONS:
                await operation(patient)
            _, complaints = await attacking
            for operation in OPERATIONS:
                await operation(patient)
        return complaints

    with ApiServer(api_settings, CATALOG) as api:
        assert asyncio.run(run(api.url)) == []
    assert "request failed" not in caplog.text
