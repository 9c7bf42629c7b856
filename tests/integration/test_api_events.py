"""A job as server-sent events: from any cursor, through every fault of Redis, to exactly one last event."""

import itertools
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter
from sqlalchemy import text
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session, sessionmaker

from api import events as job_events
from api.model_queues import UNKNOWN_PLACE
from celeriac.client import StreamEvent
from dialects.native import JobView
from domain.jobs import FinishReason, JobStatus, external_id
from domain.requests import TokenChunk, TokenLogprob
from local.servers import EmbeddedRedis
from settings import Settings
from storage import job_queries, known_jobs
from tests.integration.api_harness import ApiServer, HandWorker, all_events, make_chunk, numbered, open_events, post_job
from tests.waiting import SECONDS, slowness, wait_until

TEXTS = ("Once ", "upon ", "a ", "time\r\n\n", "data: x\n\n", "🙂", "\0", "\u2028\x85</script>")


@pytest.fixture
def finished(http: httpx.Client, hand_worker: HandWorker) -> str:
    """A job that said TEXTS."""
    job_id: str = post_job(http)["id"]
    hand_worker.run(job_id, *TEXTS)
    return job_id


def text_of(events: list[StreamEvent]) -> str:
    return "".join(event.data["text"] for event in events if event.name == "output.delta")


def test_a_finished_job_is_replayed_byte_for_byte(http: httpx.Client, finished: str) -> None:
    events = all_events(http, finished)
    assert [event.name for event in events] == [*["output.delta"] * len(TEXTS), "job.completed"]
    assert text_of(events) == "".join(TEXTS)
    assert [event.id for event in events if event.name == "output.delta"] == [str(n) for n in range(1, 9)]
    assert events[-1].id == "9"
    job = TypeAdapter(JobView).validate_python(events[-1].data)
    output: Any = job["output"]
    assert output["text"] == text_of(events)
    assert events[-1].data == http.get(f"/v1/jobs/{finished}").json()


@pytest.mark.parametrize("result", ["null", '{"oops": 1}', "[7]", '{"kind": "embedding"}'])
def test_a_job_whose_output_was_overwritten_says_so_everywhere(
    http: httpx.Client, finished: str, session_factory: sessionmaker[Session], result: str
) -> None:
    with session_factory.begin() as session:
        session.execute(text("UPDATE job_results SET result = CAST(:result AS json)"), {"result": result})
    for path in ("", "?include=input", "/output", "/stream"):
        answer = http.get(f"/v1/jobs/{finished}{path}")
        assert (answer.status_code, answer.json()["error"]["code"]) == (500, "job_unreadable"), path
        assert finished in answer.json()["error"]["message"]
        assert answer.headers["x-should-retry"] == "false"
    events = all_events(http, finished)
    assert text_of(events) == "".join(TEXTS)
    assert (events[-1].name, events[-1].id) == ("job.completed", "9")
    assert (events[-1].data["output"], events[-1].data["error"]["code"]) == (None, "job_unreadable")
    durable = http.get(f"/v1/jobs/{finished}/stream", params={"live": "sse", "offset": "-1"}).text
    assert "job_unreadable" in durable
    assert '"streamClosed":true' in durable
    assert http.get("/v1/jobs").json()["data"][0]["id"] == finished
    assert http.delete(f"/v1/jobs/{finished}").status_code == 200


def test_a_snapshot_waits_for_a_database_that_is_away(
    http: httpx.Client, finished: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    outages = [OperationalError("SELECT", {}, Exception("the server closed the connection"))]

    def read_chunks(*arguments: Any, **options: Any) -> Any:
        if outages:
            raise outages.pop()
        return job_queries.read_chunks(*arguments, **options)

    monkeypatch.setattr(job_events, "job_queries", SimpleNamespace(get=job_queries.get, read_chunks=read_chunks))
    events = all_events(http, finished, params={"from": "snapshot"})
    assert outages == []
    assert events[0].data["choices"][0]["text"] == "".join(TEXTS)
    assert events[-1].is_terminal


def test_the_headers_keep_proxies_from_holding_a_stream_back(http: httpx.Client, finished: str) -> None:
    with http.stream("GET", f"/v1/jobs/{finished}/events") as response:
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert response.headers["cache-control"] == "no-cache, no-transform"
        assert response.headers["x-accel-buffering"] == "no"
        assert response.headers["x-job-id"] == finished
        assert "content-encoding" not in response.headers
        response.read()


def test_a_live_stream_tells_the_whole_life_of_a_job(http: httpx.Client, hand_worker: HandWorker) -> None:
    job_id = post_job(http)["id"]
    with open_events(http, job_id) as events:
        queued = next(events)
        assert (queued.name, queued.id) == ("job.queued", None)
        assert queued.data == {**UNKNOWN_PLACE, "job_id": job_id, "position": 0, "waiting_for": "worker"}
        job = hand_worker.claim(job_id)
        started = next(events)
        assert (started.name, started.id) == ("job.started", None)
        assert started.data == {"job_id": job_id, "attempt": 1, "sequence_number": 0}
        hand_worker.say(job, "a")
        delta = next(events)
        assert (delta.name, delta.id) == ("output.delta", "1")
        assert delta.data == {
            "job_id": job_id,
            "sequence_number": 1,
            "index": 0,
            "text": "a",
            "num_tokens": 1,
            "finish_reason": None,
        }
        hand_worker.finish(job, "a")
        completed = next(events)
        assert (completed.name, completed.id) == ("job.completed", "2")
        assert list(events) == []


def test_a_lost_attempt_is_told_and_the_text_goes_on(http: httpx.Client, hand_worker: HandWorker) -> None:
    job_id = post_job(http)["id"]
    with open_events(http, job_id) as events:
        assert next(events).name == "job.queued"
        first = hand_worker.claim(job_id)
        assert next(events).data["attempt"] == 1
        hand_worker.say(first, "a", "b")
        assert [next(events).id, next(events).id] == ["1", "2"]
        hand_worker.release(first)
        retrying = next(events)
        assert (retrying.name, retrying.id) == ("job.retrying", None)
        assert retrying.data == {"job_id": job_id, "attempt": 2, "sequence_number": 2}
        second = hand_worker.claim(job_id)
        assert len(second.committed_chunks) == 2
        started = next(event for event in events if event.name != "job.queued")
        assert (started.name, started.data["attempt"], started.data["sequence_number"]) == ("job.started", 2, 2)
        hand_worker.say(second, "c", first=3)
        hand_worker.finish(second, "a", "b", "c")
        assert [(event.name, event.id) for event in events] == [("output.delta", "3"), ("job.completed", "4")]


def test_a_pause_is_told_and_the_text_goes_on(http: httpx.Client, hand_worker: HandWorker) -> None:
    job_id = post_job(http)["id"]
    with open_events(http, job_id) as events:
        first = hand_worker.claim(job_id)
        hand_worker.say(first, "a")
        hand_worker.pause(first)
        told = [event for event in itertools.islice(events, 4) if event.name != "job.queued"]
        assert [event.name for event in told[:2]] == ["job.started", "output.delta"]
        paused = next(event for event in itertools.chain(told[2:], events) if event.name == "job.paused")
        assert (paused.id, paused.data) == (None, {"job_id": job_id, "sequence_number": 1})
        second = hand_worker.claim(job_id)
        assert second.seconds_paused is not None
        assert next(event.name for event in events if event.name != "job.queued") == "job.started"
        hand_worker.say(second, "b", first=2)
        hand_worker.finish(second, "a", "b")
        assert [(event.name, event.id) for event in events] == [("output.delta", "2"), ("job.completed", "3")]


@pytest.mark.parametrize(
    ("status", "finish_reason"),
    [(JobStatus.FAILED, "error"), (JobStatus.CANCELLED, "cancelled"), (JobStatus.EXPIRED, "deadline")],
)
def test_every_end_has_its_one_event_and_says_what_cut_the_text_off(
    http: httpx.Client, hand_worker: HandWorker, status: JobStatus, finish_reason: str
) -> None:
    job_id = post_job(http)["id"]
    job = hand_worker.claim(job_id)
    hand_worker.say(job, "half")
    hand_worker.finish(job, "half", status=status)
    events = all_events(http, job_id)
    assert events[-1].name == f"job.{status}"
    assert events[-1].data["output"]["text"] == "half"
    assert events[-1].data["finish_reason"] == finish_reason
    assert [choice["finish_reason"] for choice in events[-1].data["output"]["choices"]] == [finish_reason]
    assert sum(event.id == "2" for event in events) == 1


def test_cancelling_a_queued_job_ends_its_stream(http: httpx.Client, api: ApiServer) -> None:
    job_id = post_job(http)["id"]
    with open_events(http, job_id) as events, api.client() as other:
        assert next(events).name == "job.queued"
        other.post(f"/v1/jobs/{job_id}/cancel")
        [last] = events
    assert (last.name, last.id) == ("job.cancelled", "1")


def test_deleting_a_job_ends_its_stream(http: httpx.Client, api: ApiServer) -> None:
    job_id = post_job(http)["id"]
    with open_events(http, job_id) as events, api.client() as other:
        assert next(events).name == "job.queued"
        other.delete(f"/v1/jobs/{job_id}")
        assert list(events) == []


# Cursors


@pytest.mark.parametrize("cursor", range(len(TEXTS) + 1))
@pytest.mark.parametrize("how", ["Last-Event-ID", "starting_after"])
def test_earlier_and_resumed_events_are_the_whole_log(http: httpx.Client, finished: str, cursor: int, how: str) -> None:
    whole = numbered(all_events(http, finished))
    options = {"headers": {how: str(cursor)}} if how == "Last-Event-ID" else {"params": {how: cursor}}
    resumed = numbered(all_events(http, finished, **options))
    assert whole[:cursor] + resumed == whole


def test_the_cursor_of_the_last_event_ends_the_reconnecting(http: httpx.Client, finished: str) -> None:
    response = http.get(f"/v1/jobs/{finished}/events", headers={"last-event-id": str(len(TEXTS) + 1)})
    assert (response.status_code, response.content) == (204, b"")


@pytest.mark.parametrize("cursor", ["10", "-1", "abc", "1.5", "1" * 30, "9" * 18, "²"])
def test_a_cursor_that_cannot_be_is_refused(http: httpx.Client, finished: str, cursor: str) -> None:
    header = http.get(f"/v1/jobs/{finished}/events", headers=[(b"last-event-id", cursor.encode())])
    query = http.get(f"/v1/jobs/{finished}/events", params={"starting_after": cursor})
    assert (header.status_code, header.json()["error"]["code"]) == (400, "invalid_cursor")
    assert query.status_code == 400
    assert query.json()["error"]["code"] in ("invalid_cursor", "invalid_value")


def test_a_cursor_into_the_future_of_a_running_job_is_refused(http: httpx.Client, hand_worker: HandWorker) -> None:
    job = hand_worker.claim(post_job(http)["id"])
    hand_worker.say(job, "a")
    response = http.get(f"/v1/jobs/{external_id(job.id)}/events", params={"starting_after": 2})
    assert (response.status_code, response.json()["error"]["code"]) == (400, "invalid_cursor")


def test_a_cursor_whose_message_was_lost_on_the_way_here_is_taken(
    http: httpx.Client, hand_worker: HandWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(known_jobs, "KNOWN_SECONDS", SECONDS)
    job = hand_worker.claim(post_job(http)["id"])
    job_id = external_id(job.id)
    hand_worker.say(job, "a")
    with ExitStack() as stack:
        streams = []
        for _ in range(4):  # what the third has read is kept for the fourth
            streams.append(stack.enter_context(open_events(http, job_id)))
            assert next(streams[-1]).name == "job.started"
        hand_worker.say(job, "b", first=2, is_published=False)
        later = stack.enter_context(open_events(http, job_id, params={"starting_after": 2}))
        hand_worker.say(job, "c", first=3)
        hand_worker.finish(job, "a", "b", "c")
        assert [text_of(list(events)) for events in (*streams, later)] == ["abc"] * 4 + ["c"]


def test_the_header_wins_over_the_query_which_a_browser_repeats(http: httpx.Client, finished: str) -> None:
    events = all_events(http, finished, headers={"last-event-id": "7"}, params={"starting_after": 0, "from": "start"})
    assert [event.id for event in events if event.id] == ["8", "9"]


def test_a_snapshot_and_what_follows_it_are_the_whole_text(http: httpx.Client, hand_worker: HandWorker) -> None:
    job = hand_worker.claim(post_job(http, params={"n": 2, "max_tokens": 16})["id"])
    hand_worker.commit(job, make_chunk(1, "ab"), make_chunk(2, "x", index=1))
    with open_events(http, external_id(job.id), params={"from": "snapshot"}) as events:
        snapshot = next(events)
        assert (snapshot.name, snapshot.id) == ("job.snapshot", None)
        assert snapshot.data["sequence_number"] == 2
        assert [choice["text"] for choice in snapshot.data["choices"]] == ["ab", "x"]
        assert next(events).name == "job.started"
        hand_worker.commit(job, make_chunk(3, "c"))
        assert (next(events).data["text"]) == "c"


def test_from_now_leaves_out_what_was(http: httpx.Client, hand_worker: HandWorker) -> None:
    job = hand_worker.claim(post_job(http)["id"])
    hand_worker.say(job, "old")
    with open_events(http, external_id(job.id), params={"from": "now"}) as events:
        assert next(events).name == "job.started"
        hand_worker.say(job, "new", first=2)
        assert next(events).data["text"] == "new"


def test_tokens_and_logprobs_come_where_asked_for(http: httpx.Client, hand_worker: HandWorker) -> None:
    job = hand_worker.claim(post_job(http)["id"])
    logprob = TokenLogprob(token="a", token_id=97, logprob=-0.5, top=((97, "a", -0.5),))
    hand_worker.commit(job, make_chunk(1, "a", logprobs=(logprob,), finish_reason=FinishReason.STOP))
    hand_worker.finish(job, "a")
    delta = all_events(http, external_id(job.id), params={"include": "token_ids"})[0].data
    assert delta["token_ids"] == [97]
    assert delta["finish_reason"] == "stop"
    assert delta["logprobs"][0]["token_id"] == 97
    assert "token_ids" not in all_events(http, external_id(job.id))[0].data


plans = st.lists(st.sampled_from(["a", "é", "\n", "🙂"]), min_size=1, max_size=12)
cuts = st.lists(st.integers(0, 12), max_size=4)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=plans, cuts=cuts, is_published=st.lists(st.booleans(), min_size=12, max_size=12))
def test_a_reader_that_is_cut_off_anywhere_sees_every_event_once(
    http: httpx.Client, hand_worker: HandWorker, texts: list[str], cuts: list[int], is_published: list[bool]
) -> None:
    """Readers connect while the job runs, some of its chunks never reach Redis, and every reader leaves early."""
    job_id = post_job(http)["id"]
    job = hand_worker.claim(job_id)
    seen: list[tuple[str, str | None, str]] = []
    num_said = 0
    for cut in sorted(min(cut, len(texts)) for cut in cuts):
        for one in texts[num_said:cut]:
            hand_worker.say(job, one, first=num_said + 1, is_published=is_published[num_said])
            num_said += 1
        with open_events(http, job_id, params={"starting_after": len(seen)}) as events:
            for event in events:
                seen += numbered([event])
                if len(seen) >= num_said:
                    break
    for one in texts[num_said:]:
        hand_worker.say(job, one, first=num_said + 1)
        num_said += 1
    hand_worker.finish(job, *texts)
    seen += numbered(all_events(http, job_id, params={"starting_after": len(seen)}))
    assert seen == numbered(all_events(http, job_id))
    assert len(seen) == len(texts) + 1


def large_chunks(*, num_megabytes: int) -> list[TokenChunk]:
    """More than all the buffers between the API and a client hold."""
    return [make_chunk(n, "x" * 100_000, token_ids=(1,)) for n in range(1, 10 * num_megabytes + 1)]


# Many readers, slow readers, no Redis


def test_many_readers_of_one_job_all_see_the_same(http: httpx.Client, api: ApiServer, hand_worker: HandWorker) -> None:
    job_id = post_job(http)["id"]
    with ThreadPoolExecutor(12) as pool:
        readers = [pool.submit(all_events, http, job_id) for _ in range(12)]
        wait_until(lambda: api.services.streams.num_streams == 12)
        hand_worker.run(job_id, *TEXTS)
        logs = [numbered(reader.result()) for reader in readers]
    assert all(log == logs[0] for log in logs)
    assert len(logs[0]) == len(TEXTS) + 1


def test_a_stream_needs_no_redis(http: httpx.Client, hand_worker: HandWorker, redis_server: EmbeddedRedis) -> None:
    job_id = post_job(http)["id"]
    with open_events(http, job_id) as events:
        assert next(events).name == "job.queued"
        redis_server.stop()
        try:
            with pytest.raises(redis.ConnectionError):
                hand_worker.redis.ping()
            job = hand_worker.claim(job_id)
            hand_worker.say(job, *TEXTS)
            hand_worker.finish(job, *TEXTS)
            rest = list(events)
        finally:
            redis_server.start()
    assert text_of(rest) == "".join(TEXTS)
    assert rest[-1].name == "job.completed"


def test_a_client_that_leaves_frees_its_place(http: httpx.Client, api: ApiServer) -> None:
    job_id = post_job(http)["id"]
    with open_events(http, job_id) as events:
        next(events)
        assert api.services.slots.num_taken == 1
    wait_until(lambda: api.services.slots.num_taken == 0)
    wait_until(lambda: api.services.streams.num_streams == 0)


class TestBounds:
    """Streams are bounded in number and in life."""

    @pytest.fixture
    def api_settings(self, database_url: str, redis_url: str) -> Settings:
        return Settings(
            database_url=database_url,
            redis_url=redis_url,
            max_streams=2,
            stream_lifetime_seconds=2.0,
            stream_heartbeat_seconds=0.2,
        )

    def test_one_stream_too_many_is_told_to_come_back(self, http: httpx.Client) -> None:
        job_id = post_job(http)["id"]
        with open_events(http, job_id) as first, open_events(http, job_id) as second:
            next(first), next(second)
            refused = http.get(f"/v1/jobs/{job_id}/events")
            polled = http.get(f"/v1/jobs/{job_id}", params={"wait": 60})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "server_is_overloaded")
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        assert polled.elapsed.total_seconds() < 5 * slowness()

    def test_a_silent_stream_beats_and_ends_with_its_life_so_that_it_can_be_resumed(self, http: httpx.Client) -> None:
        job_id = post_job(http)["id"]
        with http.stream("GET", f"/v1/jobs/{job_id}/events") as response:
            content = b"".join(response.iter_bytes())
        assert content.count(b": hb\n") >= 5
        assert b"\n\n: hb\n\n" not in content
        assert b"event: job.completed" not in content
        assert content.startswith(b"retry: 1000\n")


def test_a_reader_that_takes_nothing_does_not_slow_the_others(
    http: httpx.Client, api: ApiServer, hand_worker: HandWorker
) -> None:
    job_id = post_job(http, model="large", params={"max_tokens": 50_000})["id"]
    request = f"GET /v1/jobs/{job_id}/events HTTP/1.1\r\nhost: localhost\r\n\r\n".encode()
    with closing(socket.create_connection(("127.0.0.1", api.port))) as lazy:
        lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        lazy.sendall(request)
        wait_until(lambda: api.services.streams.num_streams == 1)
        with open_events(http, job_id) as events:
            job = hand_worker.claim(job_id)
            started = time.monotonic()
            hand_worker.commit(job, *large_chunks(num_megabytes=8))
            assert any(event.id == "80" for event in events)
            assert time.monotonic() - started < 10 * slowness()


def test_a_reader_that_takes_nothing_for_long_is_cut(
    http: httpx.Client, api: ApiServer, hand_worker: HandWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("api.sse.SEND_TIMEOUT_SECONDS", 0.3)
    job_id = post_job(http, model="large", params={"max_tokens": 50_000})["id"]
    job = hand_worker.claim(job_id)
    request = f"GET /v1/jobs/{job_id}/events HTTP/1.1\r\nhost: localhost\r\n\r\n".encode()
    with closing(socket.socket()) as lazy:
        lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        lazy.connect(("127.0.0.1", api.port))
        lazy.sendall(request)
        wait_until(lambda: api.services.streams.num_streams == 1)
        hand_worker.commit(job, *large_chunks(num_megabytes=8))
        wait_until(lambda: api.services.slots.num_taken == 0)
