"""Thousands of readers of server-sent events in a process of their own, which parse next to nothing.

    python -m bench.sse_listeners --port 8000 --paths paths.txt --connections 10000 --slow 100

Opens connections at a steady pace, says `open` when each has its answer's head, and from a line on standard input until
the next one notes how late each text arrives that begins with `t` and the nanoseconds of CLOCK_MONOTONIC at which it
was sent. Slow ones read nothing at all after their head. Prints one JSON line.
"""

import argparse
import json
import re
import resource
import selectors
import socket
import sys
import time
from array import array
from dataclasses import dataclass
from pathlib import Path

SENT_AT = re.compile(rb'"text":"t(\d+)')
PER_SECOND = 1_000
READ_BYTES = 65_536
LITTLE = 4_096  # the receive buffer of a slow one


@dataclass(slots=True)
class Listener:
    is_slow: bool
    rest: bytes = b""
    has_head: bool = False


class Listeners:
    def __init__(self, port: int, paths: list[str]) -> None:
        self._address = ("127.0.0.1", port)
        self._paths = paths
        self._selector = selectors.DefaultSelector()
        self._is_measuring = False
        self.num_open = 0
        self.num_closed = 0
        self.lags = array("d")

    def open_all(self, num: int, num_slow: int) -> None:
        began_at = time.monotonic()
        for number in range(num + num_slow):
            self._open(self._paths[number % len(self._paths)], is_slow=number >= num)
            while number > (time.monotonic() - began_at) * PER_SECOND:
                self.turn(0.01)
        while self.num_open < num + num_slow:
            self.turn(0.1)

    def measure_until_told(self) -> None:
        self._selector.register(sys.stdin, selectors.EVENT_READ)
        while self.turn(1.0):
            pass

    def turn(self, timeout: float) -> bool:
        """False after the second line on standard input."""
        for key, _ in self._selector.select(timeout):
            if key.data is None:  # the standard input
                sys.stdin.readline()
                if self._is_measuring:
                    return False
                self._is_measuring = True
            else:
                assert isinstance(key.fileobj, socket.socket)
                self._receive(key.fileobj, key.data)
        return True

    def _open(self, path: str, *, is_slow: bool) -> None:
        connection = socket.socket()
        if is_slow:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, LITTLE)
        connection.connect(self._address)
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nAccept: text/event-stream\r\n\r\n".encode())
        connection.setblocking(False)
        self._selector.register(connection, selectors.EVENT_READ, Listener(is_slow))

    def _receive(self, connection: socket.socket, listener: Listener) -> None:
        data = connection.recv(READ_BYTES)
        now = time.monotonic_ns()
        if not data:
            self._selector.unregister(connection)
            connection.close()
            self.num_closed += 1
            return
        if not listener.has_head:
            if not data.startswith(b"HTTP/1.1 200"):
                raise SystemExit(f"refused: {data[:300]!r}")
            listener.has_head = True
            self.num_open += 1
            if listener.is_slow:
                self._selector.unregister(connection)
                _kept.append(connection)
                return
        if not self._is_measuring:
            return
        data = listener.rest + data
        end = data.rfind(b"\n\n")
        listener.rest = data[end + 2 :] if end >= 0 else data
        for sent_at in SENT_AT.findall(data, 0, max(end, 0)):
            self.lags.append((now - int(sent_at)) / 1e9)


_kept: list[socket.socket] = []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--paths", type=Path, required=True)
    parser.add_argument("--connections", type=int, required=True)
    parser.add_argument("--slow", type=int, default=0)
    given = parser.parse_args()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    listeners = Listeners(given.port, given.paths.read_text().split())
    began_at = time.monotonic()
    listeners.open_all(given.connections, given.slow)
    print(f"open {time.monotonic() - began_at:.1f}", flush=True)
    cpu_before = time.process_time()
    listeners.measure_until_told()
    lags = sorted(listeners.lags)
    shares = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
    lag_ms = {name: round(1000 * lags[min(len(lags) - 1, int(share * len(lags)))], 1) for name, share in shares.items()}
    cpu_seconds = round(time.process_time() - cpu_before, 2)
    report = {"events": len(lags), "lag_ms": lag_ms, "closed": listeners.num_closed, "cpu_seconds": cpu_seconds}
    print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
