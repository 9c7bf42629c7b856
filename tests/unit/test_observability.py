"""Logs name what they are about and keep the rest to themselves."""

import json
import logging
import re
import socket
import sys
from collections.abc import Iterator
from contextlib import closing, suppress
from typing import Literal

import httpx
import pytest
from celery.worker.consumer.consumer import CONNECTION_RETRY
from prometheus_client import Counter, Gauge, Histogram, generate_latest

import metrics
import observability
from metrics import Process, registries, serve_metrics
from observability import configure_logging, describe_exception, job_context, request_id_context
from settings import ROOT
from tests.waiting import SECONDS

SECRET = "my diary entry"
METRICS = {name: one for name, one in vars(metrics).items() if isinstance(one, Counter | Gauge | Histogram)}


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


def rows_of_the_document() -> dict[str, tuple[str, tuple[str, ...], tuple[str, ...], set[str]]]:
    """By metric: its type, its labels, the processes that count it, and what vLLM calls it."""
    rows = {}
    for line in (ROOT / "docs/metrics.md").read_text().splitlines():
        if line.startswith("| `"):
            name, kind, labels, processes, _, aliases = (cell.strip() for cell in line.strip("|").split(" | "))
            names = tuple(re.findall(r"`(\w+)`", labels))
            rows[name.strip("`")] = (
                kind,
                names,
                tuple(processes.split(", ")),
                set(re.findall(r"`(vllm:\w+)`", aliases)),
            )
    return rows


def test_the_document_of_metrics_is_that_of_the_code() -> None:
    told = {name: row[:3] for name, row in rows_of_the_document().items()}
    declared = {}
    for name, one in METRICS.items():
        kind = next(cls for cls in (Counter, Gauge, Histogram) if isinstance(one, cls))
        processes = tuple(process for process in Process if one in registries[process]._collector_to_names)
        declared[f"celeriac_{name}"] = (kind.__name__.lower(), one._labelnames, processes)
    assert told == declared


@pytest.mark.parametrize("process", Process)
def test_the_document_has_the_names_of_vllm(process: Process) -> None:
    told = set().union(*(row[3] for row in rows_of_the_document().values() if process in row[2]))
    served = set(re.findall(r"^# TYPE (vllm:\w+)", generate_latest(registries[process]).decode(), re.MULTILINE))
    assert served <= told


def test_a_name_of_vllm_is_a_view_of_the_same_numbers() -> None:
    finished = metrics.jobs_finished_total
    for status, reason, count in [
        ("completed", "stop", 1),
        ("completed", "length", 2),
        ("failed", "error", 4),
        ("cancelled", "cancelled", 8),
        ("expired", "deadline", 16),
    ]:
        finished.labels("alias-model", status, reason).inc(count)
    metrics.jobs_queue_seconds.labels("alias-model").observe(0.3)
    labels = {"model_name": "alias-model", "engine": "0"}
    value = registries[Process.WORKER].get_sample_value
    told = {
        reason: value("vllm:request_success_total", labels | {"finished_reason": reason})
        for reason in ("stop", "length", "error", "abort")
    }
    assert told == {"stop": 1, "length": 2, "error": 4, "abort": 24}
    assert value("vllm:request_queue_time_seconds_bucket", labels | {"le": "0.25"}) == 0
    assert value("vllm:request_queue_time_seconds_bucket", labels | {"le": "0.5"}) == 1
    assert value("vllm:request_queue_time_seconds_sum", labels) == 0.3


def test_no_label_can_hold_what_a_client_wrote() -> None:
    """Each of these has few values, all of them ours or the operator's."""
    labels = {label for one in METRICS.values() for label in one._labelnames}
    assert labels == {
        "clock",
        "finish_reason",
        "is_before_p90",
        "label",
        "method",
        "model",
        "name",
        "outcome",
        "reason",
        "route",
        "status",
    }


def test_workers_of_one_machine_share_no_port() -> None:
    with closing(socket.socket()) as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        url = serve_metrics(Process.WORKER, "127.0.0.1", port)
    assert url is not None
    assert url != f"http://127.0.0.1:{port}/metrics"
    assert "celeriac_engine_steps_total" in httpx.get(url, timeout=SECONDS).text


def test_an_address_that_is_not_ours_is_said_and_does_no_harm(caplog: pytest.LogCaptureFixture) -> None:
    assert serve_metrics(Process.WORKER, "192.0.2.1", 0) is None
    assert "cannot serve metrics on 192.0.2.1" in caplog.text


def test_lines_that_a_full_disk_takes_no_more_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(observability, "_lost", None)
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stderr", full)
        configure_logging("INFO", "text")
        assert observability.lost_lines() is None
        logging.getLogger("here").info("a line")
        assert observability.lost_lines() == "No space left on device"
        with suppress(OSError):
            full.close()
