"""The ledger summed up by hours, so that whoever asks for a day or a month reads few rows.

An hour is *closed* when its records are complete, and summed up then, once. Hours are closed in order, so two times say
which are: those from `closed_from` to `closed_until`. What is asked for beyond whole closed hours is read from the
records.

A record has the time at which its statement began, and can be seen when its transaction has ended. So an hour is
complete five minutes after its end, when each transaction that was under way by then has ended: no statement may take
longer before it writes, and whoever has written has a transaction id. Should the database's clock be set back by more
than that, records of hours that are closed are not counted.
"""

# ruff: noqa: S608  (only constants of the storage modules are inserted into the text; values are bound)

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from uuid import UUID

from sqlalchemy import BigInteger, CheckConstraint, Double, Index, SmallInteger, select, text
from sqlalchemy.orm import Mapped, Session, mapped_column

from domain.jobs import JobKind
from storage.job_statements import CLOCK
from storage.tables import Row

HOUR_SECONDS = 3_600

HOUR = timedelta(seconds=HOUR_SECONDS)

GRACE = timedelta(minutes=5)  # ten times the time limit of a statement


class UsageHour(Row):
    """The records of one hour that have these columns in common. What they do not have is ''."""

    __tablename__ = "usage_hours"
    __table_args__ = (Index("usage_hours_hour_idx", "hour"),)

    tenant_id: Mapped[UUID] = mapped_column(primary_key=True)
    hour: Mapped[datetime] = mapped_column(primary_key=True)  # its beginning
    key_id: Mapped[str] = mapped_column(primary_key=True)
    model: Mapped[str] = mapped_column(primary_key=True)
    adapter: Mapped[str] = mapped_column(primary_key=True)
    kind: Mapped[JobKind] = mapped_column(primary_key=True)
    is_batch: Mapped[bool] = mapped_column(primary_key=True)
    num_jobs: Mapped[int] = mapped_column(BigInteger)  # that ended
    num_attempts: Mapped[int] = mapped_column(BigInteger)
    num_prompt_tokens: Mapped[int] = mapped_column(BigInteger)
    num_cached_tokens: Mapped[int] = mapped_column(BigInteger)
    num_output_tokens: Mapped[int] = mapped_column(BigInteger)
    num_reasoning_tokens: Mapped[int] = mapped_column(BigInteger)
    queue_seconds: Mapped[float] = mapped_column(Double)
    prefill_seconds: Mapped[float] = mapped_column(Double)
    decode_seconds: Mapped[float] = mapped_column(Double)
    engine_seconds: Mapped[float] = mapped_column(Double)


class UsageClosing(Row):
    """Which hours are closed: one row."""

    __tablename__ = "usage_closing"
    __table_args__ = (CheckConstraint("id = 1", name="id"),)

    id: Mapped[int] = mapped_column(SmallInteger, primary_key=True, autoincrement=False, server_default="1")
    closed_from: Mapped[datetime]
    closed_until: Mapped[datetime]  # exclusive


@dataclass(frozen=True, slots=True)
class Horizon:
    """What can be said at one moment of the records to come."""

    as_of: datetime
    own_id: int  # greater than the ids of all transactions that had written something
    oldest_id: int  # transactions with smaller ids had ended

    def is_passed(self, later: "Horizon") -> bool:
        """Whether by now all transactions have ended that had written something then."""
        return later.oldest_id > self.own_id


# A snapshot does not tell which ids were given to transactions that have not ended, so this one takes the next.
HORIZON = text("""
SELECT clock_timestamp() AS as_of, pg_current_xact_id()::text::bigint AS own_id,
    pg_snapshot_xmin(pg_current_snapshot())::text::bigint AS oldest_id
""")


def horizon(session: Session) -> Horizon:
    """Needs a transaction of its own."""
    return Horizon(*session.execute(HORIZON).one())


NEXT = text("SELECT closed_until FROM usage_closing FOR UPDATE SKIP LOCKED")

SUM_UP = text("""
INSERT INTO usage_hours (tenant_id, hour, key_id, model, adapter, kind, is_batch, num_jobs, num_attempts,
    num_prompt_tokens, num_cached_tokens, num_output_tokens, num_reasoning_tokens, queue_seconds, prefill_seconds,
    decode_seconds, engine_seconds)
SELECT tenant_id, CAST(:hour AS timestamptz), coalesce(key_id, ''), model, coalesce(adapter, ''), kind, is_batch,
    count(*) FILTER (WHERE is_end), count(*) FILTER (WHERE is_attempt), sum(num_prompt_tokens), sum(num_cached_tokens),
    sum(num_output_tokens), sum(num_reasoning_tokens), sum(queue_seconds), sum(prefill_seconds), sum(decode_seconds),
    sum(engine_seconds)
FROM usage_records WHERE ended_at >= :hour AND ended_at < :next_hour
GROUP BY tenant_id, key_id, model, adapter, kind, is_batch
""")

CLOSE = text("UPDATE usage_closing SET closed_until = :next_hour")


def close_next(session: Session, complete_until: datetime) -> bool:
    """Sum up the first hour that is not closed. False if it has not ended by then, or somebody else is doing that."""
    hour = session.execute(NEXT).scalar_one_or_none()
    if hour is None or hour + HOUR > complete_until:
        return False
    bounds = {"hour": hour, "next_hour": hour + HOUR}
    session.execute(SUM_UP, bounds)
    session.execute(CLOSE, bounds)
    return True


def closed_within(session: Session, start: datetime, end: datetime) -> tuple[datetime, datetime]:
    """The closed hours from `start` to `end`, as a range, which is empty at `start` if there are none."""
    row = session.execute(select(UsageClosing.closed_from, UsageClosing.closed_until)).one_or_none()
    if row is None:
        return start, start
    first, last = max(row.closed_from, _floor(start + HOUR - timedelta.resolution)), min(row.closed_until, _floor(end))
    return (first, last) if first < last else (start, start)


def _floor(at: datetime) -> datetime:
    return datetime.fromtimestamp(at.timestamp() // HOUR_SECONDS * HOUR_SECONDS, UTC)


PRUNE_HOURS = text(f"""
DELETE FROM usage_hours WHERE ctid = ANY(ARRAY(
    SELECT ctid FROM usage_hours WHERE hour < {CLOCK} - make_interval(days => :days) LIMIT :limit))
""")


def prune(session: Session, *, days: int, limit: int = 1_000) -> int:
    """Delete hours that are older than this. Returns how many rows."""
    result = session.connection().execute(PRUNE_HOURS, {"days": days, "limit": limit})
    return int(result.rowcount)
