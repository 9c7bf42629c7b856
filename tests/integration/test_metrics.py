"""Jobs of every kind through the real processes; then each metric that a process declares is found counted in it."""

import json
import re
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from metrics import Process, registries
from tests.chaos.plant import Part, Plant
from tests.waiting import wait_until
from tests.webhook_receiver import Receiver, receiving

FAILING, CRASHING = 13, 66
MODELS = f"""
[[models]]
id = "fake"
path = "none"
backend = "fake"
max_model_len = 512
max_num_seqs = 4
[models.fake]
step_seconds = 0.02
oom_above_n = 3
fail_seed = {FAILING}
fail_at_token = 2
crash_seed = {CRASHING}
memory_bytes = 100

[[models]]
id = "other"
path = "none"
backend = "fake"
max_model_len = 512
[models.fake]
memory_bytes = 100

[[models]]
id = "unserved"
path = "none"
backend = "fake"
max_model_len = 512
"""
SETTINGS = {
    "lease_seconds": 3,
    "lease_grace_seconds": 0.5,
    "janitor_interval_seconds": 0.5,
    "webhook_private_targets": "true",
    "worker_memory": 100,
    "model_residency_seconds": 0,
    "response_cache": "greedy",
}
PROMPT = "Nobody may read this in a label, however long they look for it among all of the others"


@pytest.fixture(scope="module")
def plant() -> Iterator[Plant]:
    folder = Path(tempfile.mkdtemp(prefix="celeriac-metrics-"))
    with Plant(folder, models=MODELS, worker_models={"gpu-1": "fake,other"}, settings=SETTINGS) as plant:
        plant.start_servers()
        plant.start_parts()
        plant.wait_until_ready()
        yield plant
    shutil.rmtree(folder, ignore_errors=True)


def url_of(part: Part) -> str:
    [url] = set(re.findall(r"metrics on (http://[\w.:]+)", part.log()))
    return f"{url}/metrics"


def scrape(url: str) -> str:
    return httpx.get(url, timeout=30).raise_for_status().text


def samples_of(*texts: str) -> dict[str, float]:
    """Added up over all labels but `le`, and over the texts."""
    sums: defaultdict[str, float] = defaultdict(float)
    for text in texts:
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                sums[sample.name] += sample.value
    return dict(sums)


class Caller:
    """A client of the API, and what jobs it wants."""

    def __init__(self, http: httpx.Client) -> None:
        self._http = http

    def post(self, path: str, body: dict[str, Any]) -> httpx.Response:
        return self._http.post(path, json=body)

    def submit(self, model: str = "fake", *, max_tokens: int = 8, seed: int = 1, **fields: Any) -> str:
        params = {"max_tokens": max_tokens, "ignore_eos": True, "seed": seed, "n": fields.pop("n", 1)}
        answer = self.post("/v1/jobs", {"model": model, "prompt": PROMPT, "params": params} | fields)
        assert answer.status_code in (200, 202), answer.text
        return str(answer.json()["id"])

    def wait_for(self, status: str, *job_ids: str) -> None:
        def are_there() -> bool:
            return all(self._http.get(f"/v1/jobs/{job_id}").json()["status"] == status for job_id in job_ids)

        wait_until(are_there, f"{job_ids} are {status}")

    def cancel(self, job_id: str) -> None:
        self.post(f"/v1/jobs/{job_id}/cancel", {})
        self.wait_for("cancelled", job_id)

    def stream(self) -> None:
        """A chat to its end, and a job's stream from a cursor."""
        body = {"model": "fake", "messages": [{"role": "user", "content": PROMPT}], "max_tokens": 8, "stream": True}
        with self._http.stream("POST", "/v1/chat/completions", json=body) as answer:
            assert answer.read().rstrip().endswith(b"[DONE]")
        with self._http.stream("GET", f"/v1/jobs/{self.submit()}/events", headers={"last-event-id": "0"}) as answer:
            assert b"job.completed" in answer.read()

    def run_batch(self) -> None:
        body = {"model": "fake", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
        line = {"custom_id": "one", "method": "POST", "url": "/v1/chat/completions", "body": body}
        content = json.dumps(line).encode() + b"\n"
        file = self._http.post("/v1/files", data={"purpose": "batch"}, files={"file": ("in.jsonl", content)}).json()
        asked = {"input_file_id": file["id"], "endpoint": "/v1/chat/completions", "completion_window": "24h"}
        batch = self.post("/v1/batches", asked).json()
        wait_until(
            lambda: self._http.get(f"/v1/batches/{batch['id']}").json()["status"] == "completed", "the batch ends"
        )


def run_jobs_of_every_kind(caller: Caller, receiver: Receiver) -> None:
    caller.wait_for("completed", caller.submit(webhook=receiver.url(), idempotency_key="a"))
    caller.submit(webhook=receiver.url(), idempotency_key="a")
    assert caller.post("/v1/jobs", {"model": "fake", "prompt": "x " * 600}).status_code == 400
    caller.stream()
    caller.wait_for("completed", caller.submit("other"))  # for which the first model has to make room
    greedy = caller.post("/v1/jobs", {"model": "fake", "prompt": "x", "params": {"temperature": 0, "max_tokens": 1}})
    caller.wait_for("completed", str(greedy.json()["id"]))  # which asks the response cache
    embedding = caller.post("/v1/jobs", {"model": "fake", "inputs": ["one", "two"]}).json()
    caller.wait_for("completed", str(embedding["id"]))
    caller.wait_for("completed", *(caller.submit(max_tokens=60, n=2) for _ in range(2)))  # one of them gives way
    caller.wait_for("failed", caller.submit(seed=FAILING))
    running = caller.submit(max_tokens=400)
    caller.wait_for("in_progress", running)
    caller.cancel(running)
    caller.cancel(caller.submit("unserved"))
    caller.wait_for("expired", caller.submit("unserved", start_timeout=1))
    caller.post("/v1/admin/models/unserved/unload", {})
    assert caller.post("/v1/completions", {"model": "unserved", "prompt": "x"}).status_code == 503
    caller.run_batch()
    wait_until(lambda: receiver.received, "the webhook is delivered")


def uncounted(process: Process, *texts: str) -> list[str]:
    """What a process declares, under its own and under vLLM's names, and has no count or value of."""
    told = samples_of(*texts)
    missing = []
    for family in registries[process].collect():
        if not family.name.startswith(("celeriac_", "vllm:")):
            continue
        if family.name == "celeriac_requests_unserved":  # test_waits_without_an_answer.py has a model without a worker
            continue
        suffix = {"counter": "_total", "histogram": "_count"}.get(family.type, "")
        value = told.get(family.name + suffix)
        # The fake engine has no prefix cache: that a real one's figures arrive is shown by EngineMeter's tests. Nor has
        # the only tenant any job paused: test_runner_pausing.py has several.
        if value is None or (suffix and not value and not re.search("prefix_cache|paused|recomputed", family.name)):
            missing.append(family.name)
    return missing


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_metric_that_a_process_declares_is_counted_in_it(plant: Plant) -> None:
    api_url, [worker], [maintenance] = f"{plant.api_urls[0]}/metrics", plant.workers, plant.maintenance
    with httpx.Client(base_url=plant.api_urls[0], timeout=60) as http, receiving() as receiver:
        caller = Caller(http)
        run_jobs_of_every_kind(caller, receiver)

        def engine_exits() -> float:
            return samples_of(scrape(url_of(worker)))["celeriac_engine_exits_total"]

        def num_steps() -> float:
            return samples_of(scrape(url_of(worker)))["celeriac_engine_steps_total"]

        before = samples_of(scrape(url_of(worker)))
        caller.wait_for("failed", caller.submit(seed=CRASHING))
        wait_until(engine_exits, "the worker has seen its engine die")
        caller.wait_for("completed", caller.submit())
        wait_until(lambda: num_steps() > before["celeriac_engine_steps_total"], "the new engine's steps are counted")
        of_worker = scrape(url_of(worker))
        after = samples_of(of_worker)

        is_alone = caller.submit(max_tokens=400)
        caller.wait_for("in_progress", is_alone)
        worker.kill()
        worker.is_held = True

        def lost() -> float:
            return samples_of(scrape(url_of(maintenance))).get("celeriac_jobs_returned_total", 0.0)

        wait_until(lost, "maintenance has rescued the job")
        texts = {Process.API: [scrape(api_url)], Process.MAINTENANCE: [scrape(url_of(maintenance))]}
        texts[Process.WORKER] = [of_worker]

    assert {process: uncounted(process, *texts[process]) for process in Process} == {process: [] for process in Process}
    # Counters go on over the end of an engine, whose own began at 0 again.
    counters = [name for name in after if name.startswith("celeriac_") and name.endswith("_total")]
    assert [name for name in counters if after[name] < before.get(name, 0)] == []
    # Each job is counted once, by whichever process it was.
    every = [text for told in texts.values() for text in told]
    accepted = sum(values_of(every, "celeriac_jobs_submitted_total", outcome="accepted"))
    with plant.connect() as connection:
        rows = connection.execute("SELECT status, count(*) FROM jobs GROUP BY status").fetchall()
    num_by_status = {str(status): int(str(count)) for status, count in rows}
    assert accepted == sum(num_by_status.values())
    for status in ("completed", "failed", "cancelled", "expired"):
        assert sum(values_of(every, "celeriac_jobs_finished_total", status=status)) == num_by_status[status], status
    assert not any(word in text for text in every for word in (PROMPT, "Nobody"))


def values_of(texts: list[str], name: str, **labels: str) -> Iterator[float]:
    for text in texts:
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name == name and labels.items() <= sample.labels.items():
                    yield sample.value
