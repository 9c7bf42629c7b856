"""How other threads speak to a thread that waits on sockets: callbacks in order, and a socket that wakes it."""

import socket
from collections import deque
from collections.abc import Callable


class Mailbox:
    """`post` from any thread; everything else on the owner's."""

    def __init__(self) -> None:
        self._callbacks: deque[Callable[[], None]] = deque()
        self._ours, self._theirs = socket.socketpair()
        self._ours.setblocking(False)
        self._theirs.setblocking(False)

    def fileno(self) -> int:
        """Readable when something was posted."""
        return self._ours.fileno()

    def post(self, callback: Callable[[], None]) -> None:
        self._callbacks.append(callback)
        try:
            self._theirs.send(b"!")
        except OSError:
            pass  # full: the owner has long been woken; or closed: nobody will come

    def run_all(self) -> None:
        """Run everything posted so far, in order."""
        try:
            while self._ours.recv(4096):
                pass
        except BlockingIOError:
            pass
        while self._callbacks:
            self._callbacks.popleft()()

    def close(self) -> None:
        self._ours.close()
        self._theirs.close()
