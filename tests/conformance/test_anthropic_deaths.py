"""The `anthropic` SDK while worker and API behind it are killed: its own retry, or the request repeated under its key,
has the whole text, once."""

import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import UUID

import anthropic
import httpx2
import pytest

from domain.jobs import external_id
from tests.chaos.plant import Plant, start_prepared
from tests.conformance.test_openai_deaths import MODEL, MODELS, NUM_TOKENS, kill_the_worker_of, said
from tests.waiting import wait_until

pytestmark = pytest.mark.slow

ASKED: Any = {"model": MODEL, "max_tokens": NUM_TOKENS, "messages": [{"role": "user", "content": "Hi"}]}


@pytest.fixture
def plant() -> Iterator[Plant]:
    folder = Path(tempfile.mkdtemp(prefix="celeriac-deaths-"))
    settings = {"lease_seconds": 3, "flush_min_seconds": 0.02, "flush_max_seconds": 0.1}
    with Plant(
        folder, models=MODELS, worker_models={"gpu-1": MODEL, "gpu-2": MODEL}, settings=settings, start=start_prepared
    ) as plant:
        plant.start_servers()
        plant.start_parts()
        plant.wait_until_ready()
        yield plant
    shutil.rmtree(folder, ignore_errors=True)


def running_job(plant: Plant) -> str | None:
    """The id of the job that has said something, once there is one."""
    query = "SELECT id FROM jobs WHERE status = 'in_progress' AND num_committed_tokens > 0"
    with plant.connect() as connection:
        row = connection.execute(query).fetchone()
    return None if row is None else external_id(UUID(str(row[0])))


def num_jobs(plant: Plant) -> int:
    with plant.connect() as connection:
        [[count]] = connection.execute("SELECT count(*) FROM jobs").fetchall()
    return int(str(count))


def test_a_message_comes_once_over_the_deaths_of_worker_and_api(plant: Plant) -> None:
    with anthropic.Anthropic(base_url=plant.api_urls[0], api_key="any", timeout=60, max_retries=10) as client:
        with ThreadPoolExecutor(1) as threads:
            ask: Any = client.messages.create
            asking = threads.submit(ask, **ASKED)
            job_id = wait_until(lambda: running_job(plant))
            kill_the_worker_of(plant, job_id)
            plant.apis[0].kill()
            plant.apis[0].start()
            message = asking.result()
        assert message.content[0].to_dict()["text"] == said(plant, message.id)
        assert (message.id.replace("msg_", "job_"), message.stop_reason, num_jobs(plant)) == (job_id, "max_tokens", 1)
        plant.wait_until_ready()
        key = {"Idempotency-Key": "the-same"}
        pieces: list[str] = []
        with (
            suppress(anthropic.APIError, httpx2.HTTPError),
            client.messages.stream(**ASKED, extra_headers=key) as stream,
        ):
            for text in stream.text_stream:
                pieces.append(text)
                if len(pieces) == 10:
                    kill_the_worker_of(plant, stream.current_message_snapshot.id)
                    plant.apis[0].kill()
        assert len(pieces) >= 10, "the stream was cut in the middle"
        plant.apis[0].start()
        plant.wait_until_ready()
        with client.messages.stream(**ASKED, extra_headers=key) as stream:
            whole = stream.get_final_text()
            message_id = stream.current_message_snapshot.id
        assert whole.startswith("".join(pieces))
        assert whole == said(plant, message_id)
        assert num_jobs(plant) == 2
