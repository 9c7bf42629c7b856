"""How much memory this machine has left for us: what Linux reports, or else all that is built in. Free of torch."""

import mmap
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from gpu_worker.engine.control_groups import groups


@dataclass(frozen=True, slots=True)
class GroupFiles:
    """The names that one version of control groups gives to its files, and to a line of its `memory.stat`."""

    limit: str
    usage: str
    reclaimable: str


GROUP_FILES_BY_VERSION = {
    2: GroupFiles("memory.max", "memory.current", "inactive_file"),
    1: GroupFiles("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def available_bytes(root: Path = Path("/")) -> int:
    """Memory available to this process: the host's, or what is left in any of our control groups if that is less.

    In both cases, file pages that the kernel can reclaim count as available
    (https://docs.kernel.org/filesystems/proc.html, MemAvailable; https://docs.kernel.org/admin-guide/cgroup-v2.html).
    `root` is the directory that holds `proc` and `sys`.
    """
    return max(0, min([_of_host(root), *_left_by_groups(root)]))


def anonymous_bytes(root: Path = Path("/")) -> int:
    """Resident memory of this process that is not backed by a file; 0 if the kernel does not report it."""
    return _kibibytes(root / "proc/self/status").get("RssAnon", 0)


def lazy_zeros(num_bytes: int) -> mmap.mmap:
    """Anonymous memory, which the kernel zeroes page by page when it is first touched."""
    return mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def _of_host(root: Path) -> int:
    available = _kibibytes(root / "proc/meminfo").get("MemAvailable")
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if available is None else available


def _left_by_groups(root: Path) -> Iterator[int]:
    for folder, version in groups(root, "memory"):
        files = GROUP_FILES_BY_VERSION[version]
        with suppress(OSError, ValueError):  # no memory controller here, or the limit is "max"
            limit = int((folder / files.limit).read_text())
            usage = int((folder / files.usage).read_text())
            stat = (folder / "memory.stat").read_text().splitlines()
            reclaimable = next((int(line.split()[1]) for line in stat if line.startswith(f"{files.reclaimable} ")), 0)
            yield limit - usage + reclaimable


def _kibibytes(path: Path) -> Mapping[str, int]:
    """The lines `name: number kB` of a file in /proc, in bytes."""
    sizes: dict[str, int] = {}
    with suppress(OSError):
        for line in path.read_text().splitlines():
            name, _, value = line.partition(":")
            if value.endswith(" kB"):
                sizes[name] = int(value.removesuffix(" kB")) * 1024
    return sizes
