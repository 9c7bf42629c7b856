"""A certificate that is verified is named before it expires."""

import shutil
import socket
import threading
from pathlib import Path

import pytest

from domain.addresses import RedisUrl
from local.servers import EmbeddedRedis
from storage import certificates
from storage.certificates import ASK_FOR_TLS, VerifiedServer
from tests.integration.tls_proxy import TlsProxy, make_certificate

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="makes its certificates with openssl")


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Good for two days."""
    return make_certificate(tmp_path_factory.mktemp("certificates"), "127.0.0.1")


def test_that_of_redis(redis_server: EmbeddedRedis, certificate: tuple[Path, Path]) -> None:
    with TlsProxy(*certificate, redis_server.port) as proxy:
        url = f"rediss://127.0.0.1:{proxy.port}/0"
        server = certificates.redis_server(RedisUrl.read(f"{url}?ssl_ca_certs={certificate[0]}"))
        assert server is not None
        assert server.expires_soon() == "the certificate of Redis expires in 2 days"
        assert certificates.redis_server(RedisUrl.read(f"{url}?ssl_cert_reqs=none")) is None, "it may be of any age"
        stranger = certificates.redis_server(RedisUrl.read(url))
        assert stranger is not None
        assert stranger.expires_soon() is None, "which a connection would tell"
    assert server.expires_soon() is None, "nothing listens there"


def test_that_of_postgresql(redis_server: EmbeddedRedis, certificate: tuple[Path, Path]) -> None:
    """It asks for TLS first."""
    with TlsProxy(*certificate, redis_server.port) as proxy, socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            client, _ = listener.accept()
            assert client.recv(len(ASK_FOR_TLS), socket.MSG_WAITALL) == ASK_FOR_TLS
            client.sendall(b"S")
            proxy._serve(client)

        serving = threading.Thread(target=serve)
        serving.start()
        port = listener.getsockname()[1]
        server = VerifiedServer("PostgreSQL", "127.0.0.1", port, ASK_FOR_TLS, str(certificate[0]), None, None)
        assert server.expires_soon() == "the certificate of PostgreSQL expires in 2 days"
        serving.join()


def test_postgresql_is_verified_by_what_libpq_finds_without_being_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tmp_path / ".postgresql"
    folder.mkdir()
    (folder / "root.crt").touch()
    told = {"sslmode": "verify-full"}
    for more, expected in ((told, str(folder / "root.crt")), ({"sslrootcert": "/a.crt"}, "/a.crt")):
        server = certificates.verified_postgres(told | more, "db", 5432)
        assert server is not None
        assert (server.authorities, server.own_certificate) == (expected, None)
