"""APIs and maintenance processes that run: each reports every few seconds, and takes its row with it when it stops.

GPU workers have a table of their own, which has what dispatch needs (storage/workers.py).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from uuid import UUID

from sqlalchemy import delete, func, select, text
from sqlalchemy.dialects.postgresql import JSONB, insert
from sqlalchemy.orm import Mapped, Session, mapped_column

from storage.job_statements import CLOCK
from storage.tables import Row
from storage.workers import FORGET_SECONDS, LIVE_SECONDS


class ProcessKind(StrEnum):
    API = "api"
    MAINTENANCE = "maintenance"


class RunningProcess(Row):
    """`troubles` has, by their codes (domain/troubles.py), what it finds wrong with itself."""

    __tablename__ = "processes"

    id: Mapped[UUID] = mapped_column(primary_key=True)
    kind: Mapped[str]
    name: Mapped[str]
    release: Mapped[str]
    troubles: Mapped[dict[str, str]] = mapped_column(JSONB, server_default=text("'{}'"))
    started_at: Mapped[datetime] = mapped_column(server_default=func.now())
    seen_at: Mapped[datetime] = mapped_column(server_default=func.now())


@dataclass(frozen=True, slots=True)
class ProcessReport:
    id: UUID
    kind: ProcessKind
    name: str
    release: str


def beat(session: Session, report: ProcessReport, troubles: Mapping[str, str]) -> float:
    """Report that it runs. Drops those that are long gone. Returns the database's clock, in seconds since 1970."""
    statement = insert(RunningProcess).values(
        id=report.id, kind=report.kind.value, name=report.name, release=report.release, troubles=dict(troubles)
    )
    upsert = statement.on_conflict_do_update(
        index_elements=[RunningProcess.id],
        set_={"seen_at": func.statement_timestamp(), "troubles": statement.excluded.troubles},
    )
    clock = session.execute(upsert.returning(func.extract("epoch", func.clock_timestamp()))).scalar_one()
    long_ago = text(f"seen_at < {CLOCK} - make_interval(secs => {FORGET_SECONDS})")
    silent = select(RunningProcess.id).where(long_ago).with_for_update(skip_locked=True)  # or two wait for each other
    session.execute(delete(RunningProcess).where(RunningProcess.id.in_(silent)))
    return float(clock)


def list_live(session: Session) -> Sequence[RunningProcess]:
    """Those that reported within LIVE_SECONDS."""
    is_live = text(f"seen_at > {CLOCK} - make_interval(secs => {LIVE_SECONDS})")
    found = session.scalars(select(RunningProcess).where(is_live).order_by(RunningProcess.name)).all()
    session.expunge_all()
    return found


def forget(session: Session, process_id: UUID) -> None:
    """Of one that stops."""
    session.execute(delete(RunningProcess).where(RunningProcess.id == process_id))
