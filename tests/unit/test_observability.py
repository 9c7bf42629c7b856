"""Logs name what they are about and keep the rest to themselves."""

import json
import logging
import re
from collections.abc import Iterator
from typing import Literal

import pytest
from celery.worker.consumer.consumer import CONNECTION_RETRY
from prometheus_client import Counter, Gauge, Histogram

import observability
from observability import configure_logging, describe_exception, job_context, request_id_context
from settings import ROOT

SECRET = "my diary entry"
METRICS = {name: one for name, one in vars(observability).items() if isinstance(one, Counter | Gauge | Histogram)}


@pytest.fixture(autouse=True)
def root_logger() -> Iterator[None]:
    """Configuring is for the whole process: put it back."""
    root = logging.getLogger()
    handlers, level = root.handlers, root.level
    yield
    root.handlers, root.level = handlers, level


def test_json_lines_carry_the_ids_of_what_is_being_worked_on(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("INFO", "json")
    token = request_id_context.set("req_1")
    with job_context("job_1"):
        logging.getLogger("here").info("accepted", extra={"num_jobs": 3})
    request_id_context.reset(token)
    logging.getLogger("here").info("outside")
    first, second = map(json.loads, capsys.readouterr().err.splitlines())
    assert (
        first.items()
        >= {
            "level": "INFO",
            "logger": "here",
            "message": "accepted",
            "num_jobs": 3,
            "job_id": "job_1",
            "request_id": "req_1",
        }.items()
    )
    assert "time" in first
    assert not {"job_id", "request_id", "context"} & second.keys()


def test_an_id_given_with_the_line_wins(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("INFO", "json")
    with job_context("job_1"):
        logging.getLogger("here").info("another", extra={"job_id": "job_2"})
    assert json.loads(capsys.readouterr().err)["job_id"] == "job_2"


def test_text_lines_carry_them_too(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("INFO", "text")
    with job_context("job_1"):
        logging.getLogger("here").warning("late")
    assert capsys.readouterr().err.endswith("WARNING here: late job_id=job_1\n")


@pytest.mark.parametrize("log_format", ["json", "text"])
def test_a_line_holds_all_that_it_was_given(
    capsys: pytest.CaptureFixture[str], log_format: Literal["json", "text"]
) -> None:
    configure_logging("INFO", log_format)
    logging.getLogger("test").warning("not done", extra={"reason": "the pooler said no", "num_tries": 3})
    line = capsys.readouterr().err
    assert "the pooler said no" in line
    assert "num_tries" in line


@pytest.mark.parametrize("log_format", ["json", "text"])
def test_an_exception_shows_where_but_not_the_values_below_its_first_line(
    capsys: pytest.CaptureFixture[str], log_format: str
) -> None:
    configure_logging("INFO", log_format)  # type: ignore[arg-type]
    message = f"violates a constraint\nDETAIL: {SECRET}"
    try:
        try:
            raise RuntimeError(message)
        except RuntimeError as exc:
            raise ValueError(message) from exc
    except ValueError:
        logging.getLogger("here").exception("accept failed")
    shown = capsys.readouterr().err
    assert "ValueError: violates a constraint" in shown
    assert "test_observability.py" in shown
    assert "caused by RuntimeError: violates" in shown
    assert SECRET not in shown


def test_a_description_is_one_short_line() -> None:
    assert describe_exception(ValueError("a\nb")) == "ValueError: a"
    assert describe_exception(TimeoutError()) == "TimeoutError"
    assert len(describe_exception(ValueError("x" * 10_000))) < 400


def test_chatty_libraries_are_kept_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("DEBUG", "json")
    logging.getLogger("sqlalchemy.engine").info("INSERT %s", SECRET)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("log_format", ["json", "text"])
def test_a_lost_broker_is_one_line(capsys: pytest.CaptureFixture[str], log_format: Literal["json", "text"]) -> None:
    configure_logging("INFO", log_format)
    logging.getLogger("celery.worker.consumer.consumer").warning("%s (%r)", CONNECTION_RETRY, OSError("Broken pipe"))
    [line] = capsys.readouterr().err.splitlines()
    assert "Connection to broker lost. Trying to re-establish the connection... (OSError('Broken pipe'))" in line


def rows_of_the_document() -> dict[str, tuple[str, tuple[str, ...], set[str]]]:
    """By metric: its type, its labels, and the processes that count it."""
    rows = {}
    for line in (ROOT / "docs/metrics.md").read_text().splitlines():
        if line.startswith("| `"):
            name, kind, labels, processes, _ = (cell.strip() for cell in line.strip("|").split(" | "))
            rows[name.strip("`")] = (kind, tuple(re.findall(r"`(\w+)`", labels)), set(processes.split(", ")))
    return rows


def test_the_document_of_metrics_is_that_of_the_code() -> None:
    declared = {name: (type(one).__name__.lower(), one._labelnames) for name, one in METRICS.items()}
    assert {name: row[:2] for name, row in rows_of_the_document().items()} == declared


@pytest.mark.parametrize("name", METRICS)
def test_the_document_says_which_process_counts_a_metric(name: str) -> None:
    """So that nobody waits for a sample where none can come."""
    packages = {
        "api": "API",
        "maintenance": "maintenance",
        "gpu_worker": "worker",
        "tasks": "tasks",
        "storage": "tasks",
        "dialects": "tasks",
        "text": "tasks",
    }
    users = {
        process
        for package, process in packages.items()
        for file in (ROOT / package).rglob("*.py")
        if re.search(rf"\b{name}\b", file.read_text())
    }
    if len(re.findall(rf"\b{name}\b", (ROOT / "observability.py").read_text())) > 2:
        users.add("tasks")  # written beside its declaration
    _, _, told = rows_of_the_document()[name]
    if "tasks" in users:  # which several processes run
        assert told - {"API", "maintenance", "worker"} == set()
        assert users - {"tasks"} <= told
    else:
        assert told == (users or {"nobody"})
