"""Webhooks arrive: signed, at least once under one id, again after a failure, and nobody else's."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import openai
import pytest
from sqlalchemy import select, text
from sqlalchemy.orm import Session, sessionmaker

from domain.jobs import external_id, new_id
from domain.webhooks import EVENT_TYPES, DeliveryStatus, new_secret
from settings import Settings
from storage import jobs, webhook_deliveries, webhooks
from storage.tables import DEFAULT_TENANT_ID
from storage.webhooks import WebhookAttempt, WebhookDelivery, WebhookEndpoint
from tests.conftest import MakeJob
from tests.waiting import wait_until
from tests.webhook_receiver import Received, Receiver, receiving, sending

ALL = ["completed", "failed", "cancelled", "expired"]
REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as receiver:
        yield receiver


@pytest.fixture
def sender_settings(database_url: str) -> Settings:
    return Settings(database_url=database_url, webhook_private_targets=True)


@pytest.fixture
def add_endpoint(session_factory: sessionmaker[Session], receiver: Receiver) -> Any:
    def add(**columns: object) -> WebhookEndpoint:
        defaults = {"name": "mine", "url": receiver.url(), "event_types": EVENT_TYPES}
        with session_factory.begin() as session:
            endpoint = webhooks.create_endpoint(session, DEFAULT_TENANT_ID, **(defaults | columns))  # type: ignore[arg-type]
        assert endpoint is not None
        return endpoint

    return add


def end_job(session: Session, make_job: MakeJob, **columns: object) -> UUID:
    job = make_job(**columns)
    jobs.cancel(session, job.id, job.tenant_id)
    session.commit()
    return job.id


def deliveries(session: Session) -> list[WebhookDelivery]:
    session.rollback()
    query = select(WebhookDelivery).order_by(WebhookDelivery.created_at)
    return list(session.scalars(query.execution_options(populate_existing=True)))


def is_settled(session: Session) -> bool:
    return all(delivery.status is not DeliveryStatus.PENDING for delivery in deliveries(session))


def unwrap(received: Received, secret: str) -> Any:
    client = openai.OpenAI(api_key="none", webhook_secret=secret)
    return client.webhooks.unwrap(received.body, received.headers)


def move_clock(session: Session, hours: float) -> None:
    """As if so much time had passed."""
    session.execute(
        text(
            "UPDATE webhook_deliveries SET next_attempt_at = next_attempt_at - make_interval(secs => :s),"
            " retry_until = retry_until - make_interval(secs => :s)"
        ),
        {"s": hours * 3600},
    )
    session.commit()


def test_the_sdk_unwraps_what_an_endpoint_receives(
    session: Session, make_job: MakeJob, receiver: Receiver, add_endpoint: Any, sender_settings: Settings
) -> None:
    endpoint = add_endpoint()
    job_id = end_job(session, make_job)
    with sending(sender_settings):
        wait_until(lambda: is_settled(session))
    [received] = receiver.received
    event = unwrap(received, endpoint.secret)
    assert (event.id, event.type) == (external_id(job_id, "evt"), "job.cancelled")
    assert (event.object, event.data.id) == ("event", external_id(job_id))
    assert received.headers["webhook-id"] == event.id
    assert received.headers["host"] == f"localhost:{receiver.port}"
    with pytest.raises(openai.InvalidWebhookSignatureError):
        unwrap(received, new_secret())


def test_the_url_of_a_job_is_signed_with_the_tenants_secret(
    session: Session, make_job: MakeJob, receiver: Receiver, sender_settings: Settings
) -> None:
    end_job(session, make_job, webhook_url=receiver.url("/mine?x=1"), webhook_statuses=ALL)
    with sending(sender_settings):
        wait_until(lambda: is_settled(session))
    secret = webhooks.tenant_secret(session, DEFAULT_TENANT_ID).secret
    assert receiver.received[0].path == "/mine?x=1"
    assert unwrap(receiver.received[0], secret).type == "job.cancelled"


def test_both_secrets_sign_while_one_replaces_the_other(
    session: Session, make_job: MakeJob, receiver: Receiver, add_endpoint: Any, sender_settings: Settings
) -> None:
    old = add_endpoint()
    new = webhooks.rotate_secret(session, old.id, DEFAULT_TENANT_ID, with_overlap=True)
    assert new is not None
    first, second, third = old.secret, new.secret, None
    session.commit()
    with sending(sender_settings):
        end_job(session, make_job)
        wait_until(lambda: len(receiver.received) == 1)
        third = webhooks.rotate_secret(session, old.id, DEFAULT_TENANT_ID, with_overlap=False)
        assert third is not None
        end_job(session, make_job)
        wait_until(lambda: len(receiver.received) == 2)
    for secret in (first, second):
        assert unwrap(receiver.received[0], secret).type == "job.cancelled"
        with pytest.raises(openai.InvalidWebhookSignatureError):
            unwrap(receiver.received[1], secret)
    assert unwrap(receiver.received[1], third.secret).type == "job.cancelled"


@pytest.mark.parametrize("status", [302, 400, 404, 500])
def test_what_is_not_2xx_is_tried_again_under_the_same_id(
    session: Session, make_job: MakeJob, receiver: Receiver, add_endpoint: Any, sender_settings: Settings, status: int
) -> None:
    statuses = iter([status, 200])
    receiver.answer = lambda _: next(statuses)
    receiver.answer_headers = {"location": receiver.url("/elsewhere")}
    endpoint = add_endpoint()
    end_job(session, make_job)
    with sending(sender_settings):
        wait_until(lambda: deliveries(session)[0].last_error)
        [delivery] = deliveries(session)
        assert (delivery.status, delivery.last_status_code) == (DeliveryStatus.PENDING, status)
        move_clock(session, 5.5 / 3600)
        wait_until(lambda: is_settled(session))
    first, second = receiver.received
    assert first.path == second.path == "/hook"  # no redirect was followed
    assert first.headers["webhook-id"] == second.headers["webhook-id"]
    assert first.body == second.body
    unwrap(second, endpoint.secret)
    attempts = session.scalars(select(WebhookAttempt).order_by(WebhookAttempt.number)).all()
    assert [(attempt.number, attempt.status_code) for attempt in attempts] == [(1, status), (2, 200)]


def test_it_is_given_up_after_72_hours_of_the_schedule(session: Session, make_job: MakeJob, receiver: Receiver) -> None:
    """By the statements alone: the waits are those of the schedule, and the last one is never begun."""
    end_job(session, make_job, webhook_url=receiver.url(), webhook_statuses=ALL)
    waits: list[float] = []
    while not is_settled(session):
        [claimed] = webhook_deliveries.claim(
            session,
            room=9,
            room_per_tenant=9,
            room_by_tenant={},
            room_per_host=9,
            room_by_host={},
            lease_seconds=30,
        )
        outcome = webhook_deliveries.Outcome(claimed, DeliveryStatus.PENDING, 500, "no", 0.1)
        webhook_deliveries.record(session, [outcome])
        wait = text("SELECT extract(epoch FROM next_attempt_at - statement_timestamp()) FROM webhook_deliveries")
        waits.append(float(session.execute(wait).scalar_one()))
        session.commit()
        move_clock(session, waits[-1] / 3600)
    schedule = [5, 30, 120, 600, 3600, 4 * 3600, 12 * 3600, 24 * 3600, 24 * 3600, 24 * 3600]
    assert len(waits) == len(schedule)
    assert all(0.89 * wanted < wait < 1.11 * wanted for wait, wanted in zip(waits, schedule, strict=True))
    assert deliveries(session)[0].status is DeliveryStatus.FAILED


def test_410_disables_the_endpoint_and_gives_up_what_waits(
    session: Session, make_job: MakeJob, receiver: Receiver, add_endpoint: Any, sender_settings: Settings
) -> None:
    receiver.answer = lambda _: 410
    endpoint = add_endpoint()
    end_job(session, make_job)
    later = end_job(session, make_job)
    session.execute(
        text("UPDATE webhook_deliveries SET next_attempt_at = now() + interval '1 hour' WHERE event_id = :id"),
        {"id": later},
    )
    session.commit()
    with sending(sender_settings):
        wait_until(lambda: is_settled(session))
    assert [delivery.status for delivery in deliveries(session)] == [DeliveryStatus.FAILED] * 2
    stored = webhooks.get_endpoint(session, endpoint.id, DEFAULT_TENANT_ID)
    assert stored is not None
    assert stored.disabled_at is not None
    end_job(session, make_job)
    assert len(deliveries(session)) == 2
    assert len(receiver.received) == 1


def test_a_sender_killed_before_it_could_record_leaves_it_to_another(
    session: Session, make_job: MakeJob, receiver: Receiver, database_url: str, sender_settings: Settings
) -> None:
    """Between send and commit: the receiver has answered nothing yet, but it has the event."""
    is_killed = threading.Event()
    receiver.answer = lambda _: 200 if is_killed.wait(300) else 500
    end_job(session, make_job, webhook_url=receiver.url(), webhook_statuses=ALL)
    sender = start_sender_process(database_url)
    wait_until(lambda: len(receiver.received) == 1)
    os.kill(sender.pid, signal.SIGKILL)
    sender.wait()
    is_killed.set()
    assert not is_settled(session)
    move_clock(session, 1 / 60)  # the lease is over
    with sending(sender_settings):
        wait_until(lambda: is_settled(session))
    first, second = receiver.received
    assert first.headers["webhook-id"] == second.headers["webhook-id"]
    assert json.loads(first.body)["id"] == json.loads(second.body)["id"]
    assert deliveries(session)[0].status is DeliveryStatus.DELIVERED


def test_two_senders_send_each_delivery_once(
    session: Session, make_job: MakeJob, receiver: Receiver, database_url: str, sender_settings: Settings
) -> None:
    num_jobs = 60
    senders = [start_sender_process(database_url) for _ in range(2)]
    try:
        for number in range(num_jobs):
            end_job(session, make_job, webhook_url=receiver.url(f"/{number}"), webhook_statuses=ALL)
        wait_until(lambda: is_settled(session))
    finally:
        for sender in senders:
            sender.kill()
            sender.wait()
    counts = Counter(received.headers["webhook-id"] for received in receiver.received)
    assert len(counts) == num_jobs
    assert set(counts.values()) == {1}


def test_a_host_that_does_not_answer_blocks_no_other(
    session: Session, make_job: MakeJob, receiver: Receiver, sender_settings: Settings
) -> None:
    is_over = threading.Event()
    with receiving() as slow:
        slow.answer = lambda _: 200 if is_over.wait(300) else 500
        for _ in range(40):
            end_job(session, make_job, webhook_url=slow.url(), webhook_statuses=ALL)
        with sending(sender_settings):
            wait_until(lambda: len(slow.received) == 16)
            fast = end_job(session, make_job, webhook_url=receiver.url(), webhook_statuses=ALL)
            wait_until(lambda: receiver.received)
            assert json.loads(receiver.received[0].body)["data"]["id"] == external_id(fast)
            assert len(slow.received) == 16  # the bound of one host
            is_over.set()
            wait_until(lambda: is_settled(session))


def test_a_deleted_endpoint_is_not_told_even_of_what_was_written_meanwhile(
    session: Session, receiver: Receiver, sender_settings: Settings
) -> None:
    orphan = WebhookDelivery(
        tenant_id=DEFAULT_TENANT_ID, event_id=new_id(), type="job.failed", endpoint_id=new_id(), url=receiver.url()
    )
    session.add(orphan)
    session.commit()
    with sending(sender_settings):
        wait_until(lambda: is_settled(session))
    assert deliveries(session)[0].last_error == "the endpoint was deleted"
    assert receiver.received == []


def test_a_large_answer_is_not_read(
    session: Session, make_job: MakeJob, receiver: Receiver, sender_settings: Settings
) -> None:
    receiver.answer_body = b"x" * 50_000_000
    end_job(session, make_job, webhook_url=receiver.url(), webhook_statuses=ALL)
    with sending(sender_settings):
        wait_until(lambda: is_settled(session))
    assert deliveries(session)[0].status is DeliveryStatus.DELIVERED


def test_a_private_address_is_not_connected_to(
    session: Session, make_job: MakeJob, receiver: Receiver, database_url: str
) -> None:
    """Also where the URL came into the database when it was allowed."""
    end_job(session, make_job, webhook_url=receiver.url(), webhook_statuses=ALL)
    with sending(Settings(database_url=database_url)):
        wait_until(lambda: deliveries(session)[0].last_error)
    assert receiver.num_connections == 0


def test_what_is_done_is_pruned_after_a_week(session: Session, make_job: MakeJob, receiver: Receiver) -> None:
    end_job(session, make_job, webhook_url=receiver.url(), webhook_statuses=ALL)
    session.execute(text("UPDATE webhook_deliveries SET created_at = now() - interval '8 days'"))
    assert webhook_deliveries.prune(session) == 0
    session.execute(text("UPDATE webhook_deliveries SET status = 'failed'"))
    assert webhook_deliveries.prune(session) == 1


def start_sender_process(database_url: str) -> subprocess.Popen[bytes]:
    script = REPOSITORY / "tests/integration/webhook_sender_process.py"
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    return subprocess.Popen([sys.executable, str(script), database_url], env=environment)
