"""The API as the integration tests meet it: a server per test, on this test's own database and Redis."""

from collections.abc import Iterator

import httpx
import pytest
import redis
from sqlalchemy.orm import Session, sessionmaker

from settings import Settings
from tests.integration.api_harness import ApiServer, HandWorker


@pytest.fixture
def api_settings(database_url: str, redis_url: str) -> Settings:
    return Settings(database_url=database_url, redis_url=redis_url)


@pytest.fixture
def api(api_settings: Settings) -> Iterator[ApiServer]:
    with ApiServer(api_settings) as server:
        yield server


@pytest.fixture
def http(api: ApiServer) -> Iterator[httpx.Client]:
    with api.client() as client:
        yield client


@pytest.fixture
def hand_worker(session_factory: sessionmaker[Session], redis_url: str) -> Iterator[HandWorker]:
    with redis.Redis.from_url(redis_url) as client:
        yield HandWorker(session_factory, client)
