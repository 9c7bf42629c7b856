"""The limits of tenants and keys, and how much of them is used.

Whoever has a limit has a row in `limits`, which every accept of its jobs locks, so that no two of them take the same
room (storage/admission.py), and one in `limit_usage`, to which the ends of jobs add what was taken. These are two
tables because accepts lock the former before, and ends the latter after, the counters of the tenant. A tenant without
limits, whose keys have none, has neither. A tenant's `queued_jobs` is not here but in `tenants.max_queued`.
"""

import logging
from collections.abc import Mapping, Sequence
from datetime import UTC, date, datetime, timedelta
from typing import Any
from uuid import UUID

from psycopg.errors import QueryCanceled
from sqlalchemy import BigInteger, Double, ForeignKey, ForeignKeyConstraint, delete, func, select, text, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Mapped, Session, mapped_column

from domain.access import LIMIT_NAMES, NO_LIMITS, Limits
from domain.limits import Bucket, CallerLimits, LastStanding, LimitStanding
from storage import usage
from storage.tables import Row, Tenant
from storage.usage import UsageQuery

log = logging.getLogger(__name__)

OF_TENANT = ""  # in the place of a key's id

BUDGETS = ("tokens_per_day", "tokens_per_month")

LATER = timedelta(hours=1)  # nothing has ended by then

COUNT_SECONDS = 1.5  # for each of two sums of the ledger; the API has five for a request


class LimitSet(Row):
    """The limits of a tenant or key, and the levels of its two token buckets: what may be taken at once."""

    __tablename__ = "limits"

    tenant_id: Mapped[UUID] = mapped_column(ForeignKey("tenants.id", ondelete="CASCADE"), primary_key=True)
    key_id: Mapped[str] = mapped_column(primary_key=True)  # or OF_TENANT
    requests_per_minute: Mapped[int | None] = mapped_column(BigInteger)
    tokens_per_minute: Mapped[int | None] = mapped_column(BigInteger)
    queued_jobs: Mapped[int | None] = mapped_column(BigInteger)
    unfinished_jobs: Mapped[int | None] = mapped_column(BigInteger)
    queued_tokens: Mapped[int | None] = mapped_column(BigInteger)
    streams: Mapped[int | None] = mapped_column(BigInteger)
    tokens_per_day: Mapped[int | None] = mapped_column(BigInteger)
    tokens_per_month: Mapped[int | None] = mapped_column(BigInteger)
    requests_level: Mapped[float | None] = mapped_column(Double)  # at `refilled_at`; None: full
    tokens_level: Mapped[float | None] = mapped_column(Double)
    refilled_at: Mapped[datetime] = mapped_column(server_default=func.now())
    num_returned_tokens: Mapped[int] = mapped_column(BigInteger, server_default="0")  # that tokens_level knows of

    @property
    def limits(self) -> Limits:
        return Limits(**{name: getattr(self, name) for name in LIMIT_NAMES})


class LimitUse(Row):
    """What the jobs of a tenant or key have taken on its newest day and in that month, in UTC, and what they have given
    back since it has limits."""

    __tablename__ = "limit_usage"
    __table_args__ = (
        ForeignKeyConstraint(["tenant_id", "key_id"], ["limits.tenant_id", "limits.key_id"], ondelete="CASCADE"),
    )

    tenant_id: Mapped[UUID] = mapped_column(primary_key=True)
    key_id: Mapped[str] = mapped_column(primary_key=True)
    day: Mapped[date] = mapped_column(server_default=text("(now() AT TIME ZONE 'UTC')::date"))  # of the newest job
    tokens_on_day: Mapped[int] = mapped_column(BigInteger, server_default="0")
    tokens_in_month: Mapped[int] = mapped_column(BigInteger, server_default="0")  # the month of `day`
    num_unused_tokens: Mapped[int] = mapped_column(BigInteger, server_default="0")  # charged at accept, never taken


def limits_of_tenants(session: Session, tenants: Sequence[Tenant]) -> dict[UUID, Limits]:
    """By tenant id."""
    ids = [tenant.id for tenant in tenants]
    rows = session.scalars(select(LimitSet).where(LimitSet.tenant_id.in_(ids), LimitSet.key_id == OF_TENANT))
    found = {row.tenant_id: row.limits for row in rows}
    return {
        tenant.id: found.get(tenant.id, NO_LIMITS).model_copy(update={"queued_jobs": tenant.max_queued})
        for tenant in tenants
    }


def limits_of_keys(session: Session, key_ids: Sequence[str]) -> dict[str, Limits]:
    """By the id of the key."""
    rows = session.scalars(select(LimitSet).where(LimitSet.key_id.in_([id_ for id_ in key_ids if id_ != OF_TENANT])))
    found = {row.key_id: row.limits for row in rows}
    return {key_id: found.get(key_id, NO_LIMITS) for key_id in key_ids}


_OF_CALLER = text("""
SELECT l.*, u.num_unused_tokens, statement_timestamp() AS read_at
FROM limits l JOIN limit_usage u USING (tenant_id, key_id) WHERE l.tenant_id = :tenant_id AND l.key_id IN ('', :key_id)
""")


def limits_of_caller(session: Session, tenant_id: UUID, key_id: str | None) -> CallerLimits:
    """Of a request with this key, and what is left of them by now."""
    rows = session.execute(_OF_CALLER, {"tenant_id": tenant_id, "key_id": key_id or OF_TENANT}).all()
    streams_by_key = {row.key_id: row.streams for row in rows}
    buckets = [buckets_of(row) for row in rows]
    standing = LimitStanding.of((requests for requests, _ in buckets), (tokens for _, tokens in buckets))
    return CallerLimits(
        is_limited=bool(rows),
        standing=None if standing is None else LastStanding(standing),
        key_streams=None if key_id is None else streams_by_key.get(key_id),
        tenant_streams=streams_by_key.get(OF_TENANT),
    )


def buckets_of(row: Any) -> tuple[Bucket | None, Bucket | None]:
    """Of requests and of tokens, as they are at `row.read_at`."""
    seconds = (row.read_at - row.refilled_at).total_seconds()
    returned = row.num_unused_tokens - row.num_returned_tokens
    requests = tokens = None
    if row.requests_per_minute is not None:
        requests = Bucket.refilled(row.requests_per_minute, row.requests_level, seconds=seconds)
    if row.tokens_per_minute is not None:
        tokens = Bucket.refilled(row.tokens_per_minute, row.tokens_level, seconds=seconds, returned=returned)
    return requests, tokens


def change_tenant_limits(session: Session, tenant: Tenant, given: Limits) -> None:
    """Set the limits that `given` names; None removes one."""
    values = given.model_dump(exclude_unset=True)
    if "queued_jobs" in values:
        tenant.max_queued = values.pop("queued_jobs")
    _change(session, tenant.id, OF_TENANT, values)


def change_key_limits(session: Session, tenant_id: UUID, key_id: str, given: Limits) -> None:
    """Likewise."""
    _change(session, tenant_id, key_id, given.model_dump(exclude_unset=True))


def _change(session: Session, tenant_id: UUID, key_id: str, values: Mapping[str, int | None]) -> None:
    """A bucket whose limit changes keeps its level, as long as that is not above the new limit."""
    if not values:
        return
    own = (LimitSet.tenant_id == tenant_id, LimitSet.key_id == key_id)
    before = session.execute(select(LimitSet.tokens_per_day, LimitSet.tokens_per_month).where(*own)).first()
    is_first = any(values.get(name) is not None and getattr(before, name, None) is None for name in BUDGETS)
    used = _used_by_now(session, tenant_id, key_id) if is_first else None  # before anything is locked
    if any(value is not None for value in values.values()):
        session.execute(insert(LimitSet).values(tenant_id=tenant_id, key_id=key_id).on_conflict_do_nothing())
    session.execute(update(LimitSet).where(*own).values(**values))
    if key_id == OF_TENANT and values.get("queued_tokens") is not None:
        _count_queued_tokens_of(session, tenant_id)
    session.execute(delete(LimitSet).where(*own, *(getattr(LimitSet, name).is_(None) for name in LIMIT_NAMES)))
    session.execute(_BEGIN_TO_COUNT, {"tenant_id": tenant_id, "key_id": key_id})
    if used is not None:
        session.execute(_COUNT_USED, {"tenant_id": tenant_id, "key_id": key_id, **used})


def _used_by_now(session: Session, tenant_id: UUID, key_id: str) -> dict[str, Any] | None:
    """A budget is of the whole day or month, also of what was used before there was one: that is in the ledger. What
    ends while this is committed may be missing. None if the ledger is too large to be summed up in time: whoever needs
    the budget, needs it now."""
    now = session.scalars(select(func.statement_timestamp())).one().astimezone(UTC)
    midnight = datetime(now.year, now.month, now.day, tzinfo=UTC)
    keys = [] if key_id == OF_TENANT else [key_id]
    queries = [
        UsageQuery(since, now + LATER, tenant_id=tenant_id, key_ids=keys)
        for since in (midnight, midnight.replace(day=1))
    ]
    reading = session.begin_nested()
    try:
        on_day, in_month = (
            sum(
                total.num_prompt_tokens + total.num_output_tokens
                for total in usage.totals(session, query, seconds=COUNT_SECONDS)
            )
            for query in queries
        )
    except OperationalError as exc:
        if not isinstance(exc.orig, QueryCanceled):
            raise
        log.warning("a budget begins at zero: the ledger is too large", extra={"tenant_id": str(tenant_id)})
        return None
    finally:
        reading.rollback()  # nothing was written, and the time limit was for this alone
    return {"day": midnight.date(), "on_day": on_day, "in_month": in_month}


_BEGIN_TO_COUNT = text("""
INSERT INTO limit_usage (tenant_id, key_id)
SELECT tenant_id, key_id FROM limits WHERE tenant_id = :tenant_id AND key_id = :key_id ON CONFLICT DO NOTHING
""")

# What has ended since the ledger was read is in the row, if there was one: so the greater one counts.
_COUNT_USED = text("""
UPDATE limit_usage SET day = greatest(day, :day),
    tokens_on_day = CASE WHEN day < :day THEN :on_day WHEN day = :day THEN greatest(tokens_on_day, :on_day)
        ELSE tokens_on_day END,
    tokens_in_month = CASE date_trunc('month', day) WHEN date_trunc('month', CAST(:day AS date))
        THEN greatest(tokens_in_month, :in_month) ELSE CASE WHEN day < :day THEN :in_month ELSE tokens_in_month END END
WHERE tenant_id = :tenant_id AND key_id = :key_id
""")


# Whoever counts has the turn until its commit, or the same difference would be added twice.
_TAKE_TURN = text("SELECT pg_advisory_xact_lock(hashtextextended('celeriac queued tokens', 0))")
_TRY_TURN = text("SELECT pg_try_advisory_xact_lock(hashtextextended('celeriac queued tokens', 0))")

# Queues are summed up before anything is locked. Rows and counters of one snapshot are compared, and the difference is
# added to whatever the counter is by now, so that a concurrent change of a job is not lost.
_COUNT = """
WITH off AS MATERIALIZED (
    SELECT tenant_id, num_tokens FROM (
        SELECT l.tenant_id, (SELECT coalesce(sum(j.cost), 0) FROM jobs j
            WHERE j.tenant_id = l.tenant_id AND j.status = 'queued') - l.num_queued_tokens AS num_tokens
        FROM tenant_load l WHERE {of}
    ) d WHERE num_tokens <> 0
),
locked AS MATERIALIZED (
    SELECT l.tenant_id, off.num_tokens FROM off JOIN tenant_load l USING (tenant_id) FOR NO KEY UPDATE OF l {waiting}
),
counted AS (
    UPDATE tenant_load l SET num_queued_tokens = l.num_queued_tokens + locked.num_tokens
    FROM locked WHERE l.tenant_id = locked.tenant_id RETURNING l.tenant_id
)
SELECT (SELECT count(*) FROM counted) AS num_counted, (SELECT count(*) FROM off) AS num_off
"""
_COUNT_ONE = text(_COUNT.format(of="l.tenant_id = :tenant_id", waiting=""))

# Only tenants for which it is a limit, so that no others' jobs are read.
_COUNT_LIMITED = text(
    _COUNT.format(
        of="l.tenant_id IN (SELECT tenant_id FROM limits WHERE key_id = '' AND queued_tokens IS NOT NULL)",
        waiting="SKIP LOCKED",
    )
)


def count_queued_tokens(session: Session) -> bool:
    """Count anew what the queued jobs of tenants may take that have a limit on it. Processes of the last release do not
    count it. False if the counters of some are locked, or somebody else is counting."""
    if not session.execute(_TRY_TURN).scalar_one():
        return False
    row = session.execute(_COUNT_LIMITED).one()
    return bool(row.num_counted == row.num_off)


def _count_queued_tokens_of(session: Session, tenant_id: UUID) -> None:
    session.execute(_TAKE_TURN)
    session.execute(_COUNT_ONE, {"tenant_id": tenant_id})


def copy_limits(session: Session, tenant_id: UUID, key_id: str, *, to_key_id: str) -> None:
    """Give another key the same limits, as far used up as they are."""
    for rows in (LimitSet, LimitUse):
        columns = rows.__table__.columns
        statement = select(*columns).where(columns.tenant_id == tenant_id, columns.key_id == key_id)
        if (row := session.execute(statement).first()) is not None:
            session.execute(insert(rows).values(row._asdict() | {"key_id": to_key_id}))


# Locked in the order in which accepts lock them.
_RETURN_REQUEST = text("""
WITH own AS MATERIALIZED (
    SELECT tenant_id, key_id FROM limits WHERE tenant_id = :tenant_id AND key_id IN ('', :key_id)
    ORDER BY tenant_id, key_id FOR NO KEY UPDATE
)
UPDATE limits l SET requests_level = least(requests_per_minute, requests_level + 1) FROM own
WHERE l.tenant_id = own.tenant_id AND l.key_id = own.key_id
""")


def return_request(session: Session, tenant_id: UUID, key_id: str | None) -> None:
    """Give back the request that a call was charged, whose other jobs were refused."""
    session.execute(_RETURN_REQUEST, {"tenant_id": tenant_id, "key_id": key_id or OF_TENANT})


def forget_limits(session: Session, tenant_id: UUID, key_id: str) -> None:
    session.execute(delete(LimitSet).where(LimitSet.tenant_id == tenant_id, LimitSet.key_id == key_id))
