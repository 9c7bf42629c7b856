"""Which GPU workers are to take no jobs: an operator's order to one worker, by its name, kept until it is taken back.

It outlives the worker's process: what comes back under the same name drains on, since whoever asked for it did not ask
for a restart. What is not asked for is no row.
"""

from collections.abc import Sequence

from sqlalchemy import delete, func, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from storage.tables import Worker, WorkerDrain

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


def find(session: Session, hostname: str) -> WorkerDrain | None:
    """The order to this worker."""
    found = session.get(WorkerDrain, hostname, populate_existing=True)
    session.expunge_all()
    return found


def list_all(session: Session) -> Sequence[WorkerDrain]:
    """Every order, oldest first."""
    drains = session.scalars(select(WorkerDrain).order_by(WorkerDrain.since, WorkerDrain.hostname)).all()
    session.expunge_all()
    return drains
