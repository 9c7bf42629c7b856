"""Owns the engine process: has it forked, watches its heartbeat, tells how it ended and in whose step, restarts it.

Belongs to the runner's thread and never blocks it, but for the moments of starting and ending a process.
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
    Channel,
    ChannelClosed,
    Command,
    EmbedJob,
    Ready,
    Report,
    Shutdown,
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

LINGER_SECONDS = 5.0  # between the end of the channel and the end of the process: a core dump is written
SHUTDOWN_SECONDS = 3.0  # the running step may end before the process is killed
REAP_SECONDS = 30.0  # of a process that is killed: a GPU's memory is given back
FIRST_BACKOFF_SECONDS = 0.2
MAX_BACKOFF_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class EngineExit:
    """How an engine process ended, unasked."""

    exit_code: int  # of the process; minus the signal that killed it
    was_killed_by_us: bool  # because it had fallen silent, or spoke nonsense
    was_ready: bool
    last_step: list[RecordedJob]
    killed_because: str = "it fell silent"  # where it was killed by us
    why_not_loaded: str | None = None  # where the engine itself said that the model cannot be loaded

    @property
    def is_outside_kill(self) -> bool:
        """SIGKILL, and not by us: an operator, or the kernel out of memory. No job can do it by itself."""
        return self.exit_code == -signal.SIGKILL and not self.was_killed_by_us

    @property
    def description(self) -> str:
        if self.why_not_loaded is not None:
            return "it could not load the model"
        if self.was_killed_by_us:
            return f"killed, since {self.killed_because}"
        if self.exit_code < 0:
            return f"killed by {signal.Signals(-self.exit_code).name}"
        return f"exit code {self.exit_code}"


class EngineProcess:
    """One incarnation of the engine."""

    def __init__(self, template: EngineTemplate, *, heartbeat_seconds: float) -> None:
        ours, theirs = socket.socketpair()
        memory_fd = create_memory()
        self.recorder = FlightRecorder(memory_fd)
        self._pulse = Pulse(memory_fd, offset=RECORDER_BYTES)
        self.channel = Channel(ours)
        self._template = template
        with theirs:
            template.fork(theirs.fileno(), memory_fd)
        os.close(memory_fd)
        self.started_at = monotonic()
        self.signs = SignsOfLife(self._pulse, heartbeat_seconds=heartbeat_seconds, now=self.started_at)
        self.ready: Ready | None = None
        self.why_not_loaded: str | None = None
        self.has_had_jobs = False
        self.was_killed_by_us = False
        self.killed_because = ""
        self.closed_at: float | None = None  # when the channel ended; the process follows

    @property
    def pid(self) -> int | None:
        """None until it is forked."""
        self._template.wait(0)
        return self._template.engine_pid

    def has_ended(self, *, within_seconds: float = 0) -> bool:
        return self._template.wait(within_seconds) is not None

    def send(self, command: Command) -> None:
        self.has_had_jobs |= isinstance(command, AddJob | EmbedJob)
        try:
            self.channel.send(encode(command))
        except ChannelClosed:
            self._note_closed()

    def flush(self) -> None:
        try:
            self.channel.flush()
        except ChannelClosed:
            self._note_closed()

    def receive(self) -> list[Report]:
        """Every report that has arrived."""
        if self.closed_at is not None:
            return []
        try:
            reports = [decode_report(frame) for frame in self.channel.receive()]
        except ChannelClosed:
            self._note_closed()
            return []
        except msgspec.DecodeError:
            log.exception("the engine speaks nonsense and is killed")
            self._note_closed()
            self.kill("it speaks nonsense")
            return []
        for report in reports:
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
        """Kill it with its template, which may be why nobody tells how it ended."""
        self.was_killed_by_us, self.killed_because = True, "nobody told how it ended"
        self._template.kill()

    def end(self) -> EngineExit:
        """Learn how the process ended, which it has or is about to, and free what it used."""
        exit_code = self._template.wait(REAP_SECONDS)
        if exit_code is None:
            self.abandon()
            exit_code = self._template.wait(None)
        assert exit_code is not None
        last_step = self.recorder.read()
        self.recorder.close()
        self._pulse.close()
        self.channel.close()
        return EngineExit(
            exit_code,
            self.was_killed_by_us,
            self.ready is not None,
            last_step,
            self.killed_because,
            self.why_not_loaded,
        )

    def _note_closed(self) -> None:
        self.closed_at = self.closed_at or monotonic()


class Supervisor:
    """Keeps one engine process running. `watch` is to be called a few times a second, and after every report."""

    def __init__(self, spec: ModelSpec, *, heartbeat_seconds: float, load_seconds: float = 1800.0) -> None:
        """`load_seconds` bounds a load, which may be slow for many good reasons."""
        self._load_seconds = load_seconds
        self._spec = spec
        self._heartbeat_seconds = heartbeat_seconds
        self._template: EngineTemplate | None = None  # from the first engine on
        self._engine: EngineProcess | None = None
        self._start_at = 0.0  # when the next process may start
        self._watched_at = monotonic()
        self._is_loadable = True  # until an engine says that it is not

    @property
    def ready(self) -> Ready | None:
        """What the engine said of itself; None while there is none that takes jobs."""
        return self._engine.ready if self._engine is not None and self._engine.closed_at is None else None

    @property
    def has_engine(self) -> bool:
        """There is an engine process, whatever it is at."""
        return self._engine is not None

    @property
    def is_fresh(self) -> bool:
        """The engine has had no job yet."""
        return self._engine is not None and not self._engine.has_had_jobs

    def readers(self) -> list[Channel]:
        """What to wait on for reports."""
        return [self._engine.channel] if self._engine is not None and self._engine.closed_at is None else []

    def send(self, command: Command) -> None:
        """To the engine; into the void while there is none, whose end `watch` will report."""
        if self._engine is not None:
            self._engine.send(command)

    def flush(self) -> None:
        if self._engine is not None:
            self._engine.flush()

    def receive(self) -> list[Report]:
        return self._engine.receive() if self._engine is not None else []

    def watch(self, now: float) -> EngineExit | None:
        """Start the engine when it is time, kill it when it hangs, and tell once when it has ended; call `plan_restart`
        then. All its reports have been received by that time. After an engine that cannot load its model there is no
        other."""
        if self._engine is None:
            if self._is_loadable and now >= self._start_at:
                self._engine = EngineProcess(self._living_template(), heartbeat_seconds=self._heartbeat_seconds)
            return None
        self._look_after(self._engine, now)
        if not self._has_ended(self._engine, now):
            return None
        engine, self._engine = self._engine, None
        self._is_loadable = engine.why_not_loaded is None
        return engine.end()

    def plan_restart(self, num_crashes_before: int) -> None:
        """At once after a single crash, later when they pile up."""
        backoff = FIRST_BACKOFF_SECONDS * 2 ** (num_crashes_before - 1) if num_crashes_before else 0.0
        self._start_at = monotonic() + min(backoff, MAX_BACKOFF_SECONDS)

    def restart(self) -> None:
        """Replace the engine by a fresh one. It must not have jobs."""
        self._end_engine()
        self._start_at = 0.0

    def stop(self) -> None:
        """End the engine, kindly first, and its template. Blocks for a moment; what it still reports is lost."""
        self._end_engine()
        if self._template is not None:
            self._template.close()
            self._template = None

    def _end_engine(self) -> None:
        if self._engine is None:
            return
        engine, self._engine = self._engine, None
        engine.send(Shutdown())
        # It listens only once it is loaded.
        if engine.ready is None or not engine.has_ended(within_seconds=SHUTDOWN_SECONDS):
            engine.kill("it did not end when it was told to")
        engine.end()

    def _living_template(self) -> EngineTemplate:
        if self._template is not None and not self._template.is_alive:
            self._template.close()
            self._template = None
        if self._template is None:
            self._template = EngineTemplate(self._spec, heartbeat_seconds=self._heartbeat_seconds)
        return self._template

    def _look_after(self, engine: EngineProcess, now: float) -> None:
        """Kill it where it is hung."""
        if now - self._watched_at > self._heartbeat_seconds:
            engine.signs.hear(now)  # we were away ourselves, and have heard nothing because we did not listen
        self._watched_at = now
        reason = None
        if engine.ready is not None:
            reason = engine.signs.judge(now, engine.pid)
        elif now - engine.started_at > self._load_seconds:
            reason = f"it was not loaded after {self._load_seconds:.0f} s"
        if reason is not None and not engine.was_killed_by_us:
            log.error("the engine is killed: %s", reason, extra={"pid": engine.pid})
            engine.kill(reason)

    def _has_ended(self, engine: EngineProcess, now: float) -> bool:
        """The process is gone and its channel is read to the end."""
        if engine.closed_at is None:
            return False
        if engine.has_ended():
            return True
        if now - engine.closed_at > LINGER_SECONDS:
            engine.abandon()
        return False
