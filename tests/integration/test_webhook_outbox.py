"""However a job ends, everybody who asked is told: once, in the transaction that ends it."""

from typing import Any
from uuid import uuid4

import psycopg
import pytest
from sqlalchemy import select
from sqlalchemy.orm import Session, sessionmaker

from domain.jobs import Endpoint, JobStatus, new_id
from domain.webhooks import EVENT_TYPES, new_secret
from storage import job_accept, jobs
from storage.tables import DEFAULT_TENANT_ID
from storage.webhooks import WebhookDelivery, WebhookEndpoint, write_deliveries
from tests.chaos import audit
from tests.conftest import MakeJob, MakeTenant
from tests.integration.test_storage_transitions import (
    CHANGES,
    CONDITIONAL_CHANGES,
    CONDITIONS,
    STATEMENTS,
    owner_of,
    run,
)
from tests.storage_samples import new_job

URL = "https://job.example/hook"
ENDPOINT_URL = "https://endpoint.example/hook"
ALL = [status.value for status in JobStatus if status.is_terminal]

ENDS: list[tuple[dict[str, object], JobStatus, str, JobStatus]] = [
    ({}, before, name, after) for (before, name), after in CHANGES.items() if after.is_terminal
] + [
    (CONDITIONS[condition][1], CONDITIONS[condition][0], name, after)
    for (condition, name), after in CONDITIONAL_CHANGES.items()
    if after.is_terminal
]


def add_endpoint(session: Session, **columns: object) -> WebhookEndpoint:
    defaults = {
        "id": new_id(),
        "tenant_id": DEFAULT_TENANT_ID,
        "name": "mine",
        "url": ENDPOINT_URL,
        "event_types": list(EVENT_TYPES),
        "secret": new_secret(),
    }
    endpoint = WebhookEndpoint(**(defaults | columns))
    session.add(endpoint)
    session.commit()
    return endpoint


def written(session: Session) -> list[tuple[str, str, bool]]:
    session.rollback()
    rows = session.scalars(select(WebhookDelivery).order_by(WebhookDelivery.url))
    return [(row.url, row.type, row.endpoint_id is not None) for row in rows]


@pytest.mark.parametrize(("columns", "before", "statement", "after"), ENDS, ids=[f"{e[2]} {e[3]}" for e in ENDS])
def test_every_end_is_written_once_for_each_destination(
    session: Session,
    make_job: MakeJob,
    columns: dict[str, object],
    before: JobStatus,
    statement: str,
    after: JobStatus,
) -> None:
    add_endpoint(session)
    job = make_job(status=before, webhook_url=URL, webhook_statuses=ALL, **columns)
    run(session, statement, job, owner_of(job))
    both = [(ENDPOINT_URL, f"job.{after}", True), (URL, f"job.{after}", False)]
    assert written(session) == both
    STATEMENTS[statement](session, job, owner_of(job))  # again, as after a commit whose answer was lost
    session.commit()
    assert written(session) == both


@pytest.mark.parametrize("statement", STATEMENTS)
def test_what_does_not_end_a_job_is_not_told(session: Session, make_job: MakeJob, statement: str) -> None:
    add_endpoint(session)
    for status in JobStatus:
        if (expected := CHANGES.get((status, statement))) is None or not expected.is_terminal:
            job = make_job(status=status, webhook_url=URL, webhook_statuses=ALL)
            run(session, statement, job, owner_of(job))
            assert written(session) == []
            jobs.delete(session, job.id, job.tenant_id)
            session.commit()


def test_only_the_ends_that_were_asked_for_are_told(session: Session, make_job: MakeJob) -> None:
    add_endpoint(session, event_types=["job.failed"])
    job = make_job(webhook_url=URL, webhook_statuses=["completed"])
    cancelled = jobs.cancel(session, job.id, job.tenant_id)
    assert cancelled is not None
    assert cancelled.status is JobStatus.CANCELLED
    session.commit()
    assert written(session) == []


@pytest.mark.parametrize(
    ("columns", "event"),
    [
        ({"status": JobStatus.COMPLETED, "finish_reason": "stop"}, "response.completed"),
        ({"status": JobStatus.COMPLETED, "finish_reason": "length"}, "response.incomplete"),
        ({"status": JobStatus.CANCELLED}, "response.cancelled"),
        ({"status": JobStatus.FAILED}, "response.failed"),
        ({"status": JobStatus.EXPIRED}, "response.failed"),
        ({"status": JobStatus.EXPIRED, "num_committed_tokens": 3}, "response.incomplete"),
    ],
)
def test_a_response_is_told_as_one_to_those_who_know_them(
    session: Session, make_job: MakeJob, columns: dict[str, Any], event: str
) -> None:
    status = columns["status"]
    add_endpoint(session, event_types=[event, f"job.{status}"], url="https://a.example/both")
    add_endpoint(session, event_types=[f"job.{status}"], url="https://b.example/jobs")
    add_endpoint(session, event_types=["batch.failed"], url="https://c.example/batches")
    job = make_job(endpoint=Endpoint.RESPONSES, **columns)
    write_deliveries(session, [job.id])
    session.commit()
    assert written(session) == [
        ("https://a.example/both", event, True),
        ("https://b.example/jobs", f"job.{status}", True),
    ]


def test_endpoints_of_others_and_disabled_ones_hear_nothing(
    session: Session, make_job: MakeJob, make_tenant: MakeTenant
) -> None:
    job = make_job()
    add_endpoint(session, tenant_id=make_tenant().id)
    add_endpoint(session, disabled_at=job.created_at)
    jobs.cancel(session, job.id, job.tenant_id)
    session.commit()
    assert written(session) == []


def test_an_end_that_is_rolled_back_is_not_told(session: Session, make_job: MakeJob) -> None:
    job = make_job(webhook_url=URL, webhook_statuses=ALL)
    jobs.cancel(session, job.id, job.tenant_id)
    session.rollback()
    assert written(session) == []


def test_an_accepted_job_keeps_whom_to_tell(session_factory: sessionmaker[Session], session: Session) -> None:
    told = new_job(webhook_url=URL, webhook_statuses=[JobStatus.CANCELLED], request_hash=uuid4().bytes)
    with session_factory.begin() as accepting:
        job_accept.accept(accepting, [told, new_job()], max_queued_jobs=10)
    jobs.cancel(session, told.id, told.tenant_id)
    session.commit()
    assert written(session) == [(URL, "job.cancelled", False)]


def test_the_chaos_audit_misses_no_end_that_was_not_told(
    session: Session, make_job: MakeJob, database_url: str
) -> None:
    with psycopg.connect(database_url, autocommit=True) as connection:
        audit.install(connection)
        job = make_job()
        jobs.cancel(session, job.id, job.tenant_id)
        session.commit()
        assert audit.judge_webhooks(connection) == []
        connection.execute("DELETE FROM webhook_deliveries")
        assert [violation.kind for violation in audit.judge_webhooks(connection)] == ["end not told once"]
