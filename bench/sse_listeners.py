"""Thousands of readers of server-sent events in a process of their own, which parse next to nothing.

    python -m bench.sse_listeners --port 8000 --paths paths.txt --connections 10000 --slow 100

Opens connections at a steady pace, says `open` when each has had its first event, and from a line on standard input
until the next one notes how late each text arrives that begins with `t` and the nanoseconds of CLOCK_MONOTONIC at which
it was sent. Slow ones read nothing at all after their head. Whoever is cut off comes back at once with the last id that
it has seen; that each id follows on the one before is checked throughout. Prints one JSON line.
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

DELTA = re.compile(rb'id: (\d+)\nevent: output.delta\ndata: [^\n]*?"text":"(?:t(\d+))?')
PER_ADDRESS = 5_000  # connections; one address has some 28,000 ports for those to one server
RETRY_SECONDS = 0.2
READ_BYTES = 65_536
LITTLE = 4_096  # the receive buffer of a slow one


@dataclass(slots=True)
class Listener:
    path: str
    address: str
    is_slow: bool
    began_at: float
    rest: bytes = b""
    last_id: int = 0
    is_open: bool = False


class Listeners:
    def __init__(self, port: int, paths: list[str]) -> None:
        self._address = ("127.0.0.1", port)
        self._paths = paths
        self._selector = selectors.DefaultSelector()
        self._is_measuring = False
        self.num_open = 0
        self.num_closed = 0
        self.num_wrong = 0  # events whose id does not follow on the one before
        self.lags = array("d")
        self.waits = array("d")  # from each connect to the first event
        self._later: list[Listener] = []  # to be connected again
        self._num_all = 0
        self._lost_at = self._back_at = 0.0  # when the first was cut off, and when the last was back

    @property
    def seconds_until_back(self) -> float:
        return round(max(0.0, self._back_at - self._lost_at), 1) if self._lost_at else 0.0

    def open_all(self, num: int, slow_paths: list[str], num_slow: int, per_second: float) -> None:
        began_at, self._num_all = time.monotonic(), num + num_slow
        for number in range(num + num_slow):
            is_slow, address = number >= num, f"127.0.0.{1 + number // PER_ADDRESS}"
            path = slow_paths[number % len(slow_paths)] if is_slow else self._paths[number % len(self._paths)]
            self._open(Listener(path, address, is_slow, time.monotonic()))
            while number > (time.monotonic() - began_at) * per_second:
                self.turn(0.01)
        while self.num_open < self._num_all:
            self.turn(0.1)

    def measure_until_told(self) -> None:
        self._selector.register(sys.stdin, selectors.EVENT_READ)
        while self.turn(1.0):
            pass

    def turn(self, timeout: float) -> bool:
        """False after the second line on standard input."""
        again, self._later = self._later, []
        for listener in again:
            self._open(listener)
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

    def _open(self, listener: Listener) -> None:
        connection = socket.socket()
        connection.setsockopt(socket.IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1)
        if listener.is_slow:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, LITTLE)
        connection.bind((listener.address, 0))
        head = f"GET {listener.path} HTTP/1.1\r\nHost: 127.0.0.1\r\nAccept: text/event-stream\r\n"
        head += f"Last-Event-ID: {listener.last_id}\r\n" if listener.last_id else ""
        try:
            connection.connect(self._address)
            connection.sendall(f"{head}\r\n".encode())
        except OSError:  # the server is away
            connection.close()
            self._later.append(listener)
            time.sleep(RETRY_SECONDS)
            return
        connection.setblocking(False)
        self._selector.register(connection, selectors.EVENT_READ, listener)

    def _receive(self, connection: socket.socket, listener: Listener) -> None:
        try:
            data = connection.recv(READ_BYTES)
        except ConnectionError:
            data = b""
        if not data:
            self._lose(connection, listener)
            return
        now = time.monotonic_ns()
        data = listener.rest + data
        if not listener.is_open:
            self._begin(connection, listener, data)
        end = data.rfind(b"\n\n")
        listener.rest = data[end + 2 :] if end >= 0 else data
        for number, sent_at in DELTA.findall(data, 0, max(end, 0)):
            self.num_wrong += int(number) != listener.last_id + 1
            listener.last_id = int(number)
            if self._is_measuring and sent_at:
                self.lags.append((now - int(sent_at)) / 1e9)

    def _begin(self, connection: socket.socket, listener: Listener, data: bytes) -> None:
        if not data.startswith(b"HTTP/1.1 200"):
            raise SystemExit(f"refused: {data[:300]!r}")
        if listener.is_slow:
            self._selector.unregister(connection)
            _kept.append(connection)
        elif b"\nevent: " not in data:
            return
        listener.is_open = True
        self.num_open += 1
        self.waits.append(time.monotonic() - listener.began_at)
        if self.num_open == self._num_all:
            self._back_at = time.monotonic()

    def _lose(self, connection: socket.socket, listener: Listener) -> None:
        self._selector.unregister(connection)
        connection.close()
        self.num_closed += 1
        self._lost_at = self._lost_at or time.monotonic()
        self.num_open -= listener.is_open
        listener.rest, listener.is_open, listener.began_at = b"", False, time.monotonic()
        self._later.append(listener)


_kept: list[socket.socket] = []

IP_BIND_ADDRESS_NO_PORT = 24  # of Linux: a port is chosen when both ends are known


def shares_ms(values: "array[float]") -> dict[str, float]:
    found = sorted(values)
    shares = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
    return {
        name: round(1000 * found[min(len(found) - 1, int(share * len(found)))], 1) for name, share in shares.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--paths", type=Path, required=True)
    parser.add_argument("--connections", type=int, required=True)
    parser.add_argument("--slow", type=int, default=0)
    parser.add_argument("--slow-paths", type=Path)
    parser.add_argument("--per-second", type=float, default=1_000.0)
    given = parser.parse_args()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    listeners = Listeners(given.port, given.paths.read_text().split())
    began_at = time.monotonic()
    slow_paths = given.slow_paths.read_text().split() if given.slow_paths else []
    listeners.open_all(given.connections, slow_paths, given.slow, given.per_second)
    opened_after, opening = time.monotonic() - began_at, shares_ms(listeners.waits)
    print(f"open {opened_after:.1f}", flush=True)
    cpu_before = time.process_time()
    listeners.measure_until_told()
    report = {
        "events": len(listeners.lags),
        "lag_ms": shares_ms(listeners.lags),
        "wrong": listeners.num_wrong,
        "closed": listeners.num_closed,
        "back_after_s": listeners.seconds_until_back,
        "opened_after_s": round(opened_after, 1),
        "first_event_ms": opening,
        "readers_cpu_seconds": round(time.process_time() - cpu_before, 2),
    }
    print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
