"""Streams of jobs whose chunks were deleted or damaged in the database: they end, and say so, in every dialect."""

from typing import Any

import httpx
import pytest
from sqlalchemy import text
from sqlalchemy.orm import Session, sessionmaker

from domain.jobs import external_id, parse_id
from tests.integration.api_harness import MODEL, HandWorker, all_events, open_events, post_job

Sessions = sessionmaker[Session]

TEXTS = ("Once ", "upon ", "a ", "time")

DAMAGES = {
    "one in the middle": "DELETE FROM job_chunks WHERE sequence_number = 2",
    "the last one": "DELETE FROM job_chunks WHERE sequence_number = 4",
    "all": "DELETE FROM job_chunks",
    "overwritten": """UPDATE job_chunks SET chunk = '{"oops": 1}' WHERE sequence_number = 3""",
    "no object": "UPDATE job_chunks SET chunk = 'null' WHERE sequence_number = 1",
    "renumbered": """UPDATE job_chunks SET chunk = '{"sequence_number": 9}' WHERE sequence_number = 3""",
}


def damage(sessions: Sessions, how: str) -> None:
    with sessions.begin() as session:
        session.execute(text(DAMAGES[how]))


@pytest.mark.parametrize("how", DAMAGES)
def test_a_jobs_streams_end_with_the_error(
    http: httpx.Client, hand_worker: HandWorker, session_factory: Sessions, how: str
) -> None:
    job_id: str = post_job(http)["id"]
    hand_worker.run(job_id, *TEXTS)
    damage(session_factory, how)
    for beginning in ("start", "snapshot"):
        last = all_events(http, job_id, params={"from": beginning})[-1]
        assert (last.name, last.id, last.data["error"]["code"]) == ("job.completed", "5", "job_unreadable")
        assert last.data["output"]["text"] == "".join(TEXTS), "the result can be read"
    assert http.get(f"/v1/jobs/{job_id}/events", params={"starting_after": 5}).status_code == 204
    read = http.get(f"/v1/jobs/{job_id}/stream")
    assert (read.status_code, read.json()["error"]["code"]) == (500, "job_unreadable")
    poll = http.get(f"/v1/jobs/{job_id}/stream", params={"live": "long-poll", "offset": "-1"})
    assert (poll.status_code, poll.json()["error"]["code"]) == (500, "job_unreadable")
    live = http.get(f"/v1/jobs/{job_id}/stream", params={"live": "sse", "offset": "-1"}).text
    assert "job_unreadable" in live
    assert '"streamClosed":true' in live


def test_the_stream_of_a_running_job_ends_with_the_job(
    http: httpx.Client, hand_worker: HandWorker, session_factory: Sessions
) -> None:
    """If it ended at once, its client would come back, again and again."""
    job_id: str = post_job(http)["id"]
    job = hand_worker.claim(job_id)
    hand_worker.say(job, *TEXTS[:3])
    damage(session_factory, "one in the middle")
    with open_events(http, job_id) as events:
        hand_worker.say(job, TEXTS[3], first=4)
        hand_worker.finish(job, *TEXTS)
        *_, last = events
    assert (last.name, last.data["error"]["code"]) == ("job.completed", "job_unreadable")


BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hi"}], "stream": True},
    "/v1/completions": {"prompt": "a", "stream": True},
    "/v1/responses": {"input": "Hi", "stream": True},
    "/v1/messages": {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4, "stream": True},
    "/generate_stream": {"prompt": "c"},
}


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("how", ["one in the middle", "all", "overwritten"])
def test_other_dialects_streams_end_with_the_error(
    http: httpx.Client, hand_worker: HandWorker, session_factory: Sessions, path: str, how: str
) -> None:
    body = BODIES[path] | {"model": MODEL}
    headers = {"idempotency-key": "k"}
    with http.stream("POST", path, json=body, headers=headers) as response:
        assert response.status_code == 200, response.read()
        hand_worker.run(response.headers["x-job-id"], *TEXTS)
        assert "job_unreadable" not in response.read().decode()
    damage(session_factory, how)
    again = http.post(path, json=body, headers=headers)
    assert again.headers["x-job-id"] == response.headers["x-job-id"]
    assert "cannot be read" in again.text
    if path == "/v1/responses":
        read = http.get(f"{path}/{external_id(parse_id(again.headers['x-job-id']), 'resp')}", params={"stream": True})
        assert "job_unreadable" in read.text
