"""`celeriac api --processes`: several API processes on one port of one machine.

Each has a listening socket of its own on that port, among which Linux divides new connections (SO_REUSEPORT), so that
all get about as many; of one socket for all, whoever is quickest would take most, and keep them if they are streams.
The sockets are opened here and stay open here, so that connections to a process that has died wait for the one that
takes its place. Each process also listens on a port that it shares with nobody, where its /metrics are
(docs/adr/0029).
"""

import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import NamedTuple, NoReturn

from api.connections import open_socket
from local.lifetime import end_with_parent
from local.processes import free_port

log = logging.getLogger(__name__)

LOOK_SECONDS = 0.2

SHORT_SECONDS = 10.0  # a process that lives no longer counts as one that cannot start

MAX_SHORT_LIVES = 5  # of all processes, one after another

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)


class Ports(NamedTuple):
    """Where a group of processes listens."""

    shared: int
    own: Sequence[int]


class ApiProcesses:
    """Those of one command; they end with it. `run` returns when all have ended."""

    def __init__(
        self, host: str, port: int, number: int, serve: Callable[[Sequence[socket.socket], Ports], None]
    ) -> None:
        """Opens the sockets. `serve` is called in each process with its own. Raises OSError."""
        self._serve = serve
        shared = [open_socket(host, port, is_shared=True)]
        port = shared[0].getsockname()[1]  # 0 stands for any
        shared += [open_socket(host, port, is_shared=True) for _ in range(number - 1)]
        own: list[socket.socket] = []
        for one in shared:
            wanted = (own[-1] if own else one).getsockname()[1] + 1
            own.append(open_socket(host, free_port(host, wanted)))
        self._sockets = list(zip(shared, own, strict=True))
        self._ports = Ports(port, [one.getsockname()[1] for one in own])
        self._number_by_pid: dict[int, int] = {}
        self._began_at: dict[int, float] = {}  # by number
        self._num_short_lives = 0
        self._is_stopping = False

    def run(self) -> int:
        """The exit code: 1 if the processes could not stay alive."""
        for signal_number in SIGNALS:
            signal.signal(signal_number, self._pass_on)
        for number in range(len(self._sockets)):
            self._start(number)
        while self._number_by_pid:
            self._replace_the_dead()
            time.sleep(LOOK_SECONDS)
        return int(self._num_short_lives >= MAX_SHORT_LIVES)

    def _start(self, number: int) -> None:
        """Does nothing once all are told to stop."""
        with _undisturbed():  # until each knows what to do with a signal
            if self._is_stopping:
                return
            log.info("process %d listens on port %d, too, alone", number + 1, self._ports.own[number])
            self._began_at[number] = time.monotonic()
            parent_pid = os.getpid()
            pid = os.fork()
            if pid:
                self._number_by_pid[pid] = number
            else:
                self._be_child(number, parent_pid)

    def _be_child(self, number: int, parent_pid: int) -> NoReturn:
        os.setsid()  # Ctrl-C reaches it once, from its parent
        for signal_number in SIGNALS:
            signal.signal(signal_number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        end_with_parent(parent_pid, signal.SIGTERM)
        self._close_sockets(but=number)
        self._serve(self._sockets[number], self._ports)
        sys.exit(0)

    def _replace_the_dead(self) -> None:
        while self._number_by_pid:
            with _undisturbed():  # or a signal would be passed on to one that is not there any more
                pid, status = os.waitpid(-1, os.WNOHANG)
                if not pid:
                    return
                number = self._number_by_pid.pop(pid)
            if not self._is_stopping:
                self._replace(number, os.waitstatus_to_exitcode(status))

    def _replace(self, number: int, code: int) -> None:
        is_short = time.monotonic() - self._began_at[number] < SHORT_SECONDS
        self._num_short_lives = self._num_short_lives + 1 if is_short else 0
        if self._num_short_lives >= MAX_SHORT_LIVES:
            log.error("API processes end soon after their start, the last one with exit code %d; giving up", code)
            self._pass_on(signal.SIGTERM, None)
        else:
            log.warning("API process %d ended with exit code %d; another one takes its place", number + 1, code)
            self._start(number)

    def _pass_on(self, signal_number: int, _: FrameType | None) -> None:
        self._is_stopping = True
        self._close_sockets()  # or connections would wait here for nobody
        for pid in self._number_by_pid:
            os.kill(pid, signal_number)

    def _close_sockets(self, *, but: int | None = None) -> None:
        for number, sockets in enumerate(self._sockets):
            if number != but:
                for one in sockets:
                    one.close()


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Signals wait for the end of it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
