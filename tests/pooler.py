"""A PgBouncer in front of a database, with its default settings, all but the mode, for tests and for chaos runs."""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Self

import psycopg
import pytest
from sqlalchemy.engine import make_url

from local.lifetime import ending_with_us
from local.processes import free_port
from tests.waiting import wait_until

PGBOUNCER = shutil.which("pgbouncer") or shutil.which("pgbouncer", path="/usr/sbin")

needs_pgbouncer = pytest.mark.skipif(PGBOUNCER is None, reason="needs a pgbouncer on PATH")


class Pooler:
    """`url` is that of the same database behind it; in transaction mode it says so."""

    def __init__(self, direct_url: str, mode: str, *, num_servers: int = 20) -> None:
        assert PGBOUNCER is not None
        url = make_url(direct_url)
        self._folder, self.port = Path(tempfile.mkdtemp(prefix="celeriac-pooler-")), free_port("127.0.0.1", 0)
        self._folder.chmod(0o755)
        (self._folder / "pgbouncer.ini").write_text(
            f"[databases]\n{url.database} = host={url.query['host']} user={url.username}\n[pgbouncer]\n"
            f"listen_addr = 127.0.0.1\nlisten_port = {self.port}\nunix_socket_dir =\nauth_type = any\n"
            f"pool_mode = {mode}\ndefault_pool_size = {num_servers}\n"
            "query_wait_timeout = 30\n"
        )
        self.bare_url = f"postgresql://{url.username}@127.0.0.1:{self.port}/{url.database}"
        self.url = f"{self.bare_url}?pool_mode=transaction" if mode == "transaction" else self.bare_url
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        assert PGBOUNCER is not None
        command = [PGBOUNCER, str(self._folder / "pgbouncer.ini")]
        user = "nobody" if os.geteuid() == 0 else ""  # it refuses to run as root
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(ending_with_us(command, user=user), stdout=log, stderr=log)
        wait_until(self._answers, f"pgbouncer answers; its log is {self._folder / 'log'}")

    def kill(self) -> None:
        """All connections through it are gone."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def _answers(self) -> bool:
        try:
            psycopg.connect(self.bare_url, autocommit=True, connect_timeout=2).close()
        except psycopg.OperationalError:
            return False
        return True

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.kill()
        shutil.rmtree(self._folder)
