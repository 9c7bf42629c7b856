"""The control groups around this process, which limit what a container may use of its machine. Free of torch."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Literal


def groups(root: Path, controller: str) -> Iterator[tuple[Path, Literal[1, 2]]]:
    """The folders of our control group and of its ancestors, each with the version of its hierarchy; of the first
    version, only those of `controller`.

    `root` is the directory that holds `proc` and `sys`. Inside a container, our group may appear as the root of the
    hierarchy although its path is the one that the host knows.
    """
    with suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            number, controllers, path = line.split(":", 2)
            version: Literal[1, 2] = 2 if number == "0" else 1
            if version == 1 and controller not in controllers.split(","):
                continue
            mount = root / "sys/fs/cgroup" / ("" if version == 2 else controller)
            own = mount / path.lstrip("/")
            for folder in (own, *own.parents):
                yield folder, version
                if folder == mount:
                    break
