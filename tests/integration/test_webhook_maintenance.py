"""Maintenance sends webhooks, and ends when it is told to."""

import os
import subprocess
import sys
from pathlib import Path

from sqlalchemy import select
from sqlalchemy.orm import Session

from domain.webhooks import DeliveryStatus
from storage import jobs
from storage.webhooks import WebhookDelivery
from tests.conftest import MakeJob
from tests.waiting import wait_until
from tests.webhook_receiver import receiving

REPOSITORY = Path(__file__).resolve().parents[2]


def test_maintenance_sends_webhooks(session: Session, make_job: MakeJob, database_url: str, redis_url: str) -> None:
    environment = os.environ | {
        "CELERIAC_DATABASE_URL": database_url,
        "CELERIAC_REDIS_URL": redis_url,
        "CELERIAC_WEBHOOK_PRIVATE_TARGETS": "true",
    }
    with receiving() as receiver:
        job = make_job(webhook_url=receiver.url(), webhook_statuses=["cancelled"])
        jobs.cancel(session, job.id, job.tenant_id)
        session.commit()
        command = [str(Path(sys.executable).with_name("celeriac")), "maintenance"]
        worker = subprocess.Popen(command, env=environment, cwd=REPOSITORY, stderr=subprocess.DEVNULL)
        try:
            wait_until(lambda: receiver.received)
        finally:
            worker.terminate()
            assert worker.wait() == 0
    delivery = session.scalars(select(WebhookDelivery)).one()
    assert delivery.status is DeliveryStatus.DELIVERED  # recorded, though the worker was told to end
