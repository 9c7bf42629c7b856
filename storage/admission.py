"""Whether the limits of tenants and keys leave room for new jobs.

Part of the transaction that accepts the jobs. It locks the limits first, and whatever it reads after that can only
become less by the end of the transaction: room is added by time and by the ends of jobs, and taken only by accepts,
which wait for the lock. Nothing of this is run for jobs of which neither tenant nor key has limits.
"""

# ruff: noqa: S608  (only constants of the storage modules are inserted into the text; values are bound)

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import Row, TextClause, text
from sqlalchemy.orm import Session

from domain.errors import (
    CeleriacError,
    InvalidRequest,
    RequestsPerMinuteExceeded,
    TokenBudgetSpent,
    TokensPerDayExceeded,
    TokensPerMinuteExceeded,
    TokensPerMonthExceeded,
    TooManyQueuedJobs,
    TooManyQueuedTokens,
    TooManyUnfinishedJobs,
)
from domain.limits import Bucket, ClientCall, LimitStanding, counted
from storage.full_queues import WAITED_SECONDS, drain_seconds, never_fits
from storage.job_statements import CLOCK
from storage.limits import OF_TENANT, buckets_of

LONG_LINE_PART = 0.75  # of a limit: if so much is free, a line need not leave half of it

Subject = tuple[UUID, str]  # a tenant and the id of its key, or OF_TENANT

_READ = f"""
SELECT l.*, u.day, u.tokens_on_day, u.tokens_in_month, u.num_unused_tokens, {CLOCK} AS read_at
FROM limits l JOIN limit_usage u USING (tenant_id, key_id)
WHERE (l.tenant_id, l.key_id) IN (SELECT * FROM unnest(CAST(:tenant_ids AS uuid[]), CAST(:key_ids AS text[])))
ORDER BY l.tenant_id, l.key_id"""

READ = text(_READ)

LOCK = text(f"{_READ} FOR NO KEY UPDATE OF l")

# A second statement, whose snapshot has what others committed while the first one waited for the lock. What a whole
# tenant has is counted in tenant_load; only the jobs of a key are read: queued ones from jobs_key_idx, and running ones
# of its tenant.
COUNT = text(f"""
WITH asked AS (SELECT * FROM unnest(CAST(:tenant_ids AS uuid[]), CAST(:key_ids AS text[])) AS a(tenant_id, key_id)),
unfinished AS (
    SELECT a.tenant_id, a.key_id, j.status, j.cost, NULL::numeric AS waited
    FROM asked a JOIN jobs j ON j.status = 'queued' AND j.tenant_id = a.tenant_id
        AND j.key_id BETWEEN a.key_id AND a.key_id  -- of =, as many rows are expected as any other key has: perhaps all
    UNION ALL
    SELECT a.tenant_id, a.key_id, j.status, j.cost, extract(epoch FROM j.started_at - j.created_at)
    FROM asked a JOIN jobs j ON j.status = 'in_progress' AND j.tenant_id = a.tenant_id AND j.key_id = a.key_id
)
SELECT tenant_id, key_id, count(*) FILTER (WHERE status = 'queued') AS num_queued, count(*) AS num_unfinished,
    coalesce(sum(cost) FILTER (WHERE status = 'queued'), 0)::bigint AS queued_tokens,
    avg(waited)::float8 AS waited_seconds
FROM unfinished GROUP BY tenant_id, key_id
UNION ALL
SELECT l.tenant_id, '', l.num_queued, l.num_queued + l.num_running, l.num_queued_tokens, {WAITED_SECONDS}
FROM tenant_load l WHERE l.tenant_id = ANY(CAST(:whole_tenant_ids AS uuid[]))
""")

CHARGE = text("""
UPDATE limits l SET requests_level = n.requests_level, tokens_level = n.tokens_level, refilled_at = n.refilled_at,
    num_returned_tokens = n.num_returned_tokens
FROM unnest(CAST(:tenant_ids AS uuid[]), CAST(:key_ids AS text[]), CAST(:requests_levels AS float8[]),
    CAST(:tokens_levels AS float8[]), CAST(:refilled_ats AS timestamptz[]), CAST(:nums_returned AS bigint[]))
    AS n(tenant_id, key_id, requests_level, tokens_level, refilled_at, num_returned_tokens)
WHERE l.tenant_id = n.tenant_id AND l.key_id = n.key_id
""")


@dataclass(slots=True)
class Asking:
    """A new job, as far as limits are concerned."""

    tenant_id: UUID
    key_id: str | None
    cost: int  # the most tokens that it can take
    call: ClientCall | None = None
    is_line: bool = False  # of a batch: it leaves half of each limit to requests that somebody waits for

    @property
    def num_requests(self) -> int:
        """A call that takes several jobs is one request: that of its first job."""
        return 1 if self.call is None or self.call.number == 0 else 0

    def part_of(self, limit: int) -> int:
        """How much of a limit it may use."""
        return -(-limit // 2) if self.is_line else limit

    def needed_of(self, limit: int, wanted: int) -> float:
        """How much of a limit must be free for the job to take `wanted`, or all of it if that is more. If a line is so
        long that this is hardly ever free, it leaves less."""
        with_rest = wanted + limit - self.part_of(limit)
        return max(wanted, min(with_rest, LONG_LINE_PART * limit) if self.is_line else with_rest)

    @property
    def caller(self) -> tuple[int, str | None]:
        """The tenant and the key, as numbers and texts, whose hashes take less time than that of a UUID."""
        return self.tenant_id.int, self.key_id

    @property
    def subjects(self) -> list[Subject]:
        of_key: list[Subject] = [] if self.key_id is None else [(self.tenant_id, self.key_id)]
        return [*of_key, (self.tenant_id, OF_TENANT)]


@dataclass(slots=True)
class Meter:
    """The limits of one tenant or key, and what is left of each while the jobs of a group are looked at in order."""

    row: Row[Any]
    requests: Bucket | None
    tokens: Bucket | None
    num_queued: int = 0
    num_unfinished: int = 0
    queued_tokens: int = 0
    waited_seconds: float | None = None  # what its running jobs have waited, on average

    @property
    def whose(self) -> str:
        return "your tenant" if self.row.key_id == OF_TENANT else "your key"

    @property
    def is_counted(self) -> bool:
        """Whether a limit needs its unfinished jobs to be counted."""
        return any(
            limit is not None for limit in (self.row.queued_jobs, self.row.unfinished_jobs, self.row.queued_tokens)
        )

    def refusal_of(self, asking: Asking) -> CeleriacError | None:
        """Why there is no room for the job; None if there is."""
        return (
            self._refusal_for_ever(asking)
            or self.refusal_by_budget()
            or self._refusal_by_rate(asking)
            or self._refusal_by_queue(asking)
        )

    def _refusal_for_ever(self, asking: Asking) -> InvalidRequest | None:
        """Of a call whose jobs do not fit together, however empty bucket and queue are."""
        row, call = self.row, asking.call
        if call is None:
            return None
        for name, needed, limit, of_what in (
            ("tokens_per_minute", call.cost, row.tokens_per_minute, "tokens (prompts and max_tokens)"),
            ("queued_tokens", call.cost, row.queued_tokens, "tokens (prompts and max_tokens)"),
            ("queued_jobs", call.num_jobs, row.queued_jobs, "jobs"),
            ("unfinished_jobs", call.num_jobs, row.unfinished_jobs, "jobs"),
        ):
            if limit is not None and needed > limit:
                return never_fits(call, name, needed, limit, what=of_what, whose=f" of {self.whose}")
        return None

    @property
    def num_used_tokens(self) -> tuple[int, int]:
        """Of this day and of this month, in UTC."""
        row, today = self.row, self.row.read_at.astimezone(UTC).date()
        on_day = row.tokens_on_day if row.day == today else 0
        in_month = row.tokens_in_month if (row.day.year, row.day.month) == (today.year, today.month) else 0
        return on_day, in_month

    def refusal_by_budget(self) -> TokenBudgetSpent | None:
        row, now = self.row, self.row.read_at.astimezone(UTC)
        midnight = datetime(now.year, now.month, now.day, tzinfo=UTC)
        on_day, in_month = self.num_used_tokens
        if row.tokens_per_day is not None and on_day >= row.tokens_per_day:
            ends_at = midnight + timedelta(days=1)
            return TokensPerDayExceeded(
                f"{self.whose} has used {on_day} tokens today, and may use {row.tokens_per_day} a day; send this after "
                f"{ends_at:%Y-%m-%d %H:%M} UTC, or have an administrator raise tokens_per_day",
                retry_after_seconds=(ends_at - now).total_seconds(),
            )
        if row.tokens_per_month is not None and in_month >= row.tokens_per_month:
            ends_at = (midnight.replace(day=1) + timedelta(days=32)).replace(day=1)
            return TokensPerMonthExceeded(
                f"{self.whose} has used {in_month} tokens this month, and may use {row.tokens_per_month} a month; send "
                f"this after {ends_at:%Y-%m-%d %H:%M} UTC, or have an administrator raise tokens_per_month",
                retry_after_seconds=(ends_at - now).total_seconds(),
            )
        return None

    def _refusal_by_rate(self, asking: Asking) -> CeleriacError | None:
        requests, tokens = self.requests, self.tokens
        if requests is not None and (seconds := _seconds_until(requests, asking, asking.num_requests)) > 0:
            return RequestsPerMinuteExceeded(
                f"{self.whose} may send {counted(requests.per_minute, 'request')} a minute, and has sent them; "
                f"retry in {_in_seconds(seconds)}, or have an administrator raise requests_per_minute",
                retry_after_seconds=seconds,
            )
        if tokens is not None and (seconds := _seconds_until(tokens, asking, asking.cost)) > 0:
            return TokensPerMinuteExceeded(
                f"this request may take {asking.cost} tokens (prompt and max_tokens), and {self.whose} has "
                f"{max(0, int(tokens.level))} left of {tokens.per_minute} a minute; retry in "
                f"{_in_seconds(seconds)}, lower max_tokens, or have an administrator raise tokens_per_minute",
                retry_after_seconds=seconds,
            )
        return None

    def _refusal_by_queue(self, asking: Asking) -> CeleriacError | None:
        row, seconds = self.row, drain_seconds(self.waited_seconds, self.num_queued)
        if row.queued_jobs is not None and self.num_queued >= asking.part_of(row.queued_jobs):
            return TooManyQueuedJobs(
                f"{_jobs_are(self.num_queued, self.whose)} waiting, and queued_jobs is {row.queued_jobs}; retry when "
                "some have started",
                retry_after_seconds=seconds,
            )
        if row.unfinished_jobs is not None and self.num_unfinished >= asking.part_of(row.unfinished_jobs):
            return TooManyUnfinishedJobs(
                f"{_jobs_are(self.num_unfinished, self.whose)} waiting or running, and unfinished_jobs is "
                f"{row.unfinished_jobs}; retry when some have ended",
                retry_after_seconds=seconds,
            )
        # One job is always let in, or a long one could never run.
        limit = row.queued_tokens
        is_over = limit is not None and self.queued_tokens + asking.needed_of(limit, asking.cost) > limit
        if is_over and self.num_queued:
            return TooManyQueuedTokens(
                f"the jobs of {self.whose} that wait may take {self.queued_tokens} tokens, this one {asking.cost} "
                f"(prompt and max_tokens), and queued_tokens is {row.queued_tokens}; retry when some have started, or "
                "lower max_tokens",
                retry_after_seconds=seconds,
            )
        return None

    def take(self, asking: Asking, *, times: int = 1) -> None:
        """`times` is -1 to give it back."""
        if self.requests is not None:
            self.requests.take(times * asking.num_requests)
        if self.tokens is not None:
            self.tokens.take(times * asking.cost)
        self.num_queued += times
        self.num_unfinished += times
        self.queued_tokens += times * asking.cost


def _seconds_until(bucket: Bucket, asking: Asking, wanted: int) -> float:
    return bucket.seconds_until(asking.needed_of(bucket.per_minute, wanted))


def _jobs_are(number: int, whose: str) -> str:
    return f"{counted(number, 'job')} of {whose} {'is' if number == 1 else 'are'}"


def _in_seconds(seconds: float) -> str:
    return f"{max(0.1, seconds):.1f} s"


@dataclass(slots=True)
class Admission:
    """The meters that a group of jobs is subject to, locked until the end of the transaction."""

    meters: dict[Subject, Meter] = field(default_factory=dict)
    num_taken: int = 0
    _meters_by_caller: dict[tuple[int, str | None], list[Meter]] = field(default_factory=dict)

    @classmethod
    def begin(cls, session: Session, asking: Sequence[Asking]) -> "Admission":
        callers = {one.caller: one for one in asking}
        subjects = sorted({subject for one in callers.values() for subject in one.subjects})
        return cls(_meters(session, LOCK, subjects))

    def meters_of(self, asking: Asking) -> list[Meter]:
        found = self._meters_by_caller.get(asking.caller)
        if found is None:
            found = [self.meters[subject] for subject in asking.subjects if subject in self.meters]
            self._meters_by_caller[asking.caller] = found
        return found

    def refusal_of(self, asking: Asking) -> CeleriacError | None:
        """Why there is no room for the job; None if there is: then it is taken."""
        meters = self.meters_of(asking)
        for meter in meters:
            if (refusal := meter.refusal_of(asking)) is not None:
                return refusal
        for meter in meters:
            meter.take(asking)
        self.num_taken += 1
        return None

    def give_back(self, asking: Asking) -> None:
        """The job was not accepted after all."""
        self.num_taken -= 1
        for meter in self.meters_of(asking):
            meter.take(asking, times=-1)

    def standings_of(self, asking: Sequence[Asking | None]) -> list[LimitStanding | None]:
        """What each one's limits have left by now."""
        one_by_caller = {one.caller: one for one in asking if one is not None}
        standing_by_caller = {caller: self.standing_of(one) for caller, one in one_by_caller.items()}
        return [None if one is None else standing_by_caller[one.caller] for one in asking]

    def standing_of(self, asking: Asking) -> LimitStanding | None:
        """None if there are no limits with a rate."""
        meters = self.meters_of(asking)
        return LimitStanding.of((meter.requests for meter in meters), (meter.tokens for meter in meters))

    def charge(self, session: Session) -> None:
        """Store what was taken."""
        meters = [meter for meter in self.meters.values() if meter.requests is not None or meter.tokens is not None]
        if not meters or not self.num_taken:
            return
        rows = [meter.row for meter in meters]
        parameters = {
            "requests_levels": [None if meter.requests is None else meter.requests.level for meter in meters],
            "tokens_levels": [None if meter.tokens is None else meter.tokens.level for meter in meters],
            "refilled_ats": [max(row.read_at, row.refilled_at) for row in rows],
            "nums_returned": [max(row.num_unused_tokens, row.num_returned_tokens) for row in rows],
        }
        session.execute(CHARGE, _columns_of([(row.tenant_id, row.key_id) for row in rows]) | parameters)


def meters(session: Session, subjects: Sequence[Subject]) -> dict[Subject, Meter]:
    """Of those of these tenants and keys that have limits. Locks nothing."""
    return _meters(session, READ, subjects)


def _meters(session: Session, reading: TextClause, subjects: Sequence[Subject]) -> dict[Subject, Meter]:
    rows = session.execute(reading, _columns_of(subjects)) if subjects else ()
    found = {(row.tenant_id, row.key_id): _meter_of(row) for row in rows}
    counted = [subject for subject, meter in found.items() if meter.is_counted]
    parameters = _columns_of([(tenant, key) for tenant, key in counted if key != OF_TENANT])
    parameters["whole_tenant_ids"] = [tenant for tenant, key in counted if key == OF_TENANT]
    for row in session.execute(COUNT, parameters) if counted else ():
        meter = found[row.tenant_id, row.key_id]
        meter.num_queued, meter.num_unfinished = row.num_queued, row.num_unfinished
        meter.queued_tokens, meter.waited_seconds = row.queued_tokens, row.waited_seconds
    return found


def spent_budgets(session: Session, subjects: Sequence[Subject]) -> dict[Subject, tuple[datetime, TokenBudgetSpent]]:
    """Those of these tenants and keys that get no new jobs until a day or a month is over, and when it is. Locks
    nothing."""
    spent: dict[Subject, tuple[datetime, TokenBudgetSpent]] = {}
    for row in session.execute(READ, _columns_of(subjects)):
        if (refusal := _meter_of(row).refusal_by_budget()) is not None:
            ends_at = row.read_at.astimezone(UTC) + timedelta(seconds=refusal.retry_after_seconds)
            spent[row.tenant_id, row.key_id] = ends_at, refusal
    return spent


def _meter_of(row: Row[Any]) -> Meter:
    return Meter(row, *buckets_of(row))


def _columns_of(subjects: Sequence[Subject]) -> dict[str, Any]:
    return {"tenant_ids": [tenant for tenant, _ in subjects], "key_ids": [key for _, key in subjects]}
