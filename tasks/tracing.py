"""Traces by OpenTelemetry: what each process did for a job, as spans of one trace, however many processes it took.

The request that submits a job has a span, whose place (W3C `traceparent`) is stored with the job. All other spans of
the job are its children, written by the process that did the thing, at the moment at which it was done: what a killed
process had not finished has no span, and nothing has to be handed over. A job without a stored place (a line of a
batch) has its id for the id of its trace.

Without an endpoint (OTEL_EXPORTER_OTLP_ENDPOINT) nothing is imported and nothing is recorded; a `traceparent` that a
client sends is still stored, logged and sent on. Spans have ids, counts, codes and times, but no prompt and no output;
their names and attributes are those of https://opentelemetry.io/docs/specs/semconv/gen-ai/ where that has any.
"""

import logging
import os
import re
import time
from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any
from uuid import UUID

from domain.jobs import external_id
from domain.requests import GenerationRequest
from observability import trace_id_of, traceparent_context

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span, Tracer

    from domain.requests import JobRequest

log = logging.getLogger(__name__)

#: https://www.w3.org/TR/trace-context/#traceparent-header, version 0; later ones begin with the same fields.
TRACEPARENT = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(?:-.*)?")
MAX_TRACEPARENT_CHARS = 256
ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
NANOSECONDS = 1_000_000_000
SERVER_ERROR = 500

Attributes = Mapping[str, str | int | float | bool | list[str]]


def read_traceparent(value: str | None) -> str | None:
    """The place that a header states, in the form of version 0; None if it states none that we can read."""
    match = TRACEPARENT.fullmatch(value) if value and len(value) <= MAX_TRACEPARENT_CHARS else None
    return f"00-{match[1]}-{match[2]}-{match[3]}" if match else None


def tracer() -> "Tracer | None":
    """What records the spans of this process; None without an endpoint."""
    found = provider()
    return None if found is None else found.get_tracer("celeriac")


@lru_cache(maxsize=1)
def provider() -> "TracerProvider | None":
    """None without an endpoint. OpenTelemetry's own OTEL_* variables set its exporter, sampler and batches. It sends
    what it has left at the exit of the process."""
    if not any(os.environ.get(name) for name in ENDPOINTS):
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        log.error("OTEL_EXPORTER_OTLP_ENDPOINT is set, but OpenTelemetry is missing: pip install 'celeriac[otel]'")
        return None
    resource = Resource.create({"service.name": os.environ.get("OTEL_SERVICE_NAME", "celeriac")})
    made = TracerProvider(resource=resource)
    made.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return made


class RequestSpan:
    """The span of the HTTP request that this context answers, from now until `end`, below the place that its client
    named. Jobs that the request submits belong to it."""

    def __init__(self, traceparent: str | None) -> None:
        place = read_traceparent(traceparent)
        self._span: Span | None = None
        recorder = tracer()
        if recorder is not None:
            from opentelemetry.trace import SpanKind

            self._span = recorder.start_span("HTTP request", context=_context(place), kind=SpanKind.SERVER)
            ids = self._span.get_span_context()
            place = f"00-{ids.trace_id:032x}-{ids.span_id:016x}-{int(ids.trace_flags):02x}"
        self._token = traceparent_context.set(place)

    def end(self, method: str, route: str, status: int) -> None:
        traceparent_context.reset(self._token)
        if self._span is None:
            return
        self._span.update_name(f"{method} {route}")
        self._span.set_attributes(
            {"http.request.method": method, "http.route": route, "http.response.status_code": status}
        )
        if status >= SERVER_ERROR:
            _fail(self._span, str(status))
        self._span.end()


def trace_ids(job_id: UUID, traceparent: str | None) -> dict[str, str]:
    """What log lines about a job state of its trace."""
    if traceparent is not None:
        return {"trace_id": trace_id_of(traceparent)}
    return {"trace_id": job_id.hex} if tracer() is not None else {}


def job_span(
    name: str,
    job_id: UUID,
    traceparent: str | None,
    *,
    seconds: float = 0.0,
    attributes: Attributes | None = None,
    error: str | None = None,
    linked_to: str | None = None,
) -> None:
    """Record what has been done for a job: something that ends now and began `seconds` ago. `linked_to` is a place in
    another trace that it came from."""
    recorder = tracer()
    if recorder is None:
        return
    now = time.time_ns()
    place = traceparent or f"00-{job_id.hex}-{job_id.hex[16:]}-01"
    span = recorder.start_span(
        name,
        context=_context(place),
        start_time=now - round(max(0.0, seconds) * NANOSECONDS),
        attributes={"celeriac.job.id": external_id(job_id), **(attributes or {})},
        links=_links(linked_to),
    )
    if error is not None:
        _fail(span, error)
    span.end(end_time=now)


def generation_attributes(request: "JobRequest") -> dict[str, Any]:
    """A request in the words of OpenTelemetry's conventions for generative AI, without its contents."""
    if not isinstance(request, GenerationRequest):
        operation = "embeddings"
        given: dict[str, Any] = {}
    else:
        operation = "text_completion" if request.messages is None else "chat"
        params = request.params
        given = {
            "gen_ai.request.temperature": params.temperature,
            "gen_ai.request.top_p": params.top_p,
            "gen_ai.request.max_tokens": params.max_tokens,
        }
    known = {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": "celeriac",
        "gen_ai.request.model": request.model,
    }
    return known | {name: value for name, value in given.items() if value is not None}


def _context(place: str | None) -> Any:
    """OpenTelemetry's context for a child of this place; an empty one for a new trace."""
    from opentelemetry.context import Context
    from opentelemetry.trace import NonRecordingSpan, set_span_in_context

    if place is None:
        return Context()
    return set_span_in_context(NonRecordingSpan(_span_context(place)), Context())


def _links(place: str | None) -> list[Any]:
    from opentelemetry.trace import Link

    return [] if place is None else [Link(_span_context(place))]


def _span_context(place: str) -> Any:
    from opentelemetry.trace import SpanContext, TraceFlags

    _, trace_id, span_id, flags = place.split("-")
    return SpanContext(int(trace_id, 16), int(span_id, 16), is_remote=True, trace_flags=TraceFlags(int(flags, 16)))


def _fail(span: "Span", error: str) -> None:
    from opentelemetry.trace import StatusCode

    span.set_attribute("error.type", error)
    span.set_status(StatusCode.ERROR)
