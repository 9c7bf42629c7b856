"""What Celery's own commands (`celery -A tasks.app control|inspect`) may ask of GPU workers.

Here and not in `gpu_worker`, since the command line knows only what its app registers; the answers are the pool's. A
drain is asked of the runner, which writes it down: a message that is lost leaves no worker in a state nobody knows of.
"""

from typing import Any

from celery.utils.log import get_logger
from celery.worker.control import control_command, inspect_command

from settings import get_settings

logger = get_logger(__name__)


@inspect_command()
def engine_stats(state: Any, **_: Any) -> dict[str, Any]:
    """Figures of the engine."""
    pool = state.consumer.pool
    if not hasattr(pool, "engine_figures"):
        return _NO_ENGINE
    figures: dict[str, Any] = pool.engine_figures()
    return figures


@control_command(args=[("exit", int), ("seconds", float)], signature="[exit=0 [seconds=CELERIAC_DRAIN_SECONDS]]")
def engine_drain(state: Any, exit: int = 0, seconds: float | None = None, **_: Any) -> dict[str, str]:
    """Take no more jobs and let the running ones end; with exit=1 end the worker then.

    Without it the order holds for the worker's name until engine_resume, over restarts."""
    pool = state.consumer.pool
    if not hasattr(pool, "engine_figures"):
        return _NO_ENGINE
    release_after_seconds = get_settings().drain_seconds if seconds is None else seconds
    if exit:
        pool.shutdown.drain("the order engine_drain", release_after_seconds=release_after_seconds)
    else:
        logger.warning("draining on the order engine_drain: running jobs have %.0f seconds", release_after_seconds)
        pool.runner.order_drain(release_after_seconds=release_after_seconds)
    return {"ok": "draining"}


@control_command()
def engine_resume(state: Any, **_: Any) -> dict[str, str]:
    """Take jobs again after engine_drain."""
    pool = state.consumer.pool
    if not hasattr(pool, "engine_figures"):
        return _NO_ENGINE
    logger.warning("taking jobs again on the order engine_resume")
    pool.runner.order_resume()
    return {"ok": "taking jobs"}


_NO_ENGINE = {"error": "this worker has no engine; name one that has with -d NAME"}
