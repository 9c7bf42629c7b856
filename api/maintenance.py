"""Entry of the maintenance worker: the janitor of `tasks`, and batches, whose lines are bodies of our own routes."""

from functools import lru_cache

from api.openai.batch_lines import batch_surface
from domain.catalog import Catalog
from settings import get_settings
from storage.database import open_database, session_factory
from tasks.app import app
from tasks.batches import BatchWork
from tasks.messages import BATCH_TICK
from tasks.models import ModelViews

_interval_seconds = get_settings().janitor_interval_seconds
app.conf.beat_schedule |= {
    "batches": {"task": BATCH_TICK, "schedule": _interval_seconds, "options": {"expires": 10 * _interval_seconds}}
}


@lru_cache(maxsize=1)
def batch_work() -> BatchWork:
    """This process's. Models are loaded when they are first needed."""
    settings = get_settings()
    database = open_database(
        settings.database_url, pool_size=1, max_overflow=1, idle_seconds=settings.idle_transaction_seconds
    )
    views = ModelViews(Catalog.load(settings.models_file))
    return BatchWork(session_factory(database), views, settings, batch_surface(views))


@app.task(name=BATCH_TICK, send_events=False)
def tick_batches() -> None:
    """Take every unfinished batch as far as it can go now."""
    batch_work().tick()
