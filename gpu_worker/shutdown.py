"""How a GPU worker ends: drained with heartbeats, inspect and revoke alive, or at once with its jobs released.

Celery's own warm shutdown stops its event loop first, and its cold one cancels requests; both are replaced. Signal
handlers only start a thread: the main thread may hold any lock when a signal arrives.
"""

import os
import signal
from threading import Thread
from time import monotonic, sleep
from types import FrameType
from typing import TYPE_CHECKING

from celery.utils.log import get_logger
from celery.worker import state

from gpu_worker.runner_events import WorkerFailure
from settings import get_settings

if TYPE_CHECKING:
    from gpu_worker.pool import EnginePool

logger = get_logger(__name__)

EXIT_OK, EXIT_FAILURE = 0, 1
EXIT_LASTING = os.EX_CONFIG  # sysexits.h: to whoever supervises, a restart is of no use before something is mended
_GRACE_SECONDS = 10.0  # beyond the drain: the runner releases and reports what still ran
_POLL_SECONDS = 0.05


class Shutdown:
    """One per worker. The first SIGTERM or SIGINT drains; a second one, or SIGQUIT, releases everything at once."""

    def __init__(self, pool: "EnginePool") -> None:
        self._pool = pool
        self._is_draining = False

    def install(self) -> None:
        """Take the signals over from Celery. Main thread, after Celery installed its own handlers."""
        for signal_number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signal_number, self._on_stop_signal)
        signal.signal(signal.SIGQUIT, self._on_quit_signal)

    def drain(self, reason: str, *, release_after_seconds: float | None = None) -> None:
        """Let running jobs end, then end the worker. `reason` is for the log. Returns at once; any thread."""
        if self._is_draining:
            return
        self._is_draining = True
        seconds = get_settings().drain_seconds if release_after_seconds is None else release_after_seconds
        Thread(target=self._drain, args=(reason, seconds), name="drain", daemon=True).start()

    def fail(self, failure: WorkerFailure) -> None:
        """The engine cannot be kept alive: end the worker, so that whoever supervises it starts a fresh one, or stops
        trying. Its jobs are released already. Any thread."""
        logger.critical("leaving: %s", failure.reason)
        state.should_stop = EXIT_LASTING if failure.is_lasting else EXIT_FAILURE
        self._pool.wake_hub()

    def _on_stop_signal(self, signal_number: int, _: FrameType | None) -> None:
        name = signal.Signals(signal_number).name
        if self._is_draining:
            self._begin_quit(f"{name} while draining")
        else:
            self.drain(name)

    def _on_quit_signal(self, signal_number: int, _: FrameType | None) -> None:
        self._begin_quit(signal.Signals(signal_number).name)

    def _begin_quit(self, reason: str) -> None:
        Thread(target=self._quit, args=(reason,), name="quit", daemon=True).start()

    def _drain(self, reason: str, release_after_seconds: float) -> None:
        logger.warning("draining on %s, then leaving: running jobs have %.0f seconds", reason, release_after_seconds)
        self._pool.begin_drain(release_after_seconds=release_after_seconds)
        deadline = monotonic() + release_after_seconds + _GRACE_SECONDS
        while not self._pool.is_drained:
            if monotonic() > deadline:
                logger.error("the drain did not end in time; releasing what is left")
                break
            sleep(_POLL_SECONDS)
        state.should_stop = EXIT_OK
        self._pool.wake_hub()

    def _quit(self, reason: str) -> None:
        logger.warning("leaving at once on %s: running jobs go back to the queue", reason)
        state.should_terminate = EXIT_OK
        self._pool.wake_hub()
        self._pool.stop_runner()  # not left to the main thread, which may be waiting for a broker that is down
