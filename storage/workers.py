"""Which GPU workers are alive. Dispatch windows and /health read it; no correctness hangs on it."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from uuid import UUID

from sqlalchemy import ColumnElement, delete, func, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from domain.workers import WorkerState
from storage import model_states, worker_drains
from storage.tables import Worker

LIVE_SECONDS = 15.0  # a worker not seen for so long is taken for gone
FORGET_SECONDS = 3600.0


@dataclass(frozen=True, slots=True)
class WorkerReport:
    """What a worker says of itself; `id` is fresh per process incarnation and is also its lease owner."""

    id: UUID
    hostname: str
    model: str
    max_num_seqs: int
    num_running: int
    tokens_per_second: float
    model_revision: str | None = None
    state: WorkerState = WorkerState.READY


@dataclass(frozen=True, slots=True)
class Orders:
    """What admins want of a worker."""

    is_loaded: bool  # its model is to be loaded
    release_after_seconds: float | None = None  # it is to take no jobs, and to release after that; None: to take them


def heartbeat(session: Session, report: WorkerReport) -> Orders:
    """Say that the worker lives, and how it does. Every few seconds; workers long silent are dropped on the way.
    Returns what it is to do."""
    statement = insert(Worker).values(**asdict(report))
    changed = {name: statement.excluded[name] for name in asdict(report) if name != "id"}
    session.execute(
        statement.on_conflict_do_update(
            index_elements=[Worker.id], set_={**changed, "seen_at": func.statement_timestamp()}
        )
    )
    session.execute(delete(Worker).where(Worker.seen_at < _seconds_ago(FORGET_SECONDS)))
    order = worker_drains.find(session, report.hostname)
    return Orders(model_states.is_loaded(session, report.model), order.release_after_seconds if order else None)


def forget(session: Session, worker_id: UUID) -> None:
    """The worker ends in good order."""
    session.execute(delete(Worker).where(Worker.id == worker_id))


def list_live(session: Session, *, model: str | None = None) -> Sequence[Worker]:
    """The workers seen within LIVE_SECONDS, whatever they are at, oldest first."""
    statement = select(Worker).where(Worker.seen_at > _seconds_ago(LIVE_SECONDS)).order_by(Worker.started_at)
    if model is not None:
        statement = statement.where(Worker.model == model)
    workers = session.scalars(statement.execution_options(populate_existing=True)).all()
    session.expunge_all()
    return workers


def _seconds_ago(seconds: float) -> ColumnElement[datetime]:
    return func.statement_timestamp() - func.make_interval(0, 0, 0, 0, 0, 0, seconds)
