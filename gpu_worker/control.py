"""Celery's stock commands where a GPU worker does something else than stock; its own are in `tasks.control`.

Everything here runs on Celery's hub thread: answer from memory, start nothing that waits.
"""

from collections.abc import Sequence
from typing import Any

from celery.utils.functional import maybe_list
from celery.worker import control as stock
from celery.worker.control import control_command


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
