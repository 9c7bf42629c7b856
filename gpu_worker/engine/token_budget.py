"""How many tokens a step may hold: less after the device ran out of memory, then slowly more again (AIMD)."""

STEPS_PER_RISE = 64  # steps without a shortage for each sixteenth of the budget that comes back
RISES_TO_FULL = 16


class TokenBudget:
    def __init__(self, full: int, floor: int = 16) -> None:
        self._full = full
        self._floor = min(floor, full)
        self._num_good_steps = 0
        self.tokens = full

    @property
    def is_least(self) -> bool:
        return self.tokens == self._floor

    def shrink(self) -> None:
        self.tokens = max(self._floor, self.tokens // 2)
        self._num_good_steps = 0

    def count_good_step(self) -> None:
        self._num_good_steps += 1
        if self._num_good_steps % STEPS_PER_RISE == 0:
            self.tokens = min(self._full, self.tokens + max(1, self._full // RISES_TO_FULL))
