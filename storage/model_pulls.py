"""Pulls of models that administrators ask for over HTTP: one row for each name, the newest pull of it.

A maintenance process claims one, has a child process fetch the model, and reports its progress. Only one pull runs at a
time in the whole installation. If its process dies, another one claims it and begins again.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any
from uuid import UUID

from sqlalchemy import BigInteger, CheckConstraint, Index, and_, func, or_, select, text, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Mapped, Session, mapped_column

from domain.errors import InvalidRequest, NotFound
from storage.job_statements import CLOCK
from storage.tables import Row

SILENCE_SECONDS = 30.0  # after which a pull that nobody reports on is claimed again


class PullStatus(StrEnum):
    QUEUED = "queued"
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"


UNFINISHED = (PullStatus.QUEUED, PullStatus.RUNNING)


class ModelPull(Row):
    """`num_bytes` of `total_bytes` are those of the current `step`; the total is null if it is unknown."""

    __tablename__ = "model_pulls"
    __table_args__ = (
        CheckConstraint("status IN ('queued', 'running', 'completed', 'failed', 'cancelled')", name="status"),
        Index("model_pulls_one_runs", text("(true)"), unique=True, postgresql_where=text("status = 'running'")),
    )

    name: Mapped[str] = mapped_column(primary_key=True)
    source: Mapped[str]
    accepts_licence: Mapped[bool]
    status: Mapped[str]
    cancel_requested: Mapped[bool] = mapped_column(server_default=text("false"))
    step: Mapped[str] = mapped_column(server_default="")
    num_bytes: Mapped[int] = mapped_column(BigInteger, server_default=text("0"))
    total_bytes: Mapped[int | None] = mapped_column(BigInteger)
    error: Mapped[str | None]
    owner: Mapped[UUID | None]  # of the process that fetches it
    seen_at: Mapped[datetime | None]  # its last report
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]


@dataclass(frozen=True, slots=True)
class Progress:
    step: str = ""
    num_bytes: int = 0
    total_bytes: int | None = None


CLAIM = text(f"""
UPDATE model_pulls SET status = 'running', owner = :owner, seen_at = {CLOCK}, started_at = {CLOCK},
    step = '', num_bytes = 0, total_bytes = NULL
WHERE name = (
    SELECT name FROM model_pulls p
    WHERE NOT p.cancel_requested
        AND (p.status = 'queued'
            OR p.status = 'running' AND p.seen_at < {CLOCK} - make_interval(secs => :silence_seconds))
        AND NOT EXISTS (SELECT FROM model_pulls r WHERE r.status = 'running' AND r.name <> p.name)
    ORDER BY p.status DESC, p.created_at LIMIT 1 FOR UPDATE SKIP LOCKED)
RETURNING name
""")  # noqa: S608  (CLOCK is a constant)


def ask(session: Session, name: str, source: str, *, accepts_licence: bool) -> ModelPull:
    """Have the model pulled; what is being pulled from there already goes on. One whose cancel is under way is queued
    anew: its process finds that it is no longer its own. Raises InvalidRequest if it is being pulled from elsewhere."""
    fresh: dict[str, Any] = {"source": source, "accepts_licence": accepts_licence, "status": PullStatus.QUEUED}
    blank = dict.fromkeys(("total_bytes", "error", "owner", "seen_at", "started_at", "finished_at"))
    blank |= {"step": "", "num_bytes": 0, "cancel_requested": False, "created_at": func.now()}
    statement = insert(ModelPull).values(name=name, **fresh)
    session.execute(
        statement.on_conflict_do_update(
            index_elements=[ModelPull.name],
            set_=fresh | blank,
            where=or_(ModelPull.status.not_in(UNFINISHED), ModelPull.cancel_requested),
        )
    )
    pull = find(session, name)
    if pull.source != source:
        raise InvalidRequest(
            f"{name} is being pulled from {pull.source}; cancel that first, or give another name", param="name"
        )
    return pull


def find(session: Session, name: str) -> ModelPull:
    """Raises NotFound."""
    pull = session.get(ModelPull, name.replace("\0", ""), populate_existing=True)
    if pull is None:
        raise NotFound(f"no pull of a model named {name[:200]!r}; GET /v1/admin/models/pulls lists them")
    return pull


def list_pulls(session: Session, *, limit: int) -> Sequence[ModelPull]:
    """Newest first."""
    return session.scalars(select(ModelPull).order_by(ModelPull.created_at.desc(), ModelPull.name).limit(limit)).all()


def cancel(session: Session, name: str) -> ModelPull:
    """One that waits ends at once; one that runs ends when its process hears of it, or is found dead. One that has
    ended stays as it is. Raises NotFound."""
    name = find(session, name).name
    own = update(ModelPull).where(ModelPull.name == name)
    ended = {"status": PullStatus.CANCELLED, "finished_at": func.now()}
    session.execute(own.where(ModelPull.status == PullStatus.QUEUED).values(**ended))
    session.execute(own.where(ModelPull.status == PullStatus.RUNNING).values(cancel_requested=True))
    return find(session, name)


def claim(session: Session, owner: UUID) -> ModelPull | None:
    """The oldest that waits, or one whose process is gone, unless another runs. Raises IntegrityError if another
    process claims one at this moment."""
    silent = ModelPull.seen_at < text(f"{CLOCK} - make_interval(secs => {SILENCE_SECONDS})")
    is_gone = or_(ModelPull.status == PullStatus.QUEUED, and_(ModelPull.status == PullStatus.RUNNING, silent))
    session.execute(
        update(ModelPull)
        .where(ModelPull.cancel_requested, is_gone)
        .values(status=PullStatus.CANCELLED, finished_at=func.now())
    )
    name = session.execute(CLAIM, {"owner": owner, "silence_seconds": SILENCE_SECONDS}).scalar()
    return None if name is None else find(session, name)


def report(session: Session, name: str, owner: UUID, progress: Progress) -> bool:
    """Whether to go on: False if it is to be cancelled, or another process has claimed it."""
    values = {"step": progress.step, "num_bytes": progress.num_bytes, "total_bytes": progress.total_bytes}
    statement = _own(name, owner).values(seen_at=text(CLOCK), **values).returning(ModelPull.cancel_requested)
    return session.execute(statement).scalar() is False


def end(session: Session, name: str, owner: UUID, status: PullStatus, error: str | None = None) -> None:
    """Also for a pull that is given back: status `queued`."""
    finished_at = None if status is PullStatus.QUEUED else func.now()
    session.execute(_own(name, owner).values(status=status, error=error, owner=None, finished_at=finished_at))


def _own(name: str, owner: UUID) -> Any:
    running = ModelPull.status == PullStatus.RUNNING
    return update(ModelPull).where(ModelPull.name == name, ModelPull.owner == owner, running)
