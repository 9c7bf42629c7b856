"""GPU workers: which are alive, which are drained, and which models they are to hold.

Which models are to be loaded: what admins ask for, and GPU workers obey. A model without a row is loaded.

Which GPU workers are to take no jobs: an operator's order to one worker, by its name, kept until it is taken back.

It outlives the worker's process: what comes back under the same name drains on, since whoever asked for it did not ask
for a restart. What is not asked for is no row.

Which GPU workers are alive. Dispatch windows and /health read it; no correctness hangs on it.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from uuid import UUID

from sqlalchemy import ColumnElement, delete, func, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from domain.jobs import WorkerState
from storage.tables import ModelState, Worker, WorkerDrain


def set_model_loaded(session: Session, model: str, *, is_loaded: bool) -> datetime:
    """Have the model loaded or unloaded. Returns since when it is so: earlier, where it was asked for before."""
    statement = insert(ModelState).values(model=model, is_loaded=is_loaded, changed_at=func.statement_timestamp())
    session.execute(
        statement.on_conflict_do_update(
            index_elements=[ModelState.model],
            set_={"is_loaded": statement.excluded.is_loaded, "changed_at": statement.excluded.changed_at},
            where=ModelState.is_loaded != statement.excluded.is_loaded,
        )
    )
    return session.scalars(select(ModelState.changed_at).where(ModelState.model == model)).one()


def is_model_loaded(session: Session, model: str) -> bool:
    """Whether it is to be loaded."""
    return session.scalar(select(ModelState.is_loaded).where(ModelState.model == model)) is not False


def unloaded_models(session: Session) -> frozenset[str]:
    """Those that are not to be loaded."""
    return frozenset(session.scalars(select(ModelState.model).where(~ModelState.is_loaded)))


FORGET_DAYS = 30  # an order to a worker that is gone; names are often drawn anew


def drain(session: Session, hostname: str, *, release_after_seconds: float) -> None:
    """Have the worker take no jobs, and release what still runs after so long. Asking again changes nothing."""
    statement = insert(WorkerDrain).values(hostname=hostname, release_after_seconds=release_after_seconds)
    session.execute(statement.on_conflict_do_nothing())
    is_old = WorkerDrain.since < func.now() - func.make_interval(0, 0, 0, FORGET_DAYS)
    session.execute(delete(WorkerDrain).where(is_old, WorkerDrain.hostname.not_in(select(Worker.hostname))))


def resume(session: Session, hostname: str) -> bool:
    """Have it take jobs again. Returns whether it had been told not to."""
    gone = session.execute(delete(WorkerDrain).where(WorkerDrain.hostname == hostname).returning(WorkerDrain.hostname))
    return gone.first() is not None


def find_drain(session: Session, hostname: str) -> WorkerDrain | None:
    """The order to this worker."""
    found = session.get(WorkerDrain, hostname, populate_existing=True)
    session.expunge_all()
    return found


def list_drains(session: Session) -> Sequence[WorkerDrain]:
    """Every order, oldest first."""
    drains = session.scalars(select(WorkerDrain).order_by(WorkerDrain.since, WorkerDrain.hostname)).all()
    session.expunge_all()
    return drains


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
    order = find_drain(session, report.hostname)
    return Orders(is_model_loaded(session, report.model), order.release_after_seconds if order else None)


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
