"""A job's output by the read side of the Durable Streams protocol: from any offset, in every mode, to its end."""

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from domain.jobs import JobStatus
from domain.requests import TokenChunk
from tests.integration.api_harness import ApiServer, HandWorker, all_events, make_chunk, post_job
from tests.waiting import wait_until

TEXTS = ("Once ", " upon\n", "\n a", " time\nevent: control\n\n", "🙂", "", "last")
END = len(TEXTS) + 1
TEXT = {"accept": "text/plain"}


@pytest.fixture
def url(http: httpx.Client) -> str:
    """The stream of a queued job."""
    return f"/v1/jobs/{post_job(http)['id']}/stream"


@pytest.fixture
def ended(url: str, hand_worker: HandWorker) -> str:
    """The stream of a job that said TEXTS."""
    hand_worker.run(url.split("/")[3], *TEXTS)
    return url


def offset(number: int) -> str:
    return f"{number:016}"


def get(http: httpx.Client, url: str, headers: dict[str, str] | None = None, /, **params: str) -> httpx.Response:
    return http.get(url, params=params, headers=headers)


def signs(response: httpx.Response) -> tuple[str | None, bool, bool]:
    """Where to go on, whether that is the end for now, and whether it is the end."""
    headers = response.headers
    return headers.get("stream-next-offset"), "stream-up-to-date" in headers, "stream-closed" in headers


def sse_frames(response: httpx.Response) -> Iterator[tuple[str, str]]:
    """Name and data of each event, as the standard says: one space after the colon is no part of the value."""
    name, data = "", []
    for line in response.iter_lines():
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if field == "event":
            name = value
        elif field == "data":
            data.append(value)
        elif not line and name:
            yield name, "\n".join(data)
            name, data = "", []


def read_live(http: httpx.Client, url: str, headers: dict[str, str] | None = None, **params: str) -> list[Any]:
    with http.stream("GET", url, params={"live": "sse"} | params, headers=headers) as response:
        assert response.status_code == 200, response.read()
        assert response.headers["content-type"] == "text/event-stream"
        return [(name, data if name == "data" else json.loads(data)) for name, data in sse_frames(response)]


def test_an_ended_job_is_read_whole_as_json_and_as_text(http: httpx.Client, ended: str) -> None:
    whole = get(http, ended)
    assert signs(whole) == (offset(END), True, True)
    assert whole.headers["content-type"] == "application/json"
    events = all_events(http, ended.split("/")[3])
    assert whole.json() == [{"event": event.name, "data": event.data} for event in events if event.id]
    text = get(http, ended, TEXT, offset="-1")
    assert (text.text, text.headers["content-type"]) == ("".join(TEXTS), "text/plain; charset=utf-8")
    assert signs(text) == signs(whole)
    assert text.headers["etag"] != whole.headers["etag"]
    assert get(http, ended, TEXT, index="1").text == ""


def test_a_reader_may_go_on_from_every_offset(http: httpx.Client, ended: str) -> None:
    messages = get(http, ended).json()
    for number in range(END + 1):
        rest = get(http, ended, offset=offset(number))
        assert rest.json() == messages[number:]
        assert signs(rest) == (offset(END), True, True)
        assert get(http, ended, TEXT, offset=offset(number)).text == "".join(TEXTS[number:])
    assert sorted(map(offset, range(12)), key=str) == [offset(number) for number in range(12)]


def test_a_long_stream_comes_in_parts(http: httpx.Client, ended: str, monkeypatch: pytest.MonkeyPatch) -> None:
    messages = get(http, ended).json()
    monkeypatch.setattr("api.durable_streams.CHUNKS_PER_READ", 3)
    at: str | None = "-1"
    parts, is_closed = [], False
    while not is_closed:
        part = get(http, ended, offset=str(at))
        parts.append(part.json())
        at, is_up_to_date, is_closed = signs(part)
        assert is_up_to_date == is_closed
    assert [len(part) for part in parts] == [3, 3, 2]
    assert [message for part in parts for message in part] == messages


def test_a_head_tells_the_end_without_reading(http: httpx.Client, url: str, hand_worker: HandWorker) -> None:
    head = http.head(url)
    assert (head.status_code, signs(head)) == (200, (offset(0), False, False))
    assert (head.headers["content-type"], head.headers["cache-control"]) == ("application/json", "no-store")
    assert "content-length" not in head.headers
    hand_worker.run(url.split("/")[3], "a")
    assert signs(http.head(url, headers=TEXT)) == (offset(2), False, True)


def test_an_etag_saves_what_is_known_and_changes_at_the_end(
    http: httpx.Client, url: str, hand_worker: HandWorker
) -> None:
    job = hand_worker.claim(url.split("/")[3])
    hand_worker.say(job, "a")
    for headers in ({}, TEXT):
        first = get(http, url, headers)
        assert "private" in first.headers["cache-control"]
        same = get(http, url, headers | {"if-none-match": f'"other", W/{first.headers["etag"]}'})
        assert (same.status_code, same.content, signs(same)) == (304, b"", signs(first))
        assert get(http, url, headers | {"if-none-match": '"other"'}).status_code == 200
    at_end = get(http, url, TEXT, offset=offset(1))
    hand_worker.finish(job, "a")
    after = get(http, url, TEXT | {"if-none-match": at_end.headers["etag"]}, offset=offset(1))
    assert (after.status_code, after.text, signs(after)) == (200, "", (offset(2), True, True))


def test_now_skips_what_was_said(http: httpx.Client, url: str, hand_worker: HandWorker) -> None:
    job = hand_worker.claim(url.split("/")[3])
    hand_worker.say(job, "a", "b")
    for headers, empty in (({}, "[]"), (TEXT, "")):
        now = get(http, url, headers, offset="now")
        assert (now.text, signs(now), now.headers["cache-control"]) == (empty, (offset(2), True, False), "no-store")
        assert "etag" not in now.headers
    hand_worker.finish(job, "a", "b")
    assert signs(get(http, url, offset="now")) == (offset(3), True, True)
    polled = get(http, url, offset="now", live="long-poll")
    assert (polled.status_code, polled.content, signs(polled)) == (204, b"", (offset(3), True, True))
    [(name, control)] = read_live(http, url, offset="now")
    assert (name, control["streamNextOffset"], control["upToDate"], control["streamClosed"]) == (
        "control",
        offset(3),
        True,
        True,
    )


def test_a_long_poll_waits_for_a_chunk_and_for_the_end(
    http: httpx.Client, api: ApiServer, url: str, hand_worker: HandWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("api.durable_streams.LONG_POLL_SECONDS", 0.1)
    nothing = get(http, url, offset="-1", live="long-poll")
    assert (nothing.status_code, signs(nothing)) == (204, (offset(0), True, False))
    monkeypatch.setattr("api.durable_streams.LONG_POLL_SECONDS", 60.0)
    job = hand_worker.claim(url.split("/")[3])
    after_wait: dict[str, Callable[[], None]] = {
        offset(0): lambda: hand_worker.say(job, "a"),
        offset(1): lambda: hand_worker.finish(job, "a"),
    }
    with ThreadPoolExecutor(1) as threads:
        for at, happen in after_wait.items():
            polling = threads.submit(get, http, url, TEXT, offset=at, live="long-poll")
            wait_until(lambda: api.services.slots.num_taken == 1)
            happen()
            answer = polling.result()
            cursor = int(answer.headers["stream-cursor"])
            if at == offset(0):
                assert (answer.text, signs(answer)) == ("a", (offset(1), True, False))
    assert signs(answer) == (offset(2), True, True)
    again = get(http, url, offset="-1", live="long-poll", cursor=str(cursor + 5))
    assert again.status_code == 200
    assert int(again.headers["stream-cursor"]) > cursor + 5


@pytest.mark.parametrize("headers", [{}, TEXT], ids=["json", "text"])
def test_a_live_stream_repeats_nothing_wherever_it_begins(
    headers: dict[str, str], http: httpx.Client, url: str, hand_worker: HandWorker
) -> None:
    job = hand_worker.claim(url.split("/")[3])
    hand_worker.say(job, *TEXTS[:3])
    with ThreadPoolExecutor(1) as threads:
        reading = threads.submit(read_live, http, url, headers, offset="-1")
        hand_worker.say(job, *TEXTS[3:], first=4)
        hand_worker.finish(job, *TEXTS)
        events = reading.result()
    controls = [data for name, data in events if name == "control"]
    assert [control["streamNextOffset"] for control in controls] == [offset(n) for n in range(1, END + 1)]
    assert [control.get("streamClosed") for control in controls] == [None] * len(TEXTS) + [True]
    assert all(events[at + 1][0] == "control" for at, (name, _) in enumerate(events) if name == "data")
    assert not controls[0].get("upToDate")
    assert controls[-1]["upToDate"]

    def said(events: list[Any]) -> Any:
        data = [data for name, data in events if name == "data"]
        return "".join(data) if headers else [message for part in data for message in json.loads(part)]

    assert said(events) == ("".join(TEXTS) if headers else get(http, url).json())
    rest = read_live(http, url, headers, offset=offset(4))
    assert said(rest) == ("".join(TEXTS[4:]) if headers else get(http, url, offset=offset(4)).json())


def test_text_that_is_void_is_gone_and_json_says_so(http: httpx.Client, url: str, hand_worker: HandWorker) -> None:
    """A job that starts over: the worker's reset is a chunk like any other to the log."""
    job = hand_worker.claim(url.split("/")[3])
    hand_worker.say(job, "void")
    with ThreadPoolExecutor(1) as threads:
        reading = threads.submit(read_live, http, url, TEXT, offset="-1")
        hand_worker.commit(job, TokenChunk(sequence_number=2, is_reset=True))
        hand_worker.commit(job, make_chunk(3, "true"))
        events = reading.result()  # the stream ends at the reset
    assert [name for name, _ in events] == ["data", "control"]
    gone = get(http, url, TEXT, offset=offset(1))
    assert (gone.status_code, gone.json()["error"]["code"]) == (410, "cursor_expired")
    assert [message["event"] for message in get(http, url, offset=offset(1)).json()] == ["job.reset", "output.delta"]
    assert get(http, url, TEXT, offset=offset(2)).text == "true"


@pytest.mark.parametrize(
    ("params", "param"),
    [
        *(({"offset": text}, "offset") for text in ("", "0", "1", "-2", "nOw", "0" * 17, "٣" * 16, "+" + "0" * 15)),
        ({"offset": "0" * 15 + "9"}, "offset"),
        ({"live": "sse"}, "offset"),
        ({"live": "long-poll"}, "offset"),
        ({"live": "websocket", "offset": "-1"}, "live"),
        ({"cursor": "-1"}, "cursor"),
        ({"cursor": "9" * 16}, "cursor"),
        ({"index": "-1"}, "index"),
        ({"from": "start"}, "from"),
    ],
)
def test_a_bad_position_is_refused_with_its_name(http: httpx.Client, url: str, params: Any, param: str) -> None:
    answer = get(http, url, **params)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def test_the_protocol_may_read_only_and_what_is_there(http: httpx.Client, ended: str) -> None:
    for method in ("PUT", "POST", "DELETE"):
        refused = http.request(method, ended)
        assert (refused.status_code, refused.headers["allow"]) == (405, "GET, HEAD, OPTIONS")
    http.delete(ended.removesuffix("/stream"))
    for live in ({}, {"live": "sse"}, {"live": "long-poll"}):
        assert get(http, ended, offset="-1", **live).status_code == 404
    assert http.head(ended).status_code == 404


def test_every_end_closes_a_stream(http: httpx.Client, url: str, hand_worker: HandWorker) -> None:
    job = hand_worker.claim(url.split("/")[3])
    hand_worker.say(job, "a")
    hand_worker.finish(job, "a", status=JobStatus.CANCELLED)
    assert [message["event"] for message in get(http, url).json()] == ["output.delta", "job.cancelled"]
    token = http.post(url + "_token").json()["token"]
    assert signs(get(http, url, token=token)) == (offset(2), True, True)
    assert get(http, url, token=token + "x").status_code == 401
