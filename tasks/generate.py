"""The GPU task, as the queue sees it. Its id is the job's external id and it has no arguments: the rest is in SQL.

The body never runs on a GPU worker: there the pool hands the delivery to the engine (`gpu_worker/pool.py`).
"""

from celery import Task

from tasks.app import app
from tasks.messages import GENERATE


class WrongWorker(RuntimeError):
    """A generation reached a worker that has no engine."""


@app.task(name=GENERATE, bind=True)
def generate(self: Task) -> None:
    """Generate text for the job whose external id is this task's id."""
    raise WrongWorker(
        f"{self.request.id} reached {self.request.hostname}, a worker without an engine; "
        "serve a model's queue with `celery -A gpu_worker.app worker`"
    )
