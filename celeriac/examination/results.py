"""The result of a check: how it went, what was seen, and what to do."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

from domain.clocks import MAX_SKEW_SECONDS, skew_seconds

Level = Literal["ok", "warn", "fail"]


@dataclass(frozen=True, slots=True)
class CheckResult:
    """`warn`: it works, but not as well as it could, or not for long. `fail`: something does not work."""

    name: str
    level: Level
    seen: str
    remedy: str | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def ok(name: str, seen: str) -> CheckResult:
    return CheckResult(name, "ok", seen)


def warn(name: str, seen: str, remedy: str) -> CheckResult:
    return CheckResult(name, "warn", seen, remedy)


def fail(name: str, seen: str, remedy: str) -> CheckResult:
    return CheckResult(name, "fail", seen, remedy)


def clock_result(name: str, server_time: float, asked_at: float, answered_at: float, remedy: str) -> CheckResult:
    """Compares a server's clock with this machine's; all times are in seconds since 1970."""
    skew = skew_seconds(server_time, asked_at, answered_at)
    if abs(skew) > MAX_SKEW_SECONDS:
        direction = "ahead of" if skew > 0 else "behind"
        return warn(name, f"its clock is {abs(skew):.1f} s {direction} this machine's", remedy)
    return ok(name, "its clock agrees with this machine's")
