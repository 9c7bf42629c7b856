"""How much memory this machine has left for us, and memory that is taken page by page, as it is used. Free of torch.

Linux counts what is left; where nobody does, it is all that the machine was built with.
"""

import mmap
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class GroupFiles:
    """What a version of control groups calls its files, and a line of its `memory.stat`."""

    limit: str
    usage: str
    reclaimable: str


GROUP_FILES_BY_VERSION = {
    2: GroupFiles("memory.max", "memory.current", "inactive_file"),
    1: GroupFiles("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def available_bytes(root: Path = Path("/")) -> int:
    """The least of what the host has available and what each of our control groups leaves us. Pages of files that the
    kernel would give up count as available, in both (https://docs.kernel.org/filesystems/proc.html, MemAvailable;
    https://docs.kernel.org/admin-guide/cgroup-v2.html). `root` is that of the files read."""
    return max(0, min([_of_host(root), *_left_by_groups(root)]))


def anonymous_bytes(root: Path = Path("/")) -> int:
    """Resident memory of this process that no file stands behind; 0 where nobody counts."""
    return _kibibytes(root / "proc/self/status").get("RssAnon", 0)


def lazy_zeros(num_bytes: int) -> mmap.mmap:
    """Zeroed by the kernel, page by page, when they are first touched."""
    return mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def _of_host(root: Path) -> int:
    available = _kibibytes(root / "proc/meminfo").get("MemAvailable")
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if available is None else available


def _left_by_groups(root: Path) -> Iterator[int]:
    for folder, files in _groups(root):
        with suppress(OSError, ValueError):  # no such controller here, or "max"
            limit = int((folder / files.limit).read_text())
            usage = int((folder / files.usage).read_text())
            stat = (folder / "memory.stat").read_text().splitlines()
            reclaimable = next((int(line.split()[1]) for line in stat if line.startswith(f"{files.reclaimable} ")), 0)
            yield limit - usage + reclaimable


def _groups(root: Path) -> Iterator[tuple[Path, GroupFiles]]:
    """The folders of our group and of those around it. A container may see its own group as the top one, under a path
    that is the host's."""
    with suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            number, controllers, path = line.split(":", 2)
            version = 2 if number == "0" else 1
            if version == 1 and "memory" not in controllers.split(","):
                continue
            mount = root / "sys/fs/cgroup" / ("" if version == 2 else "memory")
            own = mount / path.lstrip("/")
            for folder in (own, *own.parents):
                yield folder, GROUP_FILES_BY_VERSION[version]
                if folder == mount:
                    break


def _kibibytes(path: Path) -> Mapping[str, int]:
    """The lines `name: number kB` of a file in /proc, in bytes."""
    sizes: dict[str, int] = {}
    with suppress(OSError):
        for line in path.read_text().splitlines():
            name, _, value = line.partition(":")
            if value.endswith(" kB"):
                sizes[name] = int(value.removesuffix(" kB")) * 1024
    return sizes
