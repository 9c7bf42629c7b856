"""What the kernel counts of its OOM killer: it tells a SIGKILL that memory explains from one that somebody sent."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

OWN_CGROUPS = Path("/proc/self/cgroup")
CGROUP_ROOT = Path("/sys/fs/cgroup")
HOST_COUNTERS = Path("/proc/vmstat")
COUNTER = "oom_kill"  # of processes killed, by that name in both files


class OomKills:
    """Of our own control group and those below it (cgroup v2), else of the whole host."""

    def __init__(self, paths: Sequence[Path] | None = None) -> None:
        self._paths = [*_own_group(), HOST_COUNTERS] if paths is None else paths
        self._num_seen = self._count()

    def is_possible(self) -> bool:
        """Whether the OOM killer has killed since this was last asked; True where nobody counts."""
        num_before, self._num_seen = self._num_seen, self._count()
        return self._num_seen is None or self._num_seen != num_before

    def _count(self) -> int | None:
        for path in self._paths:
            with suppress(OSError):
                words_by_line = [line.split() for line in path.read_text().splitlines()]
                return next((int(words[1]) for words in words_by_line if words[:1] == [COUNTER]), None)
        return None


def _own_group() -> list[Path]:
    """`memory.events` of the group that we and the engine are in; the root group has none."""
    with suppress(OSError):
        groups = [line.removeprefix("0::/") for line in OWN_CGROUPS.read_text().splitlines() if line.startswith("0::/")]
        return [CGROUP_ROOT / group / "memory.events" for group in groups]
    return []
