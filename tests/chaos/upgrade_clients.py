"""Clients as people have them, which work while an installation is restarted, and count what they notice of it.

Each kind does one thing again and again, and comes back as its protocol says: our library and a browser's EventSource
resume a stream after its last id, OpenAI's SDK repeats what failed, a long poll asks again. A stream of the SDK cannot
be resumed, so one that is cut off has failed.
"""

import io
import json
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import openai
from websockets.exceptions import ConnectionClosed, WebSocketException
from websockets.sync.client import connect

from celeriac.client import Client
from gpu_worker.engine.fake_tokens import fake_text
from tests.integration.upgrade_harness import MODEL

PROMPT_TOKEN_IDS = [1, 2, 3]
NUM_LINES = 20  # of a batch
UPLOAD_PIECES, UPLOAD_PAUSE_SECONDS = 30, 0.1
RETRY_SECONDS = 0.3
PATIENCE_SECONDS = 90.0


class Wrong(Exception):
    """What came is not what was asked for."""


@dataclass(slots=True)
class Tally:
    """What clients of one kind have seen."""

    num_done: int = 0
    num_tokens: int = 0
    failures: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    longest_seconds: float = 0.0
    num_retries: int = 0  # that the client made by itself

    def report(self) -> dict[str, Any]:
        return {
            "done": self.num_done,
            "tokens": self.num_tokens,
            "failed": len(self.failures),
            "wrong": len(self.wrong),
            "retries": self.num_retries,
            "longest_seconds": round(self.longest_seconds, 1),
        }


@dataclass(slots=True)
class Wish:
    """A text to ask for."""

    num_tokens: int
    seed: int

    @property
    def text(self) -> str:
        return fake_text(PROMPT_TOKEN_IDS, self.seed, 0, self.num_tokens)

    def check(self, text: str) -> None:
        if text != self.text:
            raise Wrong(f"{len(text)} characters instead of {len(self.text)}")

    @property
    def job(self) -> dict[str, Any]:
        params = {"max_tokens": self.num_tokens, "seed": self.seed, "ignore_eos": True}
        return {"model": MODEL, "prompt_token_ids": PROMPT_TOKEN_IDS, "params": params}

    @property
    def completion(self) -> dict[str, Any]:
        asked = {"model": MODEL, "prompt": PROMPT_TOKEN_IDS, "max_tokens": self.num_tokens, "seed": self.seed}
        return asked | {"extra_body": {"ignore_eos": True}}


Work = Callable[[str, Tally, Wish], None]


def use_library(url: str, tally: Tally, wish: Wish) -> None:
    with Client(url) as client:
        job = client.submit(
            prompt_token_ids=PROMPT_TOKEN_IDS,
            model=MODEL,
            max_tokens=wish.num_tokens,
            seed=wish.seed,
            ignore_eos=True,
        )
        wish.check("".join(event.text for event in client.stream(job.id)))


def use_sdk(url: str, tally: Tally, wish: Wish) -> None:
    with _sdk(url) as client:
        response = client.completions.with_raw_response.create(**wish.completion)
        tally.num_retries += response.retries_taken
        wish.check(response.parse().choices[0].text)


def use_sdk_stream(url: str, tally: Tally, wish: Wish) -> None:
    with _sdk(url) as client:
        pieces = client.completions.create(**wish.completion, stream=True)
        wish.check("".join(choice.text for piece in pieces for choice in piece.choices))


def use_event_source(url: str, tally: Tally, wish: Wish) -> None:
    """As browsers do it."""
    with _http(url) as http:
        job_id = _asked(http, tally, "POST", "/v1/jobs", json=wish.job).json()["id"]
        text, last_id, is_over = "", "0", False
        for _ in _attempts(tally):
            try:
                with http.stream("GET", f"/v1/jobs/{job_id}/events", headers={"last-event-id": last_id}) as answer:
                    answer.raise_for_status()
                    event: dict[str, str] = {}
                    for line in answer.iter_lines():
                        name, _, value = line.partition(": ")
                        event[name] = value
                        if not line:
                            last_id = event.get("id", last_id)
                            data = json.loads(event.get("data", "{}"))
                            text += data.get("text", "") if event.get("event") == "output.delta" else ""
                            is_over |= event.get("event") == "job.completed"
                            event = {}
            except httpx.HTTPError:
                continue
            if is_over:
                break
        wish.check(text)


def use_long_polls(url: str, tally: Tally, wish: Wish) -> None:
    with _http(url) as http:
        job = _asked(http, tally, "POST", "/v1/jobs", json=wish.job).json()
        while job["status"] in ("queued", "in_progress"):
            job = _asked(http, tally, "GET", f"/v1/jobs/{job['id']}", params={"wait": 10}).json()
        wish.check(job["output"]["text"])


def use_durable_streams(url: str, tally: Tally, wish: Wish) -> None:
    with _http(url) as http:
        job_id = _asked(http, tally, "POST", "/v1/jobs", json=wish.job).json()["id"]
        path, headers = f"/v1/jobs/{job_id}/stream", {"accept": "text/plain"}
        text, offset = "", "-1"
        while True:
            asked = {"offset": offset, "live": "long-poll"}
            answer = _asked(http, tally, "GET", path, params=asked, headers=headers)
            text += answer.text
            offset = answer.headers["stream-next-offset"]
            if "stream-closed" in answer.headers:
                wish.check(text)
                return


def use_web_socket(url: str, tally: Tally, wish: Wish) -> None:
    """A connection that ends with the server's restart is opened again, and the response asked for again."""
    asked = {"type": "response.create", "model": MODEL, "input": "A story", "max_output_tokens": wish.num_tokens}
    for _ in _attempts(tally):
        try:
            with connect(f"{url.replace('http', 'ws', 1)}/v1/responses", open_timeout=30) as socket:
                socket.send(json.dumps(asked))
                text = ""
                while True:
                    event = json.loads(socket.recv(timeout=PATIENCE_SECONDS))
                    text += event["delta"] if event["type"] == "response.output_text.delta" else ""
                    if event["type"] in ("response.completed", "response.incomplete"):
                        told = event["response"]["output"][0]["content"][0]["text"]
                        if told != text:
                            raise Wrong(f"{len(text)} characters of deltas, and {len(told)} in the end")
                        return
                    if event["type"] in ("error", "response.failed"):
                        raise RuntimeError(str(event)[:300])
        except (ConnectionClosed, WebSocketException, OSError):
            continue


def use_batches(url: str, tally: Tally, wish: Wish) -> None:
    """The file takes seconds to arrive."""
    with _sdk(url) as client:
        wishes = [Wish(5 + number, wish.seed + number) for number in range(NUM_LINES)]
        lines = [_line(str(number), one) for number, one in enumerate(wishes)]
        file = client.files.create(file=("lines.jsonl", SlowFile("\n".join(lines).encode())), purpose="batch")
        batch = client.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
        while batch.status not in ("completed", "failed", "expired", "cancelled"):
            time.sleep(0.5)
            batch = client.batches.retrieve(batch.id)
        if batch.output_file_id is None:
            raise RuntimeError(f"the batch is {batch.status}: {batch.errors}")
        for text in client.files.content(batch.output_file_id).text.splitlines():
            line = json.loads(text)
            wishes[int(line["custom_id"])].check(line["response"]["body"]["choices"][0]["text"])


def _line(name: str, wish: Wish) -> str:
    body = {key: value for key, value in wish.completion.items() if key != "extra_body"} | {"ignore_eos": True}
    return json.dumps({"custom_id": name, "method": "POST", "url": "/v1/completions", "body": body})


class SlowFile(io.BytesIO):
    """It is read piece by piece, as over a slow line, and again from its start if it is sent again."""

    def read(self, size: int | None = -1) -> bytes:
        time.sleep(UPLOAD_PAUSE_SECONDS)
        return super().read(len(self.getbuffer()) // UPLOAD_PIECES + 1)


WORKS: dict[str, tuple[Work, int]] = {
    "library": (use_library, 4),
    "openai": (use_sdk, 3),
    "openai stream": (use_sdk_stream, 3),
    "event source": (use_event_source, 3),
    "long poll": (use_long_polls, 2),
    "durable stream": (use_durable_streams, 2),
    "web socket": (use_web_socket, 2),
    "batch": (use_batches, 1),
}


class Clients:
    """Threads of all kinds, from now until `close`."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._is_over = threading.Event()
        self.tallies = {kind: Tally() for kind in WORKS}
        self._threads = [
            threading.Thread(target=self._work, args=(kind, work, number))
            for kind, (work, num) in WORKS.items()
            for number in range(num)
        ]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join()

    def _work(self, kind: str, work: Work, number: int) -> None:
        draw, tally = random.Random(f"{kind} {number}"), self.tallies[kind]
        while not self._is_over.is_set():
            wish = Wish(draw.randint(20, 150), draw.randrange(1000))
            with _noted(tally, wish.num_tokens):
                work(self._url, tally, wish)


@contextmanager
def _noted(tally: Tally, num_tokens: int) -> Iterator[None]:
    began_at = time.monotonic()
    try:
        yield
    except Wrong as exc:
        tally.wrong.append(str(exc))
    except Exception as exc:  # whatever a client raises is what is counted here
        tally.failures.append(f"{type(exc).__name__}: {exc}"[:300])
        time.sleep(0.5)
    else:
        tally.num_done += 1
        tally.num_tokens += num_tokens
    tally.longest_seconds = max(tally.longest_seconds, time.monotonic() - began_at)


def _sdk(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=8)


def _http(url: str) -> httpx.Client:
    return httpx.Client(base_url=url, timeout=60, trust_env=False)


def _attempts(tally: Tally) -> Iterator[None]:
    """One, and others after a moment each, until the caller leaves. Raises TimeoutError."""
    ends_at = time.monotonic() + PATIENCE_SECONDS
    yield
    while time.monotonic() < ends_at:
        tally.num_retries += 1
        time.sleep(RETRY_SECONDS)
        yield
    raise TimeoutError(f"not within {PATIENCE_SECONDS:.0f} s")


def _asked(http: httpx.Client, tally: Tally, method: str, path: str, **options: Any) -> httpx.Response:
    """An answer, however often the connection is lost or a server is on its way out. Raises HTTPStatusError."""
    for _ in _attempts(tally):
        try:
            answer = http.request(method, path, **options)
        except httpx.TransportError:
            continue
        if answer.status_code not in (429, 502, 503):
            return answer.raise_for_status()
    raise AssertionError  # the attempts end with an error
