"""One trace from a client's request to the last chunk and the webhook, whichever part did what."""

import json
import logging
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from sqlalchemy.orm import Session, sessionmaker

from domain.catalog import Catalog
from settings import Settings
from storage.files import Batch
from tasks import tracing
from tests.integration.api_harness import ApiServer
from tests.integration.runner_harness import MODEL, Rig
from tests.waiting import wait_until
from tests.webhook_receiver import receiving, sending

pytest.importorskip("opentelemetry.sdk")

from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

TRACE, CLIENT_SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SECRET = "nobody-reads-this-prompt"

Spans = dict[str, ReadableSpan]


class Recorded:
    """The spans of this process, where an API, a worker and a sender of webhooks run."""

    def __init__(self) -> None:
        self.exporter = InMemorySpanExporter()
        self.provider = TracerProvider(shutdown_on_exit=False)
        self.provider.add_span_processor(SimpleSpanProcessor(self.exporter))

    def of_trace(self, trace_id: str) -> Spans:
        spans = self.exporter.get_finished_spans()
        return {span.name: span for span in spans if f"{span.context.trace_id:032x}" == trace_id}

    def wait_for(self, trace_id: str, *names: str) -> Spans:
        def has_all() -> bool:
            return set(names) <= self.of_trace(trace_id).keys()

        wait_until(has_all, f"these spans have ended: {names}")
        return self.of_trace(trace_id)


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorded]:
    recorded = Recorded()
    monkeypatch.setattr(tracing, "tracer", lambda: recorded.provider.get_tracer("celeriac"))
    yield recorded
    recorded.provider.shutdown()


def attributes_of(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


def times_of(span: ReadableSpan) -> tuple[int, int]:
    """Its beginning and end, in nanoseconds."""
    assert span.start_time is not None
    assert span.end_time is not None
    return span.start_time, span.end_time


def parent_of(span: ReadableSpan) -> str | None:
    return None if span.parent is None else f"{span.parent.span_id:016x}"


def test_a_job_is_one_trace_through_all_that_work_on_it(
    rig: Rig, recorded: Recorded, caplog: pytest.LogCaptureFixture
) -> None:
    settings = rig.settings.model_copy(update={"webhook_private_targets": True})
    rig.start()
    caplog.set_level(logging.INFO, "celeriac.jobs")
    messages = [{"role": "user", "content": SECRET}]
    body: dict[str, Any] = {"model": MODEL, "messages": messages, "params": {"max_tokens": 7, "temperature": 0.5}}
    body["params"]["ignore_eos"] = True
    catalog = Catalog.load(settings.models_file)
    with (
        receiving() as receiver,
        sending(settings),
        ApiServer(settings, catalog) as server,
        server.client() as client,
    ):
        headers = {"traceparent": f"00-{TRACE}-{CLIENT_SPAN}-01", "prefer": "wait=60"}
        answer = client.post("/v1/jobs", json=body | {"webhook": receiver.url()}, headers=headers)
        job = answer.json()
        steps = ("accept", "queue", "claim to first token", f"chat {MODEL}", "webhook")
        spans = recorded.wait_for(TRACE, "POST /v1/jobs", *steps)
        request = spans["POST /v1/jobs"]
        place = f"{request.context.span_id:016x}"
        assert parent_of(request) == CLIENT_SPAN
        assert [parent_of(spans[name]) for name in steps] == [place] * len(steps)
        assert {attributes_of(spans[name])["celeriac.job.id"] for name in steps} == {job["id"]}
        assert receiver.received[0].headers["traceparent"] == f"00-{TRACE}-{place}-01"

        generation = spans[f"chat {MODEL}"]
        assert attributes_of(generation) == {
            "celeriac.job.id": job["id"],
            "celeriac.job.status": "completed",
            "celeriac.attempt": 1,
            "gen_ai.operation.name": "chat",
            "gen_ai.provider.name": "celeriac",
            "gen_ai.request.model": MODEL,
            "gen_ai.request.max_tokens": 7,
            "gen_ai.request.temperature": 0.5,
            "gen_ai.request.top_p": 1.0,
            "gen_ai.response.finish_reasons": ("length",),
            "gen_ai.usage.input_tokens": job["usage"]["prompt_tokens"],
            "gen_ai.usage.output_tokens": 7,
        }
        times = [*times_of(spans["queue"]), times_of(spans["claim to first token"])[1], times_of(generation)[1]]
        assert times == sorted(times)
        told = "".join(span.to_json() for span in recorded.exporter.get_finished_spans())
        assert SECRET not in told
        assert job["output"]["text"] not in told
        assert TRACE not in answer.text, "tenants do not see it"
        lines = {record.getMessage(): record for record in caplog.records if record.name == "celeriac.jobs"}
        for line in ("job accepted", "job claimed", "job ended"):
            assert vars(lines[line])["trace_id"] == TRACE

        # Without a client that traces, the request is the root.
        job = client.post("/v1/jobs", json={"model": MODEL, "prompt": "x"}, headers={"traceparent": "x"}).json()
        name = f"text_completion {MODEL}"

        def done() -> list[ReadableSpan]:
            return [span for span in recorded.exporter.get_finished_spans() if span.name == name]

        [attempt] = wait_until(done, "the attempt's span has ended")
        spans = recorded.wait_for(f"{attempt.context.trace_id:032x}", "POST /v1/jobs")
        assert parent_of(attempt) == f"{spans['POST /v1/jobs'].context.span_id:016x}"
        assert spans["POST /v1/jobs"].parent is None


def test_a_batch_remembers_the_request_that_created_it(
    database_url: str, redis_url: str, session_factory: sessionmaker[Session], recorded: Recorded
) -> None:
    line = {"custom_id": "1", "method": "POST", "url": "/v1/completions", "body": {"model": "fake", "prompt": "Hi"}}
    settings = Settings(database_url=database_url, redis_url=redis_url)
    with ApiServer(settings) as api, httpx.Client(base_url=api.url) as http:
        files = {"file": ("in.jsonl", json.dumps(line).encode())}
        file_id = http.post("/v1/files", files=files, data={"purpose": "batch"}).json()["id"]
        body = {"input_file_id": file_id, "endpoint": "/v1/completions", "completion_window": "24h"}
        headers = {"traceparent": f"00-{TRACE}-{CLIENT_SPAN}-01"}
        assert http.post("/v1/batches", json=body, headers=headers).status_code == 200
        span = recorded.wait_for(TRACE, "POST /v1/batches")["POST /v1/batches"]
    with session_factory() as session:
        assert session.query(Batch).one().traceparent == f"00-{TRACE}-{span.context.span_id:016x}-01"


def test_a_job_that_no_request_submitted_is_a_trace_of_its_own(rig: Rig, recorded: Recorded) -> None:
    job_id = rig.add_job(max_tokens=2)
    rig.start().offer([job_id])
    spans = recorded.wait_for(job_id.hex, "queue", f"text_completion {MODEL}")
    assert parent_of(spans["queue"]) == job_id.hex[16:]
