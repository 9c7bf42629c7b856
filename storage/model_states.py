"""Which models are to be loaded: what admins ask for, and GPU workers obey. A model without a row is loaded."""

from datetime import datetime

from sqlalchemy import func, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from storage.tables import ModelState


def set_loaded(session: Session, model: str, *, is_loaded: bool) -> datetime:
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


def is_loaded(session: Session, model: str) -> bool:
    """Whether it is to be loaded."""
    return session.scalar(select(ModelState.is_loaded).where(ModelState.model == model)) is not False


def unloaded_models(session: Session) -> frozenset[str]:
    """Those that are not to be loaded."""
    return frozenset(session.scalars(select(ModelState.model).where(~ModelState.is_loaded)))
