"""A client's Celery application: `celery -A tests.integration.celery_app worker`. What its tasks saw is in files."""

import os
from pathlib import Path
from typing import Any

from celery import Celery

from celeriac.celery import generate

FOLDER = Path(os.environ["CLIENT_APP_FOLDER"])

app = Celery("client", broker=os.environ["CLIENT_APP_BROKER"], backend=os.environ["CLIENT_APP_BACKEND"])
app.conf.update(
    celeriac_url=os.environ["CLIENT_APP_API"],
    celeriac_callbacks=os.environ["CLIENT_APP_CALLBACKS"] == "1",
    broker_connection_retry_on_startup=True,
    task_acks_late=True,
    task_reject_on_worker_lost=True,
    broker_transport_options={"visibility_timeout": 15},
    result_backend_transport_options={"visibility_timeout": 15},
)

__all__ = ["app", "generate"]


@app.task
def fetch(name: str) -> str:
    return f"Story of {name}"


@app.task(bind=True)
def store(self: Any, text: str, name: str) -> str:
    """Appends the text to a file of this name: a line for each time that it ran."""
    with (FOLDER / name).open("a") as file:
        file.write(f"{text!r}\n")
    return text


@app.task
def join(texts: list[str]) -> str:
    return "|".join(texts)


@app.task
def note_error(request: Any, exc: Exception, traceback: str | None, name: str = "errors") -> None:
    with (FOLDER / name).open("a") as file:
        file.write(f"{type(exc).__name__}: {exc}\n")
