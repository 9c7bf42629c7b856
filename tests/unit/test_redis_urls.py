"""One URL of Redis, read alike by redis-py and by Celery's transport."""

from pathlib import Path
from typing import Any

import pytest
import redis
from kombu import Connection
from pydantic import ValidationError

from settings import Settings
from tasks.app import make_app

HERE = str(Path(__file__))


def halves(url: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """What redis-py connects with, and what Celery's transport does. Nothing connects."""
    settings = Settings(redis_url=url)
    pool = redis.ConnectionPool.from_url(settings.redis_url)
    ours: dict[str, Any] = pool.connection_kwargs | {"tls": pool.connection_class is redis.SSLConnection}
    app = make_app(settings)
    connection: Connection = app.connection_for_write()
    theirs = connection.transport.Channel._connparams(_Channel(connection))
    theirs["tls"] = issubclass(theirs["connection_class"], redis.SSLConnection)
    return ours, theirs


class _Channel:
    """As much of kombu's channel as makes its parameters without connecting."""

    def __init__(self, connection: Connection) -> None:
        kind = connection.transport.Channel
        self.connection = type("Transport", (), {"client": connection, "default_port": 6379})
        for name in ("connection_class", "connection_class_ssl", "max_connections", *kind.from_transport_options):
            if isinstance(name, str) and hasattr(kind, name):
                setattr(self, name, connection.transport_options.get(name, getattr(kind, name)))
        for name in ("_process_credential_provider", "_prepare_virtual_host", "_filter_tcp_connparams"):
            setattr(self, name, getattr(kind, name).__get__(self))


@pytest.mark.parametrize(
    ("url", "database"),
    [
        ("redis://localhost", 0),
        ("redis://localhost:6379/", 0),
        ("redis://localhost/3", 3),
        ("redis://localhost?db=3", 3),
        ("redis://localhost/3?db=3", 3),
        ("redis://localhost?virtual_host=3", 3),
        ("redis://localhost/%33", 3),
        ("rediss://user:p%40ss@localhost:6380?db=3", 3),
        ("unix:///run/redis.sock", 0),
        ("unix:///run/redis.sock?db=3", 3),
        ("unix:///run/redis.sock?virtual_host=3", 3),
        ("redis+socket:///run/redis.sock?virtual_host=3", 3),
        ("redis+socket://user:pw@/run/redis.sock?db=3", 3),
    ],
)
def test_both_halves_use_one_database(url: str, database: int) -> None:
    ours, theirs = halves(url)
    assert (ours.get("db"), theirs["db"]) == (database, database)
    for name in ("username", "password", "path"):
        assert ours.get(name) == theirs.get(name)


@pytest.mark.parametrize(
    ("query", "requirement", "checks_name"),
    [
        ("", "required", True),
        ("?ssl_cert_reqs=required", "required", True),
        ("?ssl_cert_reqs=CERT_REQUIRED", "required", True),
        ("?ssl_cert_reqs=ssl.CERT_REQUIRED", "required", True),
        ("?ssl_cert_reqs=optional", "optional", True),
        ("?ssl_cert_reqs=CERT_OPTIONAL", "optional", True),
        ("?ssl_cert_reqs=none", "none", False),
        ("?ssl_cert_reqs=CERT_NONE", "none", False),
        ("?ssl_check_hostname=false", "required", False),
        ("?ssl_check_hostname=0", "required", False),
        ("?ssl_check_hostname=True", "required", True),
        (f"?ssl_ca_certs={HERE}&ssl_certfile={HERE}&ssl_keyfile={HERE}", "required", True),
    ],
)
def test_both_halves_verify_alike(query: str, requirement: str, checks_name: bool) -> None:
    for half in halves(f"rediss://localhost:6380/1{query}"):
        assert half["tls"]
        assert (half["ssl_cert_reqs"], half["ssl_check_hostname"]) == (requirement, checks_name)
        for name in ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile"):
            assert half.get(name) == (HERE if name in query else None)


def test_both_halves_look_after_idle_connections_alike() -> None:
    for half in halves("redis://localhost?health_check_interval=25&socket_keepalive=yes"):
        assert (half["health_check_interval"], half["socket_keepalive"]) == (25, True)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("http://localhost", "redis://, rediss://, unix://"),
        ("sentinel://localhost", "redis://, rediss://, unix://"),
        ("redis://localhost/abc", "use a number"),
        ("redis://localhost/0/1", "use a number"),
        ("redis://localhost?db=x", "use a number"),
        ("redis://localhost/1?db=2", "remove one"),
        ("redis://localhost?db=1&db=2", "remove one"),
        ("redis://localhost?decode_responses=true", "the options are db,"),
        ("redis://localhost?Db=1", "did you mean db?"),
        ("redis://localhost?socket_keepaliv=1", "did you mean socket_keepalive?"),
        ("redis://localhost?password=s3cret", "before the host"),
        ("redis://localhost?ssl=true", "rediss://"),
        ("redis://localhost?ssl_cert_reqs=none", "write rediss://"),
        ("unix:///run/redis.sock?ssl_cert_reqs=none", "needs TLS"),
        ("unix://run/redis.sock", "absolute path"),
        ("redis://localhost?socket_timeout=5", "leave it out"),
        ("redis://localhost?socket_connect_timeout=5", "leave it out"),
        ("redis://localhost?health_check_interval=2.5", "1 to 3600"),
        ("redis://localhost?socket_keepalive=perhaps", "true or false"),
        ("rediss://localhost?ssl_cert_reqs=maybe", "required (the default), optional or none"),
        ("rediss://localhost?ssl_cert_reqs=", "required (the default), optional or none"),
        ("rediss://localhost?ssl_check_hostname=perhaps", "true or false"),
        ("rediss://localhost?ssl_ca_certs=/nowhere/ca.crt", "/nowhere/ca.crt"),
        (f"rediss://localhost?ssl_keyfile={HERE}", "set both"),
        ("redis://:s3cret#x@localhost/0", "%23"),
        ("redis://:s3cret/x@localhost/0", "%2F"),
        ("redis://:s3cret@x@localhost/0", "%40"),
    ],
)
def test_what_one_half_would_not_understand_is_refused_with_what_to_write(url: str, words: str) -> None:
    with pytest.raises(ValidationError) as refused:
        Settings(redis_url=url)
    assert words in str(refused.value)
    assert "s3cret" not in str(refused.value)
