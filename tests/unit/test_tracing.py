"""Traces: which headers are taken, and that nothing is imported, recorded or logged where none are wanted."""

import subprocess
import sys
from uuid import uuid4

import pytest

from observability import traceparent_context
from settings import ROOT
from tasks import tracing
from tests.webhook_receiver import receiving

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
PLACE = f"00-{TRACE}-{SPAN}-01"


@pytest.mark.parametrize(
    ("header", "place"),
    [
        (PLACE, PLACE),
        (f"00-{TRACE}-{SPAN}-00", f"00-{TRACE}-{SPAN}-00"),
        (f"01-{TRACE}-{SPAN}-01-of-a-later-version", PLACE),
        (None, None),
        ("", None),
        ("hello", None),
        (f"ff-{TRACE}-{SPAN}-01", None),
        (f"00-{'0' * 32}-{SPAN}-01", None),
        (f"00-{TRACE}-{'0' * 16}-01", None),
        (f"00-{TRACE.upper()}-{SPAN}-01", None),
        (f"00-{TRACE}-{SPAN}", None),
        (f"01-{TRACE}-{SPAN}-01-" + "x" * 1000, None),
        (PLACE + "\n", None),
    ],
)
def test_a_place_is_read_as_the_standard_says(header: str | None, place: str | None) -> None:
    assert tracing.read_traceparent(header) == place


def test_without_an_endpoint_a_place_is_passed_on_and_nothing_else_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in tracing.ENDPOINTS:
        monkeypatch.delenv(name, raising=False)
    tracing.provider.cache_clear()
    span = tracing.RequestSpan(PLACE)
    assert traceparent_context.get() == PLACE
    tracing.job_span("queue", uuid4(), PLACE, seconds=1.0)
    span.end("POST", "/v1/jobs", 202)
    assert traceparent_context.get() is None
    assert tracing.trace_ids(uuid4(), PLACE) == {"trace_id": TRACE}
    assert tracing.trace_ids(uuid4(), None) == {}


def test_without_an_endpoint_nothing_is_imported() -> None:
    code = (
        "import sys; from uuid import uuid4; from tasks import tracing\n"
        "tracing.job_span('queue', uuid4(), None)\n"
        "tracing.RequestSpan(None).end('GET', '/', 200)\n"
        "assert not [name for name in sys.modules if name.startswith('opentelemetry')]"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, check=True)


def test_spans_are_sent_to_the_endpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    protocol = pytest.importorskip("opentelemetry.proto.collector.trace.v1.trace_service_pb2")
    job_id = uuid4()
    with receiving() as receiver:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{receiver.port}")
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "none")
        monkeypatch.setenv("OTEL_SERVICE_NAME", "celeriac-test")
        tracing.provider.cache_clear()
        try:
            tracing.job_span("queue", job_id, PLACE, seconds=1.5, error="boom")
            tracing.job_span("accept", job_id, None)
            provider = tracing.provider()
            assert provider is not None
            provider.shutdown()  # as at the exit of a process
        finally:
            tracing.provider.cache_clear()
    [received] = receiver.received
    assert received.path == "/v1/traces"
    [resource] = protocol.ExportTraceServiceRequest.FromString(received.body).resource_spans
    facts = {one.key: one.value.string_value for one in resource.resource.attributes}
    assert facts["service.name"] == "celeriac-test"
    queue, accept = resource.scope_spans[0].spans
    assert (queue.trace_id.hex(), queue.parent_span_id.hex()) == (TRACE, SPAN)
    assert queue.end_time_unix_nano - queue.start_time_unix_nano == 1_500_000_000
    assert accept.trace_id.hex() == job_id.hex


def test_an_endpoint_without_the_extra_is_said_and_does_no_harm(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    tracing.provider.cache_clear()
    try:
        tracing.job_span("queue", uuid4(), None)
    finally:
        tracing.provider.cache_clear()
    assert "pip install 'celeriac[otel]'" in caplog.text
