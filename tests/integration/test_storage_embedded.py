"""The embedded servers keep their data, come back after a crash, and never outlive or disturb anybody."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import psutil
import psycopg
import pytest
import redis

from local.servers import EmbeddedPostgres, EmbeddedRedis, EmbeddedServer, EmbeddedServerError
from storage.database import migrate
from storage.row_security import GAP
from tests.databases import TABLES
from tests.waiting import SECONDS


def kill(server: EmbeddedServer) -> None:
    assert server.pid is not None
    process = psutil.Process(server.pid)
    process.kill()
    process.wait()


def test_postgres_keeps_its_data_over_a_crash_and_a_restart(server_folder: Path) -> None:
    server = EmbeddedPostgres(server_folder / "crash" / "postgres")
    with psycopg.connect(server.start(), autocommit=True) as connection:
        connection.execute("CREATE TABLE kept AS SELECT 7 AS n")
    kill(server)
    assert not server.is_running
    url = server.start()  # its stale pid file lies there
    server.stop()
    with EmbeddedPostgres(server.folder) as again, psycopg.connect(again.url) as connection:
        assert again.url == url
        assert connection.execute("SELECT n, current_setting('fsync') FROM kept").fetchone() == (7, "on")


def test_what_an_older_release_made_as_superuser_is_given_to_our_role(server_folder: Path) -> None:
    server = EmbeddedPostgres(server_folder / "older" / "postgres")
    with server, psycopg.connect(server.url_of("postgres"), autocommit=True) as connection:
        connection.execute("DROP DATABASE celeriac")
        connection.execute("DROP ROLE celeriac")
        connection.execute("CREATE DATABASE celeriac")
        migrate(server.url_of("celeriac"))
        with psycopg.connect(server.url_of("celeriac")) as older:
            assert older.execute(GAP).fetchone() == ("postgres is a superuser",)
    with EmbeddedPostgres(server.folder) as again, psycopg.connect(again.url) as connection:
        assert connection.execute(GAP).fetchone() == (None,)
        assert connection.execute("SELECT pg_has_role('pg_signal_backend', 'USAGE')").fetchone() == (True,)
        drops = [f"DROP TABLE {name} CASCADE" for (name,) in connection.execute(TABLES).fetchall()]
        functions = "SELECT oid::regprocedure FROM pg_proc WHERE pronamespace = 'public'::regnamespace"
        drops += [f"DROP FUNCTION {name} CASCADE" for (name,) in connection.execute(functions).fetchall()]
        assert len(drops) > 30
        for drop in drops:  # nothing is refused, so a later migration may change whatever it wants to
            connection.execute(drop)
        connection.rollback()


def test_redis_keeps_its_data_over_a_crash_and_a_restart(server_folder: Path) -> None:
    server = EmbeddedRedis(server_folder / "crash" / "redis")
    url = server.start()
    with redis.Redis.from_url(url) as client:
        client.set("kept", "7")
        assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
    kill(server)
    assert server.start() == url
    with redis.Redis.from_url(url) as client:
        assert client.get("kept") == b"7"
    server.stop()


def test_redis_wants_its_password(redis_server: EmbeddedRedis) -> None:
    with (
        redis.Redis(port=redis_server.port) as client,
        pytest.raises(redis.AuthenticationError),
    ):
        client.ping()


def test_a_folder_in_use_is_refused(redis_server: EmbeddedRedis) -> None:
    with pytest.raises(EmbeddedServerError, match="in use"):
        EmbeddedRedis(redis_server.folder).start()
    assert redis_server.is_running


def test_a_stopped_servers_folder_is_free_though_a_child_still_holds_its_files(server_folder: Path) -> None:
    server = EmbeddedRedis(server_folder / "forked")
    with server:
        assert server._lock.file is not None
        held = os.dup(server._lock.file.fileno())  # as a fork does, until its exec
    with server:
        assert server.is_running
    os.close(held)


def test_a_server_that_cannot_start_says_why(tmp_path: Path, redis_server: EmbeddedRedis) -> None:
    server = EmbeddedRedis(tmp_path, port=redis_server.port)
    with pytest.raises(EmbeddedServerError, match="Address already in use"):
        server.start()
    assert not server.is_running


def test_the_servers_end_with_their_owner(server_folder: Path) -> None:
    folder = server_folder / "owner"
    script = f"""
        import sys
        from pathlib import Path
        from local.servers import EmbeddedPostgres, EmbeddedRedis
        folder = Path({str(folder)!r})
        postgres, server = EmbeddedPostgres(folder / "postgres"), EmbeddedRedis(folder / "redis")
        postgres.start(), server.start()
        print(postgres.pid, server.pid, flush=True)
        sys.stdin.read()
    """
    owner = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert owner.stdout is not None
    servers = [psutil.Process(int(pid)) for pid in owner.stdout.readline().split()]
    assert len(servers) == 2
    os.kill(owner.pid, signal.SIGKILL)
    owner.communicate()
    psutil.wait_procs(servers, timeout=SECONDS)
    assert not any(server.is_running() and server.status() != psutil.STATUS_ZOMBIE for server in servers)


def test_what_an_owner_left_behind_is_stopped_before_the_next_start(tmp_path: Path) -> None:
    first = EmbeddedRedis(tmp_path)
    first.start()
    assert first.pid is not None
    leftover = psutil.Process(first.pid)
    first._lock.release()  # as its owner's death does, while the server is still ending
    with EmbeddedRedis(tmp_path) as second:
        assert second.is_running
        assert not leftover.is_running() or leftover.status() == psutil.STATUS_ZOMBIE
    first.stop()
