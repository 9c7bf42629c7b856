"""GPU workers: which are alive, which are drained, and which models they should load.

Dispatch windows and /health read which workers are alive; correctness does not depend on it. Admins set which models
are loaded; a model without a row is. A drain is an operator's order to a worker by name, kept until it is revoked. It
outlives the worker's process, since a restart must not undo it.
"""

# ruff: noqa: S608  (only constants of storage/job_statements.py are inserted into the text; values are bound)

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from importlib.metadata import version
from uuid import UUID

from sqlalchemy import ColumnElement, delete, func, select, text
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from domain.jobs import WorkerState
from storage.job_statements import BEGUN, CLOCK, RUNNABLE
from storage.tables import ModelState, Worker, WorkerDrain


def set_model_loaded(session: Session, model: str, *, is_loaded: bool) -> datetime:
    """Have the model loaded or unloaded. Returns when that was first requested."""
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
    """Whether the model should be loaded."""
    return session.scalar(select(ModelState.is_loaded).where(ModelState.model == model)) is not False


def unloaded_models(session: Session) -> frozenset[str]:
    """The models that should not be loaded."""
    return frozenset(session.scalars(select(ModelState.model).where(~ModelState.is_loaded)))


FORGET_DAYS = 30  # orders to workers that are gone, since names are often random


def drain(session: Session, hostname: str, *, release_after_seconds: float) -> None:
    """Have the worker accept no jobs, and release what still runs after this time. Repeating it has no effect."""
    statement = insert(WorkerDrain).values(hostname=hostname, release_after_seconds=release_after_seconds)
    session.execute(statement.on_conflict_do_nothing())
    is_old = WorkerDrain.since < func.now() - func.make_interval(0, 0, 0, FORGET_DAYS)
    session.execute(delete(WorkerDrain).where(is_old, WorkerDrain.hostname.not_in(select(Worker.hostname))))


def resume(session: Session, hostname: str) -> bool:
    """Have it accept jobs again. Returns whether it was drained."""
    gone = session.execute(delete(WorkerDrain).where(WorkerDrain.hostname == hostname).returning(WorkerDrain.hostname))
    return gone.first() is not None


def find_drain(session: Session, hostname: str) -> WorkerDrain | None:
    """The drain order to this worker, if any."""
    found = session.get(WorkerDrain, hostname, populate_existing=True)
    session.expunge_all()
    return found


def list_drains(session: Session) -> Sequence[WorkerDrain]:
    """Every drain order, oldest first."""
    drains = session.scalars(select(WorkerDrain).order_by(WorkerDrain.since, WorkerDrain.hostname)).all()
    session.expunge_all()
    return drains


LIVE_SECONDS = 15.0  # a worker that has not reported for this long counts as gone

FORGET_SECONDS = 3600.0

RELEASE = version("celeriac")


@dataclass(frozen=True, slots=True)
class WorkerReport:
    """What a worker reports about itself; `id` is new for each process and is also the lease owner."""

    id: UUID
    hostname: str
    model: str
    max_num_seqs: int
    num_running: int
    tokens_per_second: float
    model_revision: str | None = None
    state: WorkerState = WorkerState.READY
    load_percent: int | None = None  # of a model that is being loaded, if the engine can tell
    ready_in_seconds: float | None = None  # an estimate for a model that is not loaded; None: unknown
    cache_usage: float | None = None  # share of the engine's key/value cache, 0 to 1; None: unknown
    memory_bytes: int | None = None  # of the device that the engine holds, or else its own; None: unknown
    troubles: dict[str, str] = field(default_factory=dict)  # by domain/troubles.py; an operator may read the words
    release: str = RELEASE  # of this software


@dataclass(frozen=True, slots=True)
class Orders:
    """What admins want a worker to do."""

    is_loaded: bool  # whether its model should be loaded
    clock: float  # of the database, in seconds since 1970
    release_after_seconds: float | None = None  # accept no jobs and release running ones after this; None: accept jobs


def heartbeat(session: Session, report: WorkerReport) -> Orders:
    """Report that the worker is alive, and its state; call every few seconds. Also drops workers that are long silent.
    Returns its orders."""
    statement = insert(Worker).values(**asdict(report))
    changed = {name: statement.excluded[name] for name in asdict(report) if name != "id"}
    upsert = statement.on_conflict_do_update(
        index_elements=[Worker.id], set_={**changed, "seen_at": func.statement_timestamp()}
    )
    clock = session.execute(upsert.returning(func.extract("epoch", func.clock_timestamp()))).scalar_one()
    _forget_silent(session)
    order = find_drain(session, report.hostname)
    release_after_seconds = order.release_after_seconds if order else None
    return Orders(is_model_loaded(session, report.model), float(clock), release_after_seconds)


def _forget_silent(session: Session) -> None:
    """Rows that another process is deleting are left to it, or two could wait for each other."""
    silent = select(Worker.id).where(Worker.seen_at < _seconds_ago(FORGET_SECONDS)).with_for_update(skip_locked=True)
    session.execute(delete(Worker).where(Worker.id.in_(silent)))


def fail(session: Session, report: WorkerReport) -> None:
    """Leave the reason why it cannot serve its model, where it is found after its end. It does not count as live, and
    replaces what was left on its machine before."""
    _forget_silent(session)
    left_before = delete(Worker).where(Worker.hostname == report.hostname, Worker.model == report.model)
    session.execute(left_before.where(Worker.seen_at <= _seconds_ago(LIVE_SECONDS), Worker.troubles != {}))
    seen_at = _seconds_ago(LIVE_SECONDS)
    statement = insert(Worker).values(**asdict(report), seen_at=seen_at)
    session.execute(
        statement.on_conflict_do_update(
            index_elements=[Worker.id], set_={"seen_at": seen_at, "troubles": report.troubles}
        )
    )


def forget(session: Session, worker_id: UUID) -> None:
    """Remove a worker that shuts down."""
    session.execute(delete(Worker).where(Worker.id == worker_id))


# The other workers are those that will take a job of this model soon.
LONGEST_WAIT = text(f"""
SELECT extract(epoch FROM {CLOCK} - min(j.created_at))::float8 FROM jobs j
WHERE j.model = :model AND {RUNNABLE} AND j.cancel_requested_at IS NULL
    AND (NOT {BEGUN} OR j.model_revision = :model_revision)
    AND NOT EXISTS (SELECT FROM workers w WHERE w.model = :model AND w.id <> :worker_id
        AND w.seen_at > {CLOCK} - make_interval(secs => :live_seconds)
        AND (w.state = 'loading' OR (w.state = 'ready' AND w.num_running < w.max_num_seqs)))
""")


def longest_wait_seconds(session: Session, worker_id: UUID, *, model: str, model_revision: str) -> float | None:
    """How long the oldest queued job that this worker could run has been waiting; None if there is no such job, or if
    another worker is loading the model or has free slots for it."""
    bound = {"model": model, "model_revision": model_revision, "worker_id": worker_id, "live_seconds": LIVE_SECONDS}
    seconds: float | None = session.scalar(LONGEST_WAIT, bound)
    return seconds


def list_live(session: Session, *, model: str | None = None) -> Sequence[Worker]:
    """The workers that reported within LIVE_SECONDS, in any state, oldest first."""
    statement = select(Worker).where(Worker.seen_at > _seconds_ago(LIVE_SECONDS)).order_by(Worker.started_at)
    if model is not None:
        statement = statement.where(Worker.model == model)
    workers = session.scalars(statement.execution_options(populate_existing=True)).all()
    session.expunge_all()
    return workers


def _seconds_ago(seconds: float) -> ColumnElement[datetime]:
    return func.statement_timestamp() - func.make_interval(0, 0, 0, 0, 0, 0, seconds)
