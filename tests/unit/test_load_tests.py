"""What `celeriac bench` makes of servers that refuse, fail and stall, and what it tells them."""

import asyncio
import json
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from celeriac import cli, figures, load
from celeriac.figures import ValueSpread
from celeriac.load import Celeriac, LoadTest, OpenAiServer, Target
from settings import get_settings
from tests.webhook_receiver import receiving

Answer = tuple[int, dict[str, str], bytes]  # status, headers, body

AT_ONCE = {"retry-after": "0"}
REFUSED: Answer = (429, AT_ONCE, b'{"error": {"code": "too_many"}}')
BROKEN: Answer = (500, AT_ONCE, b"{}")
ENDED = {"id": "job_1", "model": "m", "status": "completed", "created_at": "2030-01-01T00:00:00Z"}


@contextmanager
def serving(answer: Callable[[str, str], Answer]) -> Iterator[str]:
    """A server that answers by method and path. Yields its URL."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers.get("content-length", 0)))
            status, headers, body = answer(self.command, self.path.partition("?")[0])
            try:
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)
            except OSError:
                pass  # the client has gone

        do_GET = do_POST

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads, server.block_on_close = True, False
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def load_test(target: Target, *, concurrency: int = 1, num_jobs: int | None = None) -> LoadTest:
    requests = cycle([{"messages": [{"role": "user", "content": "Hi"}]}])
    return LoadTest(
        target, requests, concurrency=concurrency, num_jobs=num_jobs, seconds=None, on_change=lambda _load: None
    )


def run(make: Callable[[], Target], **plan: Any) -> LoadTest:
    async def to_its_end() -> LoadTest:
        target = make()
        async with asyncio.timeout(60):
            test = load_test(target, **plan)
            await test.run()
        await target.close()
        return test

    return asyncio.run(to_its_end())


def events(*data: Any) -> bytes:
    return b"".join(b"data: " + json.dumps(each).encode() + b"\n\n" for each in data)


def test_only_a_first_answer_of_429_or_503_is_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "REFUSED_SECONDS", 0.0)
    text = {"choices": [{"delta": {"content": "a"}}]}
    answers: list[Answer] = [
        (200, {}, events(text, {"choices": [{"delta": {}, "finish_reason": "stop"}]})),
        BROKEN,
        (404, AT_ONCE, b'{"error": {"code": "no_model"}}'),
        REFUSED,
        (503, AT_ONCE, b"{}"),
        (200, {}, events(text, {"error": {"message": "out of memory", "type": "server_error", "code": None}})),
        (200, {}, events(text, {"error": "out of memory"})),
        (200, {}, events(text)),  # and then the connection ends
        (200, {}, events(["what"])),
    ]
    left = iter(answers)
    with serving(lambda _method, _path: next(left)) as url:
        told = run(lambda: OpenAiServer(url, None, is_streaming=True), num_jobs=len(answers)).attempts.summary(1)
    assert told["jobs"] == {"completed": 1, "failed": 4, "refused": 2, "broken": 2}
    assert told["refusals"] == {"too_many": 1, "503": 1}
    assert told["errors"] == {"500": 1, "no_model": 1, "server_error": 1, "error": 1, "connection": 2}


@pytest.mark.parametrize("is_streaming", [True, False])
def test_an_accepted_job_keeps_its_place_while_following_it_is_refused(is_streaming: bool) -> None:
    asked: list[str] = []

    def answer(method: str, path: str) -> Answer:
        asked.append(f"{method} {path}")
        if method == "POST":
            return 202, {}, json.dumps(ENDED | {"status": "queued"}).encode()
        if len(asked) < 4:
            return REFUSED
        ended = json.dumps(ENDED).encode()
        events = b"id: 1\nevent: job.completed\ndata: " + ended + b"\n\n"
        return (200, {"content-type": "text/event-stream"}, events) if is_streaming else (200, {}, ended)

    with serving(answer) as url:
        test = run(lambda: Celeriac(url, None, is_streaming=is_streaming), num_jobs=1)
    assert test.attempts.outcomes == {"completed": 1}
    assert asked == ["POST /v1/jobs", *["GET /v1/jobs/job_1" + "/events" * is_streaming] * 3]


def test_a_job_that_cannot_be_followed_is_cancelled_before_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "PATIENCE_SECONDS", -1.0)
    asked: list[str] = []

    def answer(method: str, path: str) -> Answer:
        asked.append(f"{method} {path}")
        if method == "GET":
            return BROKEN if len(asked) == 2 else REFUSED
        return 200, {}, json.dumps(ENDED).encode()

    with serving(answer) as url:
        told = run(lambda: Celeriac(url, None, is_streaming=True), num_jobs=2).attempts.summary(1)
    assert (told["jobs"], told["errors"], told["refusals"]) == ({"failed": 2}, {"500": 1, "too_many": 1}, {})
    assert asked == ["POST /v1/jobs", "GET /v1/jobs/job_1/events", "POST /v1/jobs/job_1/cancel"] * 2


def test_no_place_rests_when_nothing_is_left_to_send(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "MAX_REST_SECONDS", 3600.0)
    with serving(lambda _method, _path: (429, {"retry-after": "600"}, b"{}")) as url:
        test = run(lambda: OpenAiServer(url, None, is_streaming=False), num_jobs=2, concurrency=2)
        alone = run(lambda: OpenAiServer(url, None, is_streaming=False), num_jobs=1)
    assert (len(test.attempts), len(alone.attempts)) == (2, 1)
    assert 0 < test.seconds <= test.elapsed()


def test_an_interrupted_test_tells_what_it_cancelled_and_does_not_count_the_time_that_took() -> None:
    number = iter(range(1, 100))
    all_run = threading.Barrier(4)
    let_go = threading.Event()
    cancelled_at: list[float] = []
    test: LoadTest

    def answer(method: str, path: str) -> Answer:
        if path.endswith("/cancel"):
            cancelled_at.append(test.elapsed())
            return BROKEN if path == "/v1/jobs/job_2/cancel" else (200, {}, json.dumps(ENDED).encode())
        if method == "POST" and path == "/v1/jobs":
            return 202, {}, json.dumps(ENDED | {"id": f"job_{next(number)}", "status": "queued"}).encode()
        all_run.wait()
        let_go.wait()
        return BROKEN

    async def interrupted(target: Target) -> str:
        nonlocal test
        test = load_test(target, concurrency=3)
        running = asyncio.create_task(test.run())
        await asyncio.to_thread(all_run.wait)
        running.cancel()
        await running
        await target.close()
        return target.goodbye()

    async def both(url: str) -> tuple[str, float, str]:
        jobs = await interrupted(Celeriac(url, None, is_streaming=True))
        seconds = test.seconds
        return jobs, seconds, await interrupted(OpenAiServer(url, None, is_streaming=True))

    with serving(answer) as url:
        jobs, seconds, requests = asyncio.run(both(url))
        let_go.set()
    assert jobs == "2 of 3 jobs were cancelled"
    assert 0 < seconds <= min(cancelled_at)
    assert requests == "3 requests were given up"


def test_another_server_gets_only_its_own_key_and_measured_requests_are_new_to_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CELERIAC_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("CELERIAC_API_KEY", "s3cret")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    get_settings.cache_clear()
    (tmp_path / "in.jsonl").write_text('"one two"\n"three"\n')
    with receiving() as other:
        other.answer_body = b'{"choices": [], "usage": null}'
        where = ["--openai", "--poll", "--url", f"http://127.0.0.1:{other.port}"]
        sent = ["--prompts", str(tmp_path / "in.jsonl"), "-c", "1", "-n", "2", "--json"]

        def keys(*options: str) -> set[str | None]:
            other.received.clear()
            done = CliRunner().invoke(cli.main, ["bench", *where, *sent, *options])
            assert done.exit_code == 0, done.output
            return {received.headers.get("authorization") for received in other.received}

        assert keys() == {None}
        prompts = [json.loads(received.body)["messages"][0]["content"] for received in other.received]
        assert keys("--key", "given") == {"Bearer given"}
        monkeypatch.setenv("OPENAI_API_KEY", "theirs")
        assert keys() == {"Bearer theirs"}
    get_settings.cache_clear()
    assert prompts[1:] == ["one two", "three"]
    assert len(prompts[0].split()) == 2
    assert prompts[0] != prompts[1]


def test_times_take_little_memory_and_are_right_to_a_percent() -> None:
    chance = random.Random(1)
    values = [chance.lognormvariate(-3, 2) for _ in range(20_000)]
    spread = ValueSpread()
    for value in values:
        spread.add(value)
    told = spread.summary()
    assert told is not None
    ordered = sorted(values)
    for rank in figures.PERCENTILES:
        assert told[f"p{rank}"] == pytest.approx(ordered[rank * len(values) // 100 - 1], rel=0.01)
    assert (told["number"], told["max"]) == (len(values), round(max(values), 6))
    assert told["mean"] == pytest.approx(sum(values) / len(values), rel=1e-3)
    assert len(spread._counts) < 3000

    alone = ValueSpread()
    assert alone.summary() is None
    alone.add(0.5)
    assert alone.summary() == {"p50": 0.5, "p90": 0.5, "p99": 0.5, "mean": 0.5, "max": 0.5, "number": 1}
