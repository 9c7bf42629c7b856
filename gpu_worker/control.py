"""What can be asked of a running GPU worker (`celery inspect`, `celery control`, Flower), and its figures.

Everything here runs on Celery's hub thread: answer from memory, start nothing that waits.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from celery.utils.functional import maybe_list
from celery.utils.log import get_logger
from celery.worker import control as stock
from celery.worker.control import control_command, inspect_command

from settings import get_settings

if TYPE_CHECKING:
    from gpu_worker.pool import EnginePool

logger = get_logger(__name__)


def engine_figures(pool: "EnginePool") -> dict[str, Any]:
    """Flat and short: Flower prints it as one row."""
    stats = pool.runner.stats()
    return {
        "credit": pool.room().credit,
        "in_hand": pool.deliveries.num_in_hand,
        "running": stats.num_running,
        "free": pool.runner.num_free,
        "slots": stats.max_num_seqs,
        "ready": stats.is_engine_ready,
        "draining": pool.is_draining,
        "state": stats.state.value,
        "tokens_per_second": round(stats.tokens_per_second, 1),
        **stats.engine,
    }


@inspect_command()
def engine_stats(state: Any, **_: Any) -> dict[str, Any]:
    """Figures of the engine."""
    return engine_figures(state.consumer.pool)


@control_command(args=[("exit", int), ("seconds", float)], signature="[exit=0 [seconds=CELERIAC_DRAIN_SECONDS]]")
def engine_drain(state: Any, exit: int = 0, seconds: float | None = None, **_: Any) -> dict[str, str]:
    """Take no more jobs and let the running ones end; with exit=1 end the worker then."""
    release_after_seconds = get_settings().drain_seconds if seconds is None else seconds
    if exit:
        state.consumer.pool.shutdown.drain("the order engine_drain", release_after_seconds=release_after_seconds)
    else:
        logger.warning("draining on the order engine_drain: running jobs have %.0f seconds", release_after_seconds)
        state.consumer.pool.begin_drain(release_after_seconds=release_after_seconds)
    return {"ok": "draining"}


@control_command()
def engine_resume(state: Any, **_: Any) -> dict[str, str]:
    """Take jobs again after engine_drain."""
    logger.warning("taking jobs again on the order engine_resume")
    state.consumer.pool.resume()
    return {"ok": "taking jobs"}


@control_command(name="shutdown")
def shutdown(state: Any, msg: str = "", **_: Any) -> dict[str, str]:
    """Shutdown worker(s), as SIGTERM does."""
    state.consumer.pool.shutdown.drain("the order shutdown")
    return {"ok": "draining, then leaving"}


@control_command(name="revoke", variadic="task_id", signature="[id1 [id2 [... [idN]]]]")
def revoke(
    state: Any, task_id: str | Sequence[str], terminate: bool = False, signal: str | None = None, **options: Any
) -> Any:
    """Revoke task by task id (or list of ids)."""
    answer = stock.revoke(state, task_id, terminate=terminate, signal=signal, **options)
    state.consumer.pool.cancel_in_hand(maybe_list(task_id) or [])
    return answer
