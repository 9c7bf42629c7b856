"""`rediss://` verifies the server in both halves, unless the URL says otherwise."""

import asyncio
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import flower.utils.broker
import pytest
import redis

from local.servers import EmbeddedRedis
from settings import Settings
from tasks.app import make_app
from tests.integration.consumer_harness import Plant
from tests.integration.tls_proxy import TlsProxy, make_certificate

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="makes its certificates with openssl")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("certificates")


@pytest.fixture(scope="module")
def certificate(folder: Path) -> tuple[Path, Path]:
    return make_certificate(folder, "127.0.0.1")


@pytest.fixture
def secured(redis_server: EmbeddedRedis, certificate: tuple[Path, Path]) -> Iterator[str]:
    """The URL of a Redis behind TLS, without a word about certificates."""
    with TlsProxy(*certificate, redis_server.port) as proxy:
        yield redis_server.url.replace("redis://", "rediss://").replace(f":{redis_server.port}/", f":{proxy.port}/")


def redis_py(settings: Settings) -> None:
    with redis.Redis.from_url(settings.redis_url) as client:
        client.ping()


def celery(settings: Settings) -> None:
    with make_app(settings).connection_for_write() as connection:
        connection.channel().client.ping()


def flowers(settings: Settings) -> None:
    conf = make_app(settings).conf
    broker = flower.utils.broker.Broker(
        conf.broker_url, broker_options=conf.broker_transport_options, broker_use_ssl=conf.broker_use_ssl
    )
    asyncio.run(broker.queues(["celeriac.mini"]))


HALVES = pytest.mark.parametrize("connect", [redis_py, celery, flowers])
REFUSED = (redis.exceptions.RedisError, OSError)


@HALVES
def test_a_server_of_an_unknown_authority_is_refused(secured: str, connect: Callable[[Settings], None]) -> None:
    with pytest.raises(REFUSED, match="CERTIFICATE_VERIFY_FAILED"):
        connect(Settings(redis_url=secured))


@HALVES
def test_a_wrong_authority_is_refused(secured: str, folder: Path, connect: Callable[[Settings], None]) -> None:
    stranger, _ = make_certificate(folder, "stranger.example")
    with pytest.raises(REFUSED, match="CERTIFICATE_VERIFY_FAILED"):
        connect(Settings(redis_url=f"{secured}?ssl_ca_certs={stranger}"))


@HALVES
@pytest.mark.parametrize("word", ["", "required", "CERT_REQUIRED"])
def test_a_named_authority_is_enough(
    secured: str, certificate: tuple[Path, Path], connect: Callable[[Settings], None], word: str
) -> None:
    connect(Settings(redis_url=f"{secured}?ssl_ca_certs={certificate[0]}" + (f"&ssl_cert_reqs={word}" if word else "")))


@HALVES
def test_the_name_is_checked_unless_the_url_says_otherwise(
    redis_server: EmbeddedRedis, folder: Path, connect: Callable[[Settings], None]
) -> None:
    other, key = make_certificate(folder, "other.example")
    with TlsProxy(other, key, redis_server.port) as proxy:
        url = redis_server.url.replace("redis://", "rediss://").replace(f":{redis_server.port}/", f":{proxy.port}/")
        with pytest.raises(REFUSED, match="CERTIFICATE_VERIFY_FAILED"):
            connect(Settings(redis_url=f"{url}?ssl_ca_certs={other}"))
        connect(Settings(redis_url=f"{url}?ssl_ca_certs={other}&ssl_check_hostname=false"))
        connect(Settings(redis_url=f"{url}?ssl_cert_reqs=CERT_NONE"))


def test_a_worker_runs_jobs_over_tls(tmp_path: Path, secured: str, certificate: tuple[Path, Path]) -> None:
    plant = Plant(tmp_path, f"{secured}?ssl_cert_reqs=CERT_REQUIRED&ssl_ca_certs={certificate[0]}")
    try:
        plant.start_worker()
        job_ids = plant.send(3)
        plant.wait_for("claimed", job_ids)
        assert plant.inspect("engine_stats")["running"] == 3
        plant.end_all()
        plant.wait_for("completed", job_ids)
    finally:
        plant.close()
