"""Measures what one request of the largest size costs an API process, by kind: `python -m bench.request_cost`.

Each request is as large as bodies may be, and consists mostly of one thing: keys, items, tokens or brackets. Prints for
each the CPU time of the event loop's thread and of the whole process, and the slowest answer of /health/live meanwhile;
then one JSON line. First comes the ceiling: /health/live with nothing else going on, and a body of that size that is
refused unread.
"""

import argparse
import http.client
import json
import os
import platform
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import psutil

from bench.accept import server
from local.servers import EmbeddedPostgres, EmbeddedRedis
from settings import ROOT
from storage.database import migrate

MAX_BYTES = 1_048_576
PROBE_SECONDS = 0.002  # between two requests for /health/live
AFTERWARDS_SECONDS = 0.05  # a stream may begin some time after its headers
MODEL = "celeriac-mini"
LARGE = "large"  # a model with the longest context in use, whose tokens are bytes
MODELS = f"""
[[models]]
id = "{MODEL}"
path = "{ROOT / "models" / MODEL}"
max_model_len = 1024

[[models]]
id = "{LARGE}"
path = "fake"
backend = "fake"
max_model_len = 262144
"""


class Kind(NamedTuple):
    path: str
    body: bytes


class Cost(NamedTuple):
    """The status, and times in milliseconds."""

    status: int
    loop_cpu: float
    process_cpu: float
    answered_after: float
    health_after: float


def repeated(before: str, item: str, after: str, *, between: str = ",") -> bytes:
    """As many items as the bound on bodies allows. A `#` in an item becomes its number."""
    room = MAX_BYTES - len(before) - len(after)
    width = len(item.replace("#", "0" * 7)) + len(between)
    num_items = room // width
    items = [item.replace("#", f"{number:07}") for number in range(num_items)] if "#" in item else [item] * num_items
    return (before + between.join(items) + after).encode()


JOB = f'{{"model":"{MODEL}","prompt":"a"'
CHAT = f'{{"model":"{MODEL}","messages":[{{"role":"user","content":"a"}}]'
RESPONSE = f'{{"model":"{MODEL}","input":"a"'
COMPLETION = f'{{"model":"{MODEL}","prompt":"a"'
EMBEDDING = f'{{"model":"{MODEL}"'
MESSAGE = '{"role":"user","content":""}'
SCHEMA = CHAT + ',"response_format":{"type":"json_schema","json_schema":{"name":"a","schema":'
TOOL = '{"type":"function","function":{"name":"a","parameters":'


def _keys(before: str, after: str, value: str = '""') -> bytes:
    """Keys, the last of which appears twice."""
    return repeated(before, f'"#":{value}', f',"x":1,"x":1{after}')


def _accepted(before: str, item: str, *, num_items: int = 240) -> bytes:
    items = ",".join(item.replace("#", str(number)) for number in range(num_items))
    return f'{{"model":"{LARGE}","stream":true,{before}{items}]}}'.encode()


@lru_cache
def bodies_by_kind() -> dict[str, Kind]:
    """Every kind of large body that may be sent to a route, including acceptable ones."""
    job, chat, response = "/v1/jobs", "/v1/chat/completions", "/v1/responses"
    completion, embedding = "/v1/completions", "/v1/embeddings"
    kinds = {
        "doubled key in metadata": Kind(job, _keys(JOB + ',"metadata":{', "}}")),
        "doubled key at the top": Kind(chat, _keys(CHAT + ",", "}")),
        "doubled key in every object": Kind(chat, repeated('{"messages":[', '{"#":1,"#":1}', "]}")),
        "doubled key at depth": Kind(job, _keys('{"a":' * 20 + "{", "}" * 21)),
        "metadata, many": Kind(job, repeated(JOB + ',"metadata":{', '"#":""', "}}")),
        "metadata, numbers": Kind(chat, repeated(CHAT + ',"metadata":{', '"#":1', "}}")),
        "unknown fields": Kind(job, repeated(JOB + ",", '"#":1', "}")),
        "unknown fields, chat": Kind(chat, repeated(CHAT + ",", '"#":1', "}")),
        "unknown fields in every message": Kind(chat, repeated('{"model":"m","messages":[', '{"#":1}', "]}")),
        "unknown field of great length": Kind(job, repeated(JOB + ',"', "a", '":1}', between="")),
        "empty messages": Kind(job, repeated(f'{{"model":"{MODEL}","messages":[', "{}", "]}")),
        "empty messages, chat": Kind(chat, repeated(f'{{"model":"{MODEL}","messages":[', "{}", "]}")),
        "good messages": Kind(job, repeated(f'{{"model":"{MODEL}","messages":[', MESSAGE, "]}")),
        "good messages, chat": Kind(chat, repeated(f'{{"model":"{MODEL}","messages":[', MESSAGE, "]}")),
        "numbers for messages": Kind(chat, repeated(f'{{"model":"{MODEL}","messages":[', "1", "]}")),
        "parts of one message": Kind(
            chat,
            repeated(f'{{"model":"{MODEL}","messages":[{{"role":"user","content":[', '{"type":"text"}', "]}]}"),
        ),
        "bad parts of one message": Kind(
            chat, repeated(f'{{"model":"{MODEL}","messages":[{{"role":"user","content":[', "{}", "]}]}")
        ),
        "tool calls of one message": Kind(
            chat,
            repeated(
                f'{{"model":"{MODEL}","messages":[{{"role":"assistant","tool_calls":[',
                '{"id":"a","function":{"name":"a","arguments":""}}',
                "]}]}",
            ),
        ),
        "empty tools": Kind(job, repeated(JOB + ',"tools":[', "{}", "]}")),
        "empty tools, chat": Kind(chat, repeated(CHAT + ',"tools":[', "{}", "]}")),
        "good tools": Kind(chat, repeated(CHAT + ',"tools":[', '{"type":"function","function":{"name":"a#"}}', "]}")),
        "parameters of a tool": Kind(
            chat, repeated(CHAT + ',"tools":[' + TOOL + '{"properties":{', '"#":{}', '}}}}],"tool_choice":"required"}')
        ),
        "parameters of a tool, unenforced": Kind(
            chat, repeated(CHAT + ',"tools":[' + TOOL + '{"properties":{', '"#":true', "}}}}]}")
        ),
        "empty tools, responses": Kind(response, repeated(RESPONSE + ',"tools":[', "{}", "]}")),
        "anyOf of a schema": Kind(chat, repeated(SCHEMA + '{"anyOf":[', "{}", "]}}}}")),
        "properties of a schema": Kind(chat, repeated(SCHEMA + '{"properties":{', '"#":{}', "}}}}}")),
        "enum of a schema": Kind(chat, repeated(SCHEMA + '{"enum":[', "1", "]}}}}")),
        "unknown keywords of a schema": Kind(chat, repeated(SCHEMA + "{", '"#":1', "}}}}")),
        "description of a schema": Kind(
            chat, repeated(SCHEMA + '{"description":"', "a", '"}}},"stream":true}', between="")
        ),
        "anyOf, structured_output": Kind(
            job, repeated(JOB + ',"params":{"structured_output":{"json_schema":{"anyOf":[', "{}", "]}}}}")
        ),
        "choices, structured_output": Kind(
            job, repeated(JOB + ',"params":{"structured_output":{"choices":[', '"#"', "]}}}")
        ),
        "grammar": Kind(job, repeated(JOB + ',"params":{"structured_output":{"lark":"', "a{1,2}", '"}}}', between="")),
        "regex": Kind(job, repeated(JOB + ',"params":{"structured_output":{"regex":"', "(", '"}}}', between="")),
        "logit_bias, bad names": Kind(chat, repeated(CHAT + ',"logit_bias":{', '"a#":1', "}}")),
        "logit_bias, good names": Kind(chat, repeated(CHAT + ',"logit_bias":{', '"1#":1', "}}")),
        "logit_bias, native": Kind(job, repeated(JOB + ',"params":{"logit_bias":{', '"a#":1', "}}}")),
        "stop strings": Kind(chat, repeated(CHAT + ',"stop":[', '"a"', "]}")),
        "empty stop strings": Kind(job, repeated(JOB + ',"params":{"stop":[', '""', "]}}")),
        "numbers for stop strings": Kind(chat, repeated(CHAT + ',"stop":[', "1", "]}")),
        "stop token ids": Kind(chat, repeated(CHAT + ',"stop_token_ids":[', "1", "]}")),
        "bad token ids": Kind(job, repeated(JOB + ',"params":{"bad_token_ids":[', "-1", "]}}")),
        "negative prompt_token_ids": Kind(job, repeated(f'{{"model":"{MODEL}","prompt_token_ids":[', "-1", "]}")),
        "prompt_token_ids": Kind(job, repeated(f'{{"model":"{MODEL}","prompt_token_ids":[', "1", "]}")),
        "prompt_token_ids of text": Kind(job, repeated(f'{{"model":"{MODEL}","prompt_token_ids":[', '""', "]}")),
        "webhook_events": Kind(job, repeated(JOB + ',"webhook":"https://a.example","webhook_events":[', '"x"', "]}")),
        "prompts, completions": Kind(completion, repeated(f'{{"model":"{MODEL}","prompt":[', '""', "]}")),
        "mixed prompts, completions": Kind(completion, repeated(f'{{"model":"{MODEL}","prompt":["a",', "1", "]}")),
        "tokens, completions": Kind(completion, repeated(f'{{"model":"{MODEL}","prompt":[', "1", "]}")),
        "negative tokens, completions": Kind(completion, repeated(f'{{"model":"{MODEL}","prompt":[', "-1", "]}")),
        "lists of tokens, completions": Kind(completion, repeated(f'{{"model":"{MODEL}","prompt":[', "[1]", "]}")),
        "texts for embeddings": Kind(embedding, repeated(EMBEDDING + ',"input":[', '"a"', "]}")),
        "tokens for an embedding": Kind(embedding, repeated(EMBEDDING + ',"input":[', "1", "]}")),
        "lists of tokens for embeddings": Kind(embedding, repeated(EMBEDDING + ',"input":[', "[]", "]}")),
        "inputs of an embedding job": Kind(job, repeated(EMBEDDING + ',"inputs":[', "{}", "]}")),
        "input items": Kind(response, repeated(f'{{"model":"{MODEL}","input":[', "{}", "]}")),
        "good input items": Kind(
            response, repeated(f'{{"model":"{MODEL}","input":[', '{"role":"user","content":"a"}', "]}")
        ),
        "unknown input items": Kind(response, repeated(f'{{"model":"{MODEL}","input":[', '{"type":"x"}', "]}")),
        "function calls as input": Kind(
            response,
            repeated(
                f'{{"model":"{MODEL}","input":[',
                '{"type":"function_call","call_id":"a","name":"a","arguments":""}',
                "]}",
            ),
        ),
        "include, responses": Kind(response, repeated(RESPONSE + ',"include":[', '"x"', "]}")),
        "prompts, simple": Kind("/generate", repeated('{"prompts":[', "1", "]}")),
        "good prompts, simple": Kind("/generate", repeated('{"prompts":[', '"a"', "]}")),
        "event types": Kind(
            "/v1/webhook_endpoints",
            repeated('{"name":"a","url":"https://a.example","event_types":[', '"x"', "]}"),
        ),
        "brackets": Kind(job, repeated('{"a":', "[", "", between="")),
        "shallow brackets": Kind(job, repeated('{"a":[', "[[]]", "]}")),
        "quotes": Kind(job, repeated("", '"', "", between="")),
        "backslashes": Kind(job, repeated('{"a":"', "\\\\", '"}', between="")),
        "digits": Kind(job, repeated('{"a":', "1", "}", between="")),
        "numbers of many digits": Kind(job, repeated('{"a":[', "9" * 4000, "]}")),
        "fractions": Kind(job, repeated('{"a":[', "1." + "9" * 300, "]}")),
        "escapes": Kind(job, repeated(f'{{"model":"{MODEL}","prompt":"', "\\u0000", '"}', between="")),
        "a long prompt": Kind(job, repeated(f'{{"model":"{MODEL}","prompt":"', "ab ", '"}', between="")),
        "a long prompt, chat": Kind(
            chat, repeated(f'{{"model":"{MODEL}","messages":[{{"role":"user","content":"', "ab ", '"}]}', between="")
        ),
        "unfinished string of quotes": Kind(job, repeated('{"a":[[' * 17 + '"', '\\"', "", between="")),
        "digits behind a point": Kind(job, repeated('{"a":1.', "9", "}", between="")),
        "accepted: a long prompt": Kind(job, f'{{"model":"{LARGE}","prompt":"{"ab " * 87_000}"}}'.encode()),
        "accepted: token ids": Kind(job, f'{{"model":"{LARGE}","prompt_token_ids":[{"7," * 262_000}7]}}'.encode()),
        "accepted: long messages": Kind(chat, _accepted('"messages":[', f'{{"role":"user","content":"{"a " * 500}"}}')),
        "accepted: long input items": Kind(
            response, _accepted('"input":[', f'{{"role":"user","content":"{"a " * 500}"}}')
        ),
        "accepted: prompts of token ids": Kind(
            completion, repeated(f'{{"model":"{LARGE}","stream":true,"prompt":[', "[" + "7," * 4095 + "7]", "]}")
        ),
        "accepted: tools": Kind(
            chat,
            _accepted(
                '"messages":[{"role":"user","content":"a"}],"tools":[',
                '{"type":"function","function":{"name":"a#","description":"' + "a " * 900 + '"}}',
                num_items=120,
            ),
        ),
        "blanks": Kind(job, b" " * (MAX_BYTES - 200) + (JOB + "}").encode()),
        "no JSON": Kind(job, b"\xff" * MAX_BYTES),
    }
    return kinds


class LoopWatch:
    """Requests /health/live as often as it can, and remembers the slowest answer."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self.longest_seconds = 0.0

    @contextmanager
    def watching(self) -> Iterator[None]:
        self._thread.start()
        time.sleep(10 * PROBE_SECONDS)
        try:
            yield
        finally:
            self._is_over.set()
            self._thread.join()

    def _look(self) -> None:
        with closing(http.client.HTTPConnection("127.0.0.1", self._port, timeout=600)) as connection:
            while not self._is_over.wait(PROBE_SECONDS):
                started = time.perf_counter()
                connection.request("GET", "/health/live")
                connection.getresponse().read()
                self.longest_seconds = max(self.longest_seconds, time.perf_counter() - started)


def thread_cpu_seconds(pid: int) -> float:
    """CPU time of the main thread, which runs the event loop."""
    return int(Path(f"/proc/{pid}/task/{pid}/schedstat").read_text().split()[0]) / 1e9


def process_cpu_seconds(pid: int) -> float:
    folder = Path(f"/proc/{pid}/task")
    return sum(int((task / "schedstat").read_text().split()[0]) for task in folder.iterdir()) / 1e9


def post(port: int, kind: Kind, headers: Mapping[str, str] | None = None) -> int:
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=600)) as connection:
        connection.request("POST", kind.path, kind.body, {"content-type": "application/json", **(headers or {})})
        answer = connection.getresponse()
        if not answer.getheader("content-type", "").startswith("text/event-stream"):
            answer.read()  # there are no workers, so a stream would not end
        return answer.status


def look_once(port: int) -> int:
    time.sleep(0.2)
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)) as connection:
        connection.request("GET", "/health/live")
        return connection.getresponse().status


def cost_of(pid: int, port: int, send: Callable[[], int]) -> Cost:
    """The cost of two requests: one alone, for the CPU time, and one that is watched, since watching costs CPU, too."""
    started, loop_cpu, process_cpu = time.perf_counter(), thread_cpu_seconds(pid), process_cpu_seconds(pid)
    status = send()
    answered_after = time.perf_counter() - started
    time.sleep(AFTERWARDS_SECONDS)
    loop_cpu, process_cpu = thread_cpu_seconds(pid) - loop_cpu, process_cpu_seconds(pid) - process_cpu
    watch = LoopWatch(port)
    with watch.watching():
        send()
        time.sleep(AFTERWARDS_SECONDS)
    seconds = (loop_cpu, process_cpu, answered_after, watch.longest_seconds)
    return Cost(status, *(round(1000 * value, 1) for value in seconds))


@contextmanager
def api_process(folder: Path, environment: Mapping[str, str]) -> Iterator[tuple[psutil.Process, int]]:
    with EmbeddedPostgres(folder / "postgres") as postgres, EmbeddedRedis(folder / "redis") as redis:
        migrate(postgres.url)
        models_file = folder / "models.toml"
        models_file.write_text(MODELS)
        servers = {
            "CELERIAC_DATABASE_URL": postgres.url,
            "CELERIAC_REDIS_URL": redis.url,
            "CELERIAC_PORT": "0",
            "CELERIAC_MODELS_FILE": str(models_file),
            "CELERIAC_NO_WORKERS_SECONDS": "86400",  # there are no workers, but every request must be examined
        }
        serve = "from api.server import serve; from settings import get_settings; serve(get_settings())"
        with server([sys.executable, "-c", serve], servers | dict(environment), folder / "api.log") as (process, port):
            yield process, port


def measure(pid: int, port: int, kinds: Mapping[str, Kind]) -> dict[str, Cost]:
    costs = {}
    for name, kind in kinds.items():
        costs[name] = cost = cost_of(pid, port, lambda kind=kind: post(port, kind))  # type: ignore[misc]
        print(
            f"{name:36} {len(kind.body):9} bytes   {cost.status}   CPU of the loop {cost.loop_cpu:8.1f}, "
            f"of the process {cost.process_cpu:8.1f}   answered after {cost.answered_after:8.1f}   "
            f"/health/live {cost.health_after:8.1f} ms",
            flush=True,
        )
    return costs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="only kinds whose names contain this")
    given = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    kinds = {name: kind for name, kind in bodies_by_kind().items() if given.only in name}
    with (
        tempfile.TemporaryDirectory(prefix="celeriac-bench-", ignore_cleanup_errors=True) as folder,
        api_process(Path(folder), {}) as (process, port),
    ):
        post(port, Kind("/v1/jobs", (JOB + "}").encode()))  # warm
        nothing = cost_of(process.pid, port, lambda: look_once(port))
        unread = cost_of(process.pid, port, lambda: post(port, Kind("/v1/jobs", b" " * (MAX_BYTES + 1))))
        print(
            f"ceiling: /health/live alone {nothing.health_after} ms; a body refused unread {unread.loop_cpu} ms of CPU"
        )
        costs = measure(process.pid, port, kinds)
    worst_loop = max(costs, key=lambda name: costs[name].loop_cpu)
    worst_health = max(costs, key=lambda name: costs[name].health_after)
    figures = {
        "worst_loop_cpu_ms": {worst_loop: costs[worst_loop].loop_cpu},
        "worst_health_ms": {worst_health: costs[worst_health].health_after},
        "kinds": {name: cost._asdict() for name, cost in costs.items()},
    }
    print(json.dumps({"bench": "request_cost", **figures}))


if __name__ == "__main__":
    main()
