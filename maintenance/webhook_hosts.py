"""How much each receiving host is given at a time, so that one that is slow or down takes nothing from the others."""

from collections import Counter

MAX_PER_HOST = 16
NUM_FAILURES_TO_OPEN = 3  # in a row, without any HTTP answer
REST_SECONDS = 30.0


class Hosts:
    """Attempts in hand per host, and a circuit breaker for those that do not answer: after a few failures in a row a
    host rests, and is then tried with one attempt at a time until it answers. `clock` readings are monotonic."""

    def __init__(self) -> None:
        self._num_in_hand: Counter[str] = Counter()
        self._num_failures: Counter[str] = Counter()
        self._rests_until: dict[str, float] = {}

    def begin(self, host: str) -> None:
        self._num_in_hand[host] += 1

    def end(self, host: str, clock: float, *, has_answered: bool) -> None:
        self._num_in_hand[host] -= 1
        if not self._num_in_hand[host]:
            del self._num_in_hand[host]
        if has_answered:
            self._num_failures.pop(host, None)
            self._rests_until.pop(host, None)
            return
        self._num_failures[host] += 1
        if self._num_failures[host] >= NUM_FAILURES_TO_OPEN:
            self._rests_until[host] = clock + REST_SECONDS

    def rooms(self, clock: float) -> dict[str, int]:
        """How many more attempts each host may be given; those that are missing may have MAX_PER_HOST."""
        self._forget(clock)
        rooms = {host: max(0, MAX_PER_HOST - num) for host, num in self._num_in_hand.items()}
        for host, until in self._rests_until.items():
            rooms[host] = 0 if clock < until or self._num_in_hand[host] else 1
        return rooms

    def _forget(self, clock: float) -> None:
        """What was last heard of long ago: the hosts of the world are many."""
        for host in [host for host, until in self._rests_until.items() if clock > until + 10 * REST_SECONDS]:
            del self._rests_until[host]
            self._num_failures.pop(host, None)
