"""How many threads a step of a single row gets: as few as are as fast as all of them. Free of torch.

One row is multiplied as fast as memory delivers the weights, which half of the cores often manage as well as all. The
other half is then left to the API, the database and the worker, which otherwise take a core away from a thread that
all others wait for (docs/adr/0045).
"""

from math import inf

TRIAL_STEPS = 4  # with each of the two numbers
PERIOD_STEPS = 256  # then both are tried again, since other processes come and go
AS_FAST = 1.1  # times the seconds of a step with all threads


class LoneRowThreads:
    def __init__(self, num_threads: int) -> None:
        self._candidates = num_threads, max(1, num_threads // 2)
        self._least_seconds = [inf, inf]  # of a step in this period's trials
        self._num_steps = 0  # in this period

    @property
    def num_threads(self) -> int:
        """For the next step of one row."""
        all_threads, half = self._candidates
        trial = self._num_steps // TRIAL_STEPS
        if trial < len(self._candidates):
            return self._candidates[trial]
        return half if self._least_seconds[1] <= AS_FAST * self._least_seconds[0] else all_threads

    def note(self, seconds: float) -> None:
        """Call after each step of one row, with how long it took."""
        trial = self._num_steps // TRIAL_STEPS
        if trial < len(self._candidates):
            self._least_seconds[trial] = min(self._least_seconds[trial], seconds)
        self._num_steps += 1
        if self._num_steps == PERIOD_STEPS:
            self._num_steps, self._least_seconds = 0, [inf, inf]
