"""Owns the engine process: has it forked, watches it, reports how it ended, and restarts it.

The supervisor runs in the runner's thread, and blocks it only briefly, when a process starts or ends.
"""

import logging
import os
import signal
import socket
from dataclasses import dataclass
from time import monotonic

import msgspec

from domain.catalog import ModelSpec
from gpu_worker.engine_process.frames import (
    AddJob,
    CannotLoad,
    Command,
    EmbedJob,
    EndEngine,
    FrameSocket,
    Loading,
    PeerClosed,
    Ready,
    Report,
    StepDone,
    decode_report,
    encode,
)
from gpu_worker.engine_process.signs_of_life import (
    RECORDER_BYTES,
    FlightRecorder,
    Pulse,
    RecordedJob,
    SignsOfLife,
    create_memory,
)
from gpu_worker.engine_process.template import EngineTemplate

log = logging.getLogger(__name__)

LINGER_SECONDS = 5.0  # how long a process may live on after closing its connection, for instance to dump core
SHUTDOWN_SECONDS = 3.0  # how long the current step may take before the process is killed
REAP_SECONDS = 30.0  # how long a killed process may take to end, since the driver first frees the GPU's memory
FIRST_BACKOFF_SECONDS = 0.2
MAX_BACKOFF_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class EngineExit:
    """How an engine process ended that had not been told to."""

    exit_code: int  # or minus the number of the signal that killed it
    was_killed_by_us: bool
    was_ready: bool
    last_step: list[RecordedJob]
    killed_because: str = "it was silent"  # set if it was killed by us
    why_not_loaded: str | None = None  # set if the engine reported that the model cannot be loaded

    @property
    def is_outside_kill(self) -> bool:
        """Whether somebody else sent it SIGKILL: an operator, or the kernel's OOM killer. No job can do that by
        itself."""
        return self.exit_code == -signal.SIGKILL and not self.was_killed_by_us

    @property
    def description(self) -> str:
        if self.why_not_loaded is not None:
            return "it could not load the model"
        if self.was_killed_by_us:
            return f"killed because {self.killed_because}"
        if self.exit_code < 0:
            return f"killed by {signal.Signals(-self.exit_code).name}"
        return f"exit code {self.exit_code}"


class EngineProcess:
    """One engine process, from its fork to its end."""

    def __init__(self, template: EngineTemplate, *, heartbeat_seconds: float) -> None:
        ours, theirs = socket.socketpair()
        memory_fd = create_memory()
        self.recorder = FlightRecorder(memory_fd)
        self._pulse = Pulse(memory_fd, offset=RECORDER_BYTES)
        self.frame_socket = FrameSocket(ours)
        self._template = template
        with theirs:
            template.fork(theirs.fileno(), memory_fd)
        os.close(memory_fd)
        self.started_at = monotonic()
        self.signs = SignsOfLife(self._pulse, heartbeat_seconds=heartbeat_seconds, now=self.started_at)
        self.load_share: float | None = None
        self.ready: Ready | None = None
        self.why_not_loaded: str | None = None
        self.has_had_jobs = False
        self.was_killed_by_us = False
        self.killed_because = ""
        self.closed_at: float | None = None  # when the connection was closed; the process ends shortly after

    @property
    def pid(self) -> int | None:
        """None until the engine has been forked."""
        self._template.wait(0)
        return self._template.engine_pid

    def has_ended(self, *, within_seconds: float = 0) -> bool:
        return self._template.wait(within_seconds) is not None

    def send(self, command: Command) -> None:
        self.has_had_jobs |= isinstance(command, AddJob | EmbedJob)
        try:
            self.frame_socket.send(encode(command))
        except PeerClosed:
            self._note_closed()

    def flush(self) -> None:
        try:
            self.frame_socket.flush()
        except PeerClosed:
            self._note_closed()

    def receive(self) -> list[Report]:
        """All reports that have arrived."""
        if self.closed_at is not None:
            return []
        try:
            reports = [decode_report(frame) for frame in self.frame_socket.receive()]
        except PeerClosed:
            self._note_closed()
            return []
        except msgspec.DecodeError:
            log.exception("the engine sent a frame that cannot be decoded; killing it")
            self._note_closed()
            self.kill("it sent a frame that cannot be decoded")
            return []
        for report in reports:
            if isinstance(report, Loading):
                self.load_share = report.share
            if isinstance(report, Ready):
                self.ready = report
            if isinstance(report, CannotLoad):
                self.why_not_loaded = report.reason
            step_seconds = report.stats.step_seconds if isinstance(report, StepDone) else 0.0
            self.signs.hear(monotonic(), step_seconds=step_seconds)
        return reports

    def kill(self, reason: str) -> None:
        self.was_killed_by_us, self.killed_because = True, reason
        self._template.kill_engine()

    def abandon(self) -> None:
        """Kill the engine together with its template, which did not report how the engine ended."""
        self.was_killed_by_us, self.killed_because = True, "its template did not report how it ended"
        self._template.kill()

    def end(self) -> EngineExit:
        """Wait for the process, which has ended or is about to, and free its resources. Returns how it ended."""
        exit_code = self._template.wait(REAP_SECONDS)
        if exit_code is None:
            self.abandon()
            exit_code = self._template.wait(None)
        assert exit_code is not None
        last_step = self.recorder.read()
        self.recorder.close()
        self._pulse.close()
        self.frame_socket.close()
        return EngineExit(
            exit_code,
            self.was_killed_by_us,
            self.ready is not None,
            last_step,
            self.killed_because,
            self.why_not_loaded or self._why_never_forked(exit_code),
        )

    def _why_never_forked(self, exit_code: int) -> str | None:
        """An interpreter that ends by itself before there is an engine would do so again."""
        if self._template.engine_pid is not None or self.was_killed_by_us or exit_code == -signal.SIGKILL:
            return None
        how = f"exit code {exit_code}" if exit_code >= 0 else signal.Signals(-exit_code).name
        return f"the engine's interpreter ended during its imports, by {how}; its last lines in the log say why"

    def _note_closed(self) -> None:
        self.closed_at = self.closed_at or monotonic()


class Supervisor:
    """Keeps one engine process running. The owner must call `watch` a few times a second and after every report."""

    def __init__(self, spec: ModelSpec, *, heartbeat_seconds: float, load_seconds: float = 1800.0) -> None:
        """`load_seconds` limits the time for loading the model; it is generous, since loading can legitimately be
        slow."""
        self._load_seconds = load_seconds
        self._spec = spec
        self._heartbeat_seconds = heartbeat_seconds
        self._template: EngineTemplate | None = None  # started with the first engine
        self._engine: EngineProcess | None = None
        self._start_at = 0.0  # monotonic time at which the next process may start
        self._watched_at = monotonic()
        self._is_loadable = True  # until an engine reports that it cannot load the model

    @property
    def ready(self) -> Ready | None:
        """The engine's report that it is ready for jobs; None while there is no such engine."""
        return self._engine.ready if self._engine is not None and self._engine.closed_at is None else None

    @property
    def load_share(self) -> float | None:
        """How far the model has been loaded, from 0 to 1; None if the engine has not told, or is not loading."""
        return self._engine.load_share if self._engine is not None and self.ready is None else None

    @property
    def doubt(self) -> str | None:
        """What looks wrong with the engine, though not enough to kill it yet."""
        return self._engine.signs.doubt if self._engine is not None and self.ready is not None else None

    @property
    def has_engine(self) -> bool:
        """Whether there is an engine process, whatever its state."""
        return self._engine is not None

    @property
    def is_fresh(self) -> bool:
        """Whether the engine has not had any jobs yet."""
        return self._engine is not None and not self._engine.has_had_jobs

    def readers(self) -> list[FrameSocket]:
        """The sockets to wait on for reports."""
        return [self._engine.frame_socket] if self._engine is not None and self._engine.closed_at is None else []

    def send(self, command: Command) -> None:
        """Send to the engine. Dropped if there is none; `watch` reports its exit."""
        if self._engine is not None:
            self._engine.send(command)

    def flush(self) -> None:
        if self._engine is not None:
            self._engine.flush()

    def receive(self) -> list[Report]:
        return self._engine.receive() if self._engine is not None else []

    def watch(self, now: float) -> EngineExit | None:
        """Start the engine when it is due, kill it if it hangs, and return its exit, once, when it has ended.

        All reports of that engine have been received by then. The caller must then call `plan_restart`. After an engine
        that could not load its model, no other engine is started before `stop` is called.
        """
        if self._engine is None:
            if self._is_loadable and now >= self._start_at:
                self._engine = EngineProcess(self._living_template(), heartbeat_seconds=self._heartbeat_seconds)
            return None
        self._look_after(self._engine, now)
        if not self._has_ended(self._engine, now):
            return None
        engine, self._engine = self._engine, None
        exit_ = engine.end()
        self._is_loadable = exit_.why_not_loaded is None
        return exit_

    def plan_restart(self, num_crashes_before: int) -> None:
        """Schedule the next engine: immediately after a single crash, with growing delays after repeated ones."""
        backoff = FIRST_BACKOFF_SECONDS * 2 ** (num_crashes_before - 1) if num_crashes_before else 0.0
        self._start_at = monotonic() + min(backoff, MAX_BACKOFF_SECONDS)

    def restart(self) -> None:
        """Replace the engine, which must not be running any jobs, with a fresh one: `watch` starts that. Blocks
        briefly. Its template stays, so that the next engine need not repeat the imports."""
        self._end_engine()
        self._start_at = 0.0

    def stop(self) -> None:
        """Ask the engine to exit, kill it if it does not, and end its template. Blocks briefly; further reports are
        lost."""
        self._end_engine()
        self._is_loadable = True
        if self._template is not None:
            self._template.close()
            self._template = None

    def _end_engine(self) -> None:
        if self._engine is None:
            return
        engine, self._engine = self._engine, None
        engine.send(EndEngine())
        # An engine does not read commands while it is loading its model.
        if engine.ready is None or not engine.has_ended(within_seconds=SHUTDOWN_SECONDS):
            engine.kill("it did not exit when told to")
        engine.end()

    def _living_template(self) -> EngineTemplate:
        if self._template is not None and not self._template.is_alive:
            self._template.close()
            self._template = None
        if self._template is None:
            self._template = EngineTemplate(self._spec, heartbeat_seconds=self._heartbeat_seconds)
        return self._template

    def _look_after(self, engine: EngineProcess, now: float) -> None:
        """Kill the engine if it hangs."""
        if now - self._watched_at > self._heartbeat_seconds:
            engine.signs.hear(now)  # we were suspended ourselves, so the silence does not tell anything
        self._watched_at = now
        reason = None
        if engine.ready is not None:
            reason = engine.signs.judge(now, engine.pid)
        elif now - engine.started_at > self._load_seconds:
            reason = f"it had not loaded its model after {self._load_seconds:.0f} s"
        if reason is not None and not engine.was_killed_by_us:
            log.error("killing the engine: %s", reason, extra={"pid": engine.pid})
            engine.kill(reason)

    def _has_ended(self, engine: EngineProcess, now: float) -> bool:
        """Whether the process is gone and everything that it sent has been read."""
        if engine.closed_at is None:
            return False
        if engine.has_ended():
            return True
        if now - engine.closed_at > LINGER_SECONDS:
            engine.abandon()
        return False
