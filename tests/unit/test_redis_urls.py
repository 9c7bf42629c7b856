"""One setting names Redis; redis-py and Celery each get their own spelling of it."""

import pytest
import redis
from pydantic import ValidationError

from settings import Settings


@pytest.mark.parametrize(
    ("given", "for_redis", "for_celery"),
    [
        ("redis://:secret@host:1/4", "redis://:secret@host:1/4", "redis://:secret@host:1/4"),
        ("rediss://host/1", "rediss://host/1", "rediss://host/1"),
        ("unix:///run/r.sock?db=3", "unix:///run/r.sock?db=3", "redis+socket:///run/r.sock?virtual_host=3"),
        ("unix://:secret@/run/r.sock", "unix://:secret@/run/r.sock", "redis+socket://:secret@/run/r.sock"),
        ("redis+socket:///r.sock?virtual_host=3", "unix:///r.sock?db=3", "redis+socket:///r.sock?virtual_host=3"),
    ],
)
def test_a_url_is_spelled_for_both(given: str, for_redis: str, for_celery: str) -> None:
    settings = Settings(redis_url=given)
    assert (settings.redis_url, settings.broker_url) == (for_redis, for_celery)
    redis.Redis.from_url(settings.redis_url).close()


def test_another_scheme_is_refused() -> None:
    with pytest.raises(ValidationError, match="it begins with none of redis://, rediss://, unix://"):
        Settings(redis_url="amqp://host")
