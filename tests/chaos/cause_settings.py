"""More of what `causes` does: servers that are set up wrongly, processes with wrong addresses, and tenants' own."""

import socket
import ssl
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import psycopg
import redis
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from tests.chaos.cause_acts import admit_by, restart_with
from tests.chaos.cause_scene import Scene, Undo
from tests.waiting import wait_until

NOBODY = "127.0.0.1:9"  # where nothing listens


def set_postgres(name: str, value: str) -> Callable[[Scene], Undo]:
    def act(scene: Scene) -> Undo:
        def execute(what: str) -> None:
            with scene.plant.connect() as connection:
                connection.execute(f"ALTER SYSTEM {what}")
                connection.execute("SELECT pg_reload_conf()")

        execute(f"SET {name} = {value}")
        return lambda: execute(f"RESET {name}")

    return act


def make_standby(scene: Scene) -> Undo:
    """As the former primary after a failover: it answers, and takes no writes."""
    postgres = scene.plant.postgres
    sign = scene.plant.folder / "postgres/data/standby.signal"
    postgres.stop()
    sign.touch()
    with suppress(psycopg.Error):  # it looks whether it has to create our database
        postgres.start()

    def undo() -> None:
        postgres.stop()
        sign.unlink()
        postgres.start()

    return undo


def ask_for_password(scene: Scene) -> Undo:
    """Which our URL does not have, as after a rotation that left us out."""
    return admit_by(scene, "scram-sha-256")


def set_schema_ahead(scene: Scene) -> Undo:
    """As of the next release, which begins by migrating."""

    def rename(old: str, new: str) -> None:
        with scene.plant.connect() as connection:
            connection.execute("UPDATE alembic_version SET version_num = %s WHERE version_num = %s", (new, old))

    with scene.plant.connect() as connection:
        row = connection.execute("SELECT version_num FROM alembic_version").fetchone()
    assert row is not None
    rename(str(row[0]), "9999")
    return lambda: rename("9999", str(row[0]))


def let_redis_evict(scene: Scene) -> Undo:
    client = scene.plant.redis_client()
    client.config_set("maxmemory", "100mb")
    client.config_set("maxmemory-policy", "allkeys-lru")

    def undo() -> None:
        client.config_set("maxmemory-policy", "noeviction")
        client.config_set("maxmemory", "0")

    return undo


def fail_snapshots(scene: Scene) -> Undo:
    """A folder has the name of its file; Redis then stops to take writes."""
    client, folder = scene.plant.redis_client(), scene.plant.folder / "redis/data/dump.rdb"
    folder.unlink(missing_ok=True)
    folder.mkdir()
    client.config_set("save", "3600 1")

    def has_failed() -> bool:
        with suppress(redis.ResponseError):  # one is under way
            client.bgsave()
        return bool(client.info("persistence")["rdb_last_bgsave_status"] == "err")

    wait_until(has_failed, "a snapshot has failed")

    def undo() -> None:
        folder.rmdir()
        client.config_set("save", "")
        client.bgsave()

    return undo


def use_up_clients(scene: Scene) -> Undo:
    """Whoever was connected has to come back, and finds no place."""
    client = scene.plant.redis_client()
    usual = str(client.config_get("maxclients")["maxclients"])
    client.ping()
    client.config_set("maxclients", "1")
    client.client_kill_filter(skipme=True)
    return lambda: _ignore(client.config_set("maxclients", usual))


def unknown_host(part: str, variable: str) -> Callable[[Scene], Undo]:
    """A name that no server of names knows."""

    def act(scene: Scene) -> Undo:
        urls = {"DATABASE": "postgresql://me@nowhere.invalid/celeriac", "REDIS": "redis://nowhere.invalid:6379/0"}
        return restart_with(part, **{f"CELERIAC_{variable}_URL": urls[variable]})(scene)

    return act


def refuse_archive(scene: Scene) -> Undo:
    """Where nothing listens; and a job that is due for it."""
    undo = restart_with(
        "maintenance",
        CELERIAC_ARCHIVE_URL="s3://jobs/archive",
        AWS_ENDPOINT_URL=f"http://{NOBODY}",
        AWS_ALLOW_HTTP="true",
        AWS_REGION="eu-1",
        AWS_ACCESS_KEY_ID="id",
        AWS_SECRET_ACCESS_KEY="secret",
    )(scene)
    due = """UPDATE jobs SET prune_at = now() WHERE id IN (
        SELECT id FROM jobs WHERE status = 'completed' AND prune_at IS NOT NULL LIMIT 1)"""
    with scene.plant.connect() as connection:
        wait_until(lambda: connection.execute(due).rowcount, "a job has ended")
    return undo


def take_port(scene: Scene) -> Undo:
    """Somebody else listens where an API wants to, when it is started again."""
    [part] = [part for part in scene.plant.parts if part.name == "api-2"]
    part.is_held = True
    part.kill()
    port = int(scene.plant.api_urls[1].rpartition(":")[2])
    taken = wait_until(lambda: _listen(port), "its port is free")
    part.start()
    wait_until(lambda: not part.is_running, "it gives up")

    def undo() -> None:
        taken.close()
        part.is_held = False

    return undo


def _listen(port: int) -> socket.socket | None:
    with suppress(OSError):
        return socket.create_server(("127.0.0.1", port))
    return None


def expire_certificate(variable: str) -> Callable[[Scene], Undo]:
    """`api-1` is led to a server whose certificate was good until yesterday."""

    def act(scene: Scene) -> Undo:
        certificate = _expired_certificate(scene.plant.folder)
        listener = socket.create_server(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        threading.Thread(target=_shake_hands, args=(listener, certificate, variable == "DATABASE"), daemon=True).start()
        urls = {
            "DATABASE": f"postgresql://me@127.0.0.1:{port}/celeriac?sslmode=verify-ca&sslrootcert={certificate}",
            "REDIS": f"rediss://127.0.0.1:{port}/0?ssl_ca_certs={certificate}",
        }
        undo = restart_with("api-1", **{f"CELERIAC_{variable}_URL": urls[variable]})(scene)

        def undo_both() -> None:
            undo()
            listener.close()

        return undo_both

    return act


def _expired_certificate(folder: Path) -> Path:
    """With its key in the same file; its own authority."""
    path, key = folder / "expired.pem", ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=30))
        .not_valid_after(now - timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    kind = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    path.write_bytes(
        certificate.public_bytes(serialization.Encoding.PEM) + key.private_bytes(serialization.Encoding.PEM, *kind)
    )
    path.chmod(0o600)
    return path


def _shake_hands(listener: socket.socket, certificate: Path, is_postgres: bool) -> None:
    """With whoever comes, who will not like the certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    with suppress(OSError):  # closed
        while True:
            client, _ = listener.accept()
            client.settimeout(5)
            with suppress(OSError), client:
                if is_postgres and struct.unpack("!ii", client.recv(8, socket.MSG_WAITALL))[1] == 80877103:
                    client.sendall(b"S")  # TLS it is
                context.wrap_socket(client, server_side=True).close()


def submit(webhook: str | None = None, **params: object) -> Callable[[Scene], Undo]:
    """A job that the fake engine does not survive or has no room for, or whose receiver is away."""

    def act(scene: Scene) -> Undo:
        _submit(scene, webhook=webhook, **params).raise_for_status()
        return lambda: None

    return act


def _submit(scene: Scene, webhook: str | None = None, **params: object) -> httpx.Response:
    body = {"prompt": "A story", "model": "fake", "params": {"max_tokens": 20, **params}}
    body |= {} if webhook is None else {"webhook": webhook}
    return httpx.post(f"{scene.plant.api_urls[0]}/v1/jobs", json=body, timeout=10)


def submits(scene: Scene) -> str:
    return _submit(scene).text


def reads(path: str) -> Callable[[Scene], str]:
    return lambda scene: httpx.get(f"{scene.plant.api_urls[0]}{path}", timeout=10).text


def use_up_a_limit(scene: Scene) -> Undo:
    """Of a tenant, for today."""

    def set_limits(limits: dict[str, int]) -> None:
        url = f"{scene.plant.api_urls[0]}/v1/admin/tenants/default"
        httpx.post(url, json={"limits": limits}, timeout=10).raise_for_status()

    set_limits({"tokens_per_day": 1})
    return lambda: set_limits({})


def _ignore(_: object) -> None:
    return None
