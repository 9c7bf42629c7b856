"""Fetches the models that administrators have asked for over HTTP, each with a child process: `celeriac models pull`.

So the same checks apply as on the command line, nothing is fetched on an event loop, and a pull is cancelled by killing
the child, which leaves nothing behind but a hidden folder that the next pull removes.
"""

import contextlib
import json
import logging
import signal
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass, field
from typing import IO, Any
from uuid import UUID, uuid4

from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session, sessionmaker

from local.lifetime import ending_with_us
from storage import model_pulls
from storage.model_pulls import ModelPull, Progress, PullStatus

log = logging.getLogger(__name__)

MAX_REASON_LENGTH = 2000


@dataclass
class Child:
    """One pull and the process that does it; a thread reads what it reports."""

    name: str
    process: subprocess.Popen[str]
    errors: IO[str]
    progress: Progress = field(default_factory=Progress)

    def __post_init__(self) -> None:
        threading.Thread(target=self._read, name="model-pull-output", daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with contextlib.suppress(ValueError, KeyError, TypeError):  # a line of some library's, or the last one
                said: dict[str, Any] = json.loads(line)
                self.progress = Progress(said["step"], said["bytes"], said["total_bytes"])

    @property
    def reason(self) -> str:
        """Why it failed, in one line of its own words."""
        self.errors.seek(0)
        lines = [line for line in self.errors.read().splitlines() if line.strip()]
        said = next((line for line in reversed(lines) if line.startswith("Error: ")), lines[-1] if lines else "")
        text = said.removeprefix("Error: ") or f"the pull ended with {self.process.returncode}; ask for it again"
        return text.replace("\0", "")[:MAX_REASON_LENGTH]

    def kill(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(timeout=2)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class ModelPuller:
    """Call `tick` regularly and `close` at the end, all on one thread, since its child ends with that."""

    def __init__(self, sessions: sessionmaker[Session]) -> None:
        self._sessions = sessions
        self._owner: UUID = uuid4()
        self._child: Child | None = None

    def tick(self) -> None:
        if self._child is None:
            pull = self._claim()
            self._child = None if pull is None else _start(pull)
        elif self._child.process.poll() is None:
            self._report(self._child)
        else:
            self._end(self._child)

    def close(self) -> None:
        """Give a running pull back: another process begins it again, or the next one here."""
        if self._child is not None:
            self._child.kill()
            self._finish(self._child, PullStatus.QUEUED)

    def _claim(self) -> ModelPull | None:
        try:
            with self._sessions.begin() as session:
                pull = model_pulls.claim(session, self._owner)
                if pull is not None:
                    session.expunge(pull)
                return pull
        except IntegrityError:  # another process has just claimed one
            return None

    def _report(self, child: Child) -> None:
        with self._sessions.begin() as session:
            goes_on = model_pulls.report(session, child.name, self._owner, child.progress)
        if not goes_on:
            child.kill()
            self._finish(child, PullStatus.CANCELLED)

    def _end(self, child: Child) -> None:
        if child.process.returncode == 0:
            self._finish(child, PullStatus.COMPLETED)
        else:
            self._finish(child, PullStatus.FAILED, child.reason)

    def _finish(self, child: Child, status: PullStatus, reason: str | None = None) -> None:
        with self._sessions.begin() as session:
            model_pulls.end(session, child.name, self._owner, status, reason)
        self._child = None
        child.errors.close()
        log.info("a pull has ended", extra={"model": child.name, "status": status.value, "reason": reason})


def _start(pull: ModelPull) -> Child:
    command = [sys.executable, "-m", "celeriac", "models", "pull", pull.source, "--name", pull.name, "--json"]
    command += ["--accept-licence"] if pull.accepts_licence else []
    log.info("a pull begins", extra={"model": pull.name, "source": pull.source})
    errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115  (closed when the pull ends)
    process = subprocess.Popen(
        ending_with_us(command),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=errors,
        text=True,
        errors="replace",
    )
    return Child(pull.name, process, errors)
