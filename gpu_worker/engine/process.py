"""Main of the engine process: a loop around a back end that takes command frames and sends report frames.

gpu_worker/engine_process/template.py starts a template as `python -m gpu_worker.engine.child`, in the environment that
the model's entry names; every engine is a fork of it. Only the back end may need more than a few light packages. One
thread does the work; another only counts beats, so that the supervisor can tell a slow step from a hung process.
"""

import contextlib
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from time import monotonic
from typing import Literal

import msgspec

from domain.catalog import ModelSpec
from domain.errors import CeleriacError, EngineError
from gpu_worker.engine import load_progress
from gpu_worker.engine.backends import Backend, StepMember, import_backend
from gpu_worker.engine.child import missing_package
from gpu_worker.engine_process.frames import (
    AbortJob,
    AddJob,
    CannotLoad,
    Command,
    EmbedJob,
    EndEngine,
    FrameSocket,
    JobFailed,
    JobReturned,
    Loading,
    PauseJob,
    PeerClosed,
    Ready,
    Report,
    StepDone,
    StillAlive,
    decode_command,
    encode,
)
from gpu_worker.engine_process.signs_of_life import RECORDER_BYTES, FlightRecorder, Pulse, RecordedJob, start_beating
from gpu_worker.engine_process.template import fork_engines
from observability import configure_logging

log = logging.getLogger(__name__)

PATIENCE_SECONDS = 0.25  # a live worker reads something within this time
LOOK_AGAIN_SECONDS = 0.02
MAX_REASON_CHARS = 500


class EngineLoop:
    """Applies commands, runs steps while there is work, and reports each step in one frame.

    Pauses when the worker stops reading: a frozen worker loses its leases, so further tokens would be wasted.
    """

    def __init__(
        self,
        backend: Backend,
        frame_socket: FrameSocket,
        recorder: FlightRecorder,
        pulse: Pulse,
        *,
        heartbeat_seconds: float,
    ) -> None:
        self._backend = backend
        self._frame_socket = frame_socket
        self._recorder = recorder
        self._pulse = pulse
        self._heartbeat_seconds = heartbeat_seconds
        self._num_unread = 0  # bytes that the worker had not read right after the last report was sent
        self._read_at = monotonic()  # the worker has read something at this time or later
        self._num_steps_by_job: dict[tuple[str, int], int] = {}  # for the jobs of the last step
        self._failures: list[JobFailed] = []  # jobs that `add` refused; sent with the next step's frame
        self._returned: list[JobReturned] = []  # paused jobs; likewise
        self._is_shut_down = False

    def run(self) -> None:
        """Run until an EndEngine arrives. Raises PeerClosed when the worker is gone."""
        while not self._is_shut_down:
            is_ahead = self._is_far_ahead()
            if is_ahead:
                self._frame_socket.wait_readable(LOOK_AGAIN_SECONDS)
            elif not self._backend.has_work and not self._frame_socket.wait_readable(self._heartbeat_seconds):
                self._beat()
            frames = self._frame_socket.receive()
            for frame in frames:
                self._apply(decode_command(frame))
            if is_ahead:
                continue
            if self._backend.has_work or self._failures or self._returned:
                self._step()
            elif frames:
                self._beat()  # an abort without a reason has no output, but changes the statistics

    def _is_far_ahead(self) -> bool:
        return monotonic() - self._read_at > PATIENCE_SECONDS and not self._is_being_read()

    def _is_being_read(self) -> bool:
        """Whether the worker has read anything since the last report was sent."""
        num_unread = self._frame_socket.num_unread
        return num_unread == 0 or num_unread < self._num_unread

    def _apply(self, command: Command) -> None:
        match command:
            case AddJob():
                self._add(command, lambda: self._backend.add(command))
            case EmbedJob():
                self._add(command, lambda: self._backend.embed(command))
            case AbortJob():
                self._backend.abort(command.job_id, command.attempt, command.reason)
            case PauseJob():
                self._backend.abort(command.job_id, command.attempt, "")
                self._returned.append(JobReturned(command.job_id, command.attempt))
            case EndEngine():
                self._is_shut_down = True

    def _add(self, command: AddJob | EmbedJob, add: Callable[[], None]) -> None:
        self._recorder.record([RecordedJob(command.job_id, command.attempt, is_prefill=True, num_steps=0)])
        try:
            add()
        except CeleriacError as exc:
            self._fail(command, exc)
        except Exception as exc:
            # One job that breaks the back end must not take the others down.
            log.exception("the back end could not add a job", extra={"job_id": command.job_id})
            self._fail(command, EngineError(f"the engine could not start the job: {type(exc).__name__}"))

    def _fail(self, command: AddJob | EmbedJob, failure: CeleriacError) -> None:
        self._failures.append(JobFailed(command.job_id, command.attempt, failure.code, failure.message))

    def _step(self) -> None:
        self._pulse.count_step()
        if self._backend.has_work:
            done = self._backend.step(self._record_step)
        else:
            done = StepDone(outputs=[], failures=[], stats=self._backend.stats())
        failures, self._failures = self._failures, []
        returned, self._returned = self._returned, []
        self._send(
            msgspec.structs.replace(done, failures=[*failures, *done.failures], returned=[*returned, *done.returned])
        )
        if not self._backend.has_work:
            self._record_step([])

    def _beat(self) -> None:
        self._send(StillAlive(stats=self._backend.stats()))

    def _record_step(self, members: Sequence[StepMember]) -> None:
        before = self._num_steps_by_job
        self._num_steps_by_job = {
            (member.job_id, member.attempt): before.get((member.job_id, member.attempt), 0) + 1 for member in members
        }
        self._recorder.record(
            [
                RecordedJob(
                    member.job_id,
                    member.attempt,
                    is_prefill=member.phase == "prefill",
                    num_steps=self._num_steps_by_job[member.job_id, member.attempt],
                )
                for member in members
            ]
        )

    def _send(self, report: Report) -> None:
        if self._is_being_read():
            self._read_at = monotonic()
        self._frame_socket.send(encode(report))
        self._frame_socket.flush_all()
        self._num_unread = self._frame_socket.num_unread


def volunteer_for_the_oom_killer() -> None:
    """If the machine runs out of memory, let the kernel kill this process first: restarting the engine costs least."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")


def run_template(
    spec_json: str,
    control: socket.socket,
    *,
    heartbeat_seconds: float,
    log_level: str,
    log_format: Literal["json", "text"],
) -> None:
    """In the template: import the back end, fork engines. In each engine: run it to its end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C drains the worker, which then ends its engine
    configure_logging(log_level, log_format)
    spec = ModelSpec.model_validate_json(spec_json)
    # Read when CUDA starts: otherwise passes of varying sizes would fragment the memory.
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    make_backend = _import_without_cuda(spec)
    socket_fd, recorder_fd = fork_engines(control)
    volunteer_for_the_oom_killer()
    recorder = FlightRecorder(recorder_fd)
    pulse = Pulse(recorder_fd, offset=RECORDER_BYTES)
    start_beating(pulse, heartbeat_seconds=heartbeat_seconds)
    frame_socket = FrameSocket(socket.socket(fileno=socket_fd))
    load_progress.listen(lambda share: _tell_progress(frame_socket, share))
    try:
        backend = make_backend(spec)
    except Exception as exc:
        log.exception("the model cannot be loaded", extra={"model": spec.id})
        _send_last(frame_socket, CannotLoad(_describe(exc)))
        sys.exit(1)
    frame_socket.send(encode(_ready(spec, backend)))
    frame_socket.flush_all()
    try:
        EngineLoop(
            backend,
            frame_socket,
            recorder,
            pulse,
            heartbeat_seconds=heartbeat_seconds,
        ).run()
    except PeerClosed:
        log.warning("the worker is gone; the engine exits as well")


def _import_without_cuda(spec: ModelSpec) -> Callable[[ModelSpec], Backend]:
    """Import the back end without initialising CUDA, which would not survive a fork. torch asks NVML instead when a
    module looks for GPUs while it is being imported.

    If the import fails, the engine gets a function that raises the error, because the engine can report it.
    """
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    try:
        return import_backend(spec)
    except Exception as exc:
        failure = exc
    finally:
        del os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"]

    def fail(_: ModelSpec) -> Backend:
        raise failure

    return fail


def _tell_progress(frame_socket: FrameSocket, share: float) -> None:
    with contextlib.suppress(PeerClosed):  # the worker is gone; the end of the load will show that
        frame_socket.send(encode(Loading(share)))


def _send_last(frame_socket: FrameSocket, report: Report) -> None:
    with contextlib.suppress(PeerClosed):
        frame_socket.send(encode(report))
        frame_socket.flush_all()


def _describe(exc: Exception) -> str:
    """The error in one line of limited length. Its type is included unless it is an error that users can fix."""
    if isinstance(exc, ImportError):
        return missing_package(exc)
    text = " ".join(str(exc).split())[:MAX_REASON_CHARS]
    return text if text and isinstance(exc, CeleriacError | OSError | ValueError) else f"{type(exc).__name__}: {text}"


def _ready(spec: ModelSpec, backend: Backend) -> Ready:
    return Ready(
        model=spec.id,
        backend=spec.backend,
        device=backend.loaded.device,
        max_num_seqs=spec.max_num_seqs,
        max_model_len=spec.max_model_len,
        num_cache_tokens=backend.loaded.num_cache_tokens,
        keeps_prefixes=backend.loaded.keeps_prefixes,
        pid=os.getpid(),
    )
