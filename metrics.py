"""All Prometheus metrics, each declared for the processes that measure it, and the server for them.

Each process serves only the metrics that it measures itself (docs/adr/0029), so no process shows a meaningless 0.
Tenants, prompts, outputs and keys are never labels.
"""

import errno
import logging
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import StrEnum
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeVar

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    make_wsgi_app,
    start_http_server,
)
from prometheus_client.metrics_core import Metric as MetricFamily
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from wsgiref.types import WSGIApplication

log = logging.getLogger(__name__)


class Process(StrEnum):
    """The kinds of processes that serve /metrics."""

    API = "API"
    WORKER = "worker"
    MAINTENANCE = "maintenance"


API, WORKER, MAINTENANCE = Process

registries = {process: CollectorRegistry() for process in Process}

# Otherwise each counter and histogram has a second series with the time of its creation.
disable_created_metrics()  # type: ignore[no-untyped-call]

for _registry in registries.values():
    ProcessCollector(registry=_registry)
    GCCollector(registry=_registry)


class CountedHistogram(Histogram):
    """A histogram that finds its bucket by bisection, and can observe many equal values at once."""

    def observe(self, amount: float, exemplar: dict[str, str] | None = None) -> None:
        self.observe_many(amount, 1)

    def observe_many(self, value: float, count: int) -> None:
        self._sum.inc(value * count)
        self._buckets[bisect_left(self._upper_bounds, value)].inc(count)


Metric = TypeVar("Metric", Counter, Gauge, Histogram, CountedHistogram)


class _CountedBy:
    """Declares metrics for the processes that measure them."""

    def __init__(self, *processes: Process) -> None:
        self._processes = processes

    def counter(self, name: str, documentation: str, labels: Sequence[str] = ()) -> Counter:
        return self._register(Counter(name, documentation, labels, namespace="celeriac", registry=None))

    def gauge(self, name: str, documentation: str, labels: Sequence[str] = ()) -> Gauge:
        return self._register(Gauge(name, documentation, labels, namespace="celeriac", registry=None))

    def histogram(
        self, name: str, documentation: str, labels: Sequence[str] = (), *, buckets: Sequence[float]
    ) -> CountedHistogram:
        return self._register(
            CountedHistogram(name, documentation, labels, namespace="celeriac", registry=None, buckets=buckets)
        )

    def _register(self, metric: Metric) -> Metric:
        for process in self._processes:
            registries[process].register(metric)
        return metric


_api, _worker, _maintenance = _CountedBy(API), _CountedBy(WORKER), _CountedBy(MAINTENANCE)

_api_and_maintenance, _worker_and_maintenance = _CountedBy(API, MAINTENANCE), _CountedBy(WORKER, MAINTENANCE)

_all = _CountedBy(*Process)


@lru_cache(maxsize=4096)
def _child(metric: Counter | Gauge | Histogram, *labels: str) -> Any:
    return metric.labels(*labels)


def labelled(metric: Metric, *labels: str) -> Metric:
    """`metric.labels(*labels)`, cached, for metrics that change a thousand times a second."""
    child: Metric = _child(metric, *labels)
    return child


# Metrics. Units are seconds, tokens and ratios, never milliseconds or per cent. Labels have few values: model ids,
# statuses, routes, codes.

_FAST_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)

_SLOW_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 900.0, 3600.0)

_TOKEN_BUCKETS = (0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 10.0)

_SIZE_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)

# Requests and streams

http_requests_total = _api.counter("http_requests_total", "Answered HTTP requests.", ["method", "route", "status"])

http_request_seconds = _api.histogram(
    "http_request_seconds", "From the first byte in to the last byte out.", ["route"], buckets=_FAST_BUCKETS
)

http_requests_in_progress = _api.gauge(
    "http_requests_in_progress", "HTTP requests being answered now, streams included."
)

stream_connections = _api.gauge("stream_connections", "Open SSE streams.")

stream_resumes_total = _api.counter("stream_resumes_total", "Streams opened with a cursor.")

stream_ends_total = _api.counter("stream_ends_total", "Streams by how they ended.", ["reason"])

# A histogram, as it keeps every stall of the loop; a gauge could return to normal before it is scraped.
event_loop_lag_seconds = _api_and_maintenance.histogram(
    "event_loop_lag_seconds",
    "How late a timer of the event loop fired, measured ten times a second.",
    buckets=_FAST_BUCKETS,
)

# The life of a job, in order. tasks/job_log.py counts most of it, where it logs the same transitions.

tokenize_seconds = _api_and_maintenance.histogram(
    "tokenize_seconds", "Rendering and tokenizing one prompt.", ["model"], buckets=_FAST_BUCKETS
)

jobs_submitted_total = _api_and_maintenance.counter(
    "jobs_submitted_total", "Submissions by outcome.", ["model", "outcome"]
)

requests_unserved_total = _api.counter(
    "requests_unserved_total", "Requests that were refused as no worker serves their model.", ["model"]
)

response_cache_total = _api.counter(
    "response_cache_total", "Jobs that asked the response cache, by outcome: hit or miss.", ["model", "outcome"]
)

submitted_prompt_tokens_total = _api_and_maintenance.counter(
    "submitted_prompt_tokens_total", "Prompt tokens of accepted jobs.", ["model"]
)

jobs_accept_group_size = _api.histogram("jobs_accept_group_size", "Jobs accepted by one commit.", buckets=_SIZE_BUCKETS)

jobs_accept_seconds = _api.histogram(
    "jobs_accept_seconds", "One accept statement with its commit.", buckets=_FAST_BUCKETS
)

jobs_accept_waiting = _api.gauge("jobs_accept_waiting", "Submissions waiting for the next accept.")

jobs_queue_seconds = _worker.histogram(
    "jobs_queue_seconds", "From acceptance to the first claim.", ["model"], buckets=_SLOW_BUCKETS
)

jobs_start_eta_ratio = _worker.histogram(
    "jobs_start_eta_ratio",
    "Time from acceptance to the first claim, divided by its median estimate at acceptance; both plus half a second.",
    ["model"],
    buckets=(0.1, 0.2, 0.4, 0.6, 0.75, 0.9, 1.1, 1.33, 1.6, 2.5, 5, 10),
)

jobs_start_eta_total = _worker.counter(
    "jobs_start_eta_total",
    "First claims by whether they came before the 90th percentile of the estimate.",
    ["model", "is_before_p90"],
)

time_to_first_token_seconds = _worker.histogram(
    "time_to_first_token_seconds",
    "From acceptance to the commit of the first output.",
    ["model"],
    buckets=_SLOW_BUCKETS,
)

inter_token_latency_seconds = _worker.histogram(
    "inter_token_latency_seconds",
    "Between two outputs of a sequence, as the engine produces them.",
    ["model"],
    buckets=_TOKEN_BUCKETS,
)

jobs_returned_total = _worker_and_maintenance.counter(
    "jobs_returned_total", "Attempts that ended for reasons outside the job.", ["model", "outcome"]
)

jobs_paused_total = _worker.counter("jobs_paused_total", "Jobs that left their slots to other tenants.", ["model"])

jobs_recomputed_tokens_total = _worker.counter(
    "jobs_recomputed_tokens_total",
    "Tokens of paused jobs that were not in the prefix cache any more when they went on.",
    ["model"],
)

jobs_finished_total = _all.counter(
    "jobs_finished_total", "Jobs that this process brought to their end.", ["model", "status", "finish_reason"]
)

jobs_run_seconds = _worker.histogram(
    "jobs_run_seconds", "From the first claim to the end, completed jobs only.", ["model"], buckets=_SLOW_BUCKETS
)

jobs_latency_seconds = _worker.histogram(
    "jobs_latency_seconds", "From acceptance to the end, completed jobs only.", ["model"], buckets=_SLOW_BUCKETS
)

# The state of SQL, which each API process reads once a second

jobs_queued = _api.gauge("jobs_queued", "Queued jobs by what they wait for.", ["model", "reason"])

jobs_oldest_queued_seconds = _api.gauge(
    "jobs_oldest_queued_seconds", "Age of the oldest queued job that waits for this reason.", ["model", "reason"]
)

jobs_running = _api.gauge("jobs_running", "Jobs in progress.", ["model"])

worker_processes = _api.gauge("worker_processes", "Live GPU workers whose engine is ready.", ["model"])

worker_slots = _api.gauge("worker_slots", "Sequences that these workers can run at once.", ["model"])

webhook_deliveries_pending = _api.gauge("webhook_deliveries_pending", "Deliveries that are neither done nor given up.")

webhook_oldest_due_seconds = _api.gauge(
    "webhook_oldest_due_seconds", "How long the oldest due delivery has been waiting."
)

health_reasons = _api.gauge(
    "health_reasons", "1 for each reason why this API sees an installation that is not well, else 0.", ["reason"]
)

maintenance_findings = _api.gauge(
    "maintenance_findings",
    "Totals of stalled_jobs and load_drift; current orphans, unserved_jobs, gone_revision_jobs and silent_clocks.",
    ["name", "label"],
)

maintenance_seconds_since_last_tick = _api_and_maintenance.gauge(
    "maintenance_seconds_since_last_tick",
    "By clock. Maintenance processes report their own ticks, API processes the newest tick of all, from SQL.",
    ["clock"],
)

# Webhooks

webhook_attempts_total = _maintenance.counter("webhook_attempts_total", "Delivery attempts by outcome.", ["outcome"])

webhook_attempt_seconds = _maintenance.histogram(
    "webhook_attempt_seconds", "The duration of one request to a receiver.", buckets=_FAST_BUCKETS
)

# A worker's engine, across its restarts; updated once a second

prompt_tokens_total = _worker.counter(
    "prompt_tokens_total", "Prompt tokens of attempts that produced output.", ["model"]
)

generated_tokens_total = _worker.counter("generated_tokens_total", "Tokens generated.", ["model"])

engine_computed_prompt_tokens_total = _worker.counter(
    "engine_computed_prompt_tokens_total", "Prompt tokens that were computed, not taken from the cache.", ["model"]
)

engine_prefix_cache_queried_tokens_total = _worker.counter(
    "engine_prefix_cache_queried_tokens_total", "Prompt tokens that were looked up in the prefix cache.", ["model"]
)

engine_prefix_cache_hit_tokens_total = _worker.counter(
    "engine_prefix_cache_hit_tokens_total", "Prompt tokens that were found in the prefix cache.", ["model"]
)

engine_preemptions_total = _worker.counter(
    "engine_preemptions_total", "Sequences that were preempted to free their cache for others.", ["model"]
)

engine_steps_total = _worker.counter("engine_steps_total", "Steps of the engine.", ["model"])

engine_exits_total = _worker.counter("engine_exits_total", "Engine processes that ended unexpectedly.", ["model"])

model_load_seconds = _worker.histogram(
    "model_load_seconds",
    "Time from the start of an engine process until its model was loaded; the count is the number of loads.",
    ["model"],
    buckets=(0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000),
)

model_evictions_total = _worker.counter(
    "model_evictions_total", "Times that a model was unloaded to make room for another one.", ["model"]
)

worker_models_memory_bytes = _worker.gauge(
    "worker_models_memory_bytes", "What the loaded models of the worker need, by estimate or measurement."
)

engine_sequences_running = _worker.gauge("engine_sequences_running", "Sequences in the running batch.", ["model"])

engine_sequences_waiting = _worker.gauge(
    "engine_sequences_waiting", "Sequences of claimed jobs that wait for room in the batch.", ["model"]
)

engine_kv_cache_usage_ratio = _worker.gauge(
    "engine_kv_cache_usage_ratio", "Share of the key/value cache in use, 0 to 1.", ["model"]
)

engine_memory_bytes = _worker.gauge(
    "engine_memory_bytes", "Device memory that the engine uses; on a CPU, the memory of its process.", ["model"]
)

# The same numbers under vLLM's names, so that scalers and dashboards made for vLLM can read them. As in vLLM 0.33.0
# (vllm/v1/metrics/loggers.py), plus the older names of two of them.

Labels = Mapping[str, str]

_VLLM_REASON = {"stop": "stop", "length": "length", "error": "error", "cancelled": "abort", "deadline": "abort"}


def _as_vllm_labels(labels: Labels) -> dict[str, str]:
    own = {"model_name": labels["model"], "engine": "0"}
    return own | ({"le": labels["le"]} if "le" in labels else {})


def _as_vllm_success(labels: Labels) -> dict[str, str]:
    return _as_vllm_labels(labels) | {"finished_reason": _VLLM_REASON[labels["finish_reason"]]}


class VllmNames(Collector):
    """Our metrics under vLLM's names. Samples whose labels become equal are added up."""

    def __init__(self, metric_by_name: Mapping[str, Counter | Gauge | Histogram]) -> None:
        self._metric_by_name = metric_by_name

    def collect(self) -> Iterable[MetricFamily]:
        for name, metric in self._metric_by_name.items():
            relabel = _as_vllm_success if metric is jobs_finished_total else _as_vllm_labels
            for family in metric.collect():
                yield _renamed(family, name, relabel)


def _renamed(family: MetricFamily, name: str, relabel: Callable[[Labels], dict[str, str]]) -> MetricFamily:
    sums: defaultdict[tuple[str, tuple[tuple[str, str], ...]], float] = defaultdict(float)
    for sample in family.samples:
        suffix = sample.name.removeprefix(family.name)
        sums[suffix, tuple(relabel(sample.labels).items())] += sample.value
    renamed = MetricFamily(name, family.documentation, family.type)
    for (suffix, labels), value in sums.items():
        renamed.add_sample(f"{name}{suffix}", dict(labels), value)
    return renamed


registries[API].register(VllmNames({"vllm:num_requests_waiting": jobs_queued}))

registries[WORKER].register(
    VllmNames(
        {
            "vllm:num_requests_running": engine_sequences_running,
            "vllm:kv_cache_usage_perc": engine_kv_cache_usage_ratio,
            "vllm:gpu_cache_usage_perc": engine_kv_cache_usage_ratio,
            "vllm:prompt_tokens": prompt_tokens_total,
            "vllm:generation_tokens": generated_tokens_total,
            "vllm:num_preemptions": engine_preemptions_total,
            "vllm:prefix_cache_queries": engine_prefix_cache_queried_tokens_total,
            "vllm:prefix_cache_hits": engine_prefix_cache_hit_tokens_total,
            "vllm:request_success": jobs_finished_total,
            "vllm:time_to_first_token_seconds": time_to_first_token_seconds,
            "vllm:inter_token_latency_seconds": inter_token_latency_seconds,
            "vllm:time_per_output_token_seconds": inter_token_latency_seconds,
            "vllm:request_queue_time_seconds": jobs_queue_seconds,
            "vllm:e2e_request_latency_seconds": jobs_latency_seconds,
        }
    )
)

MAX_PORTS = 100  # to try from the configured one on, as all workers of a machine may have the same settings


def serve_metrics(
    process: Process,
    host: str,
    port: int,
    add_pages: Callable[["WSGIApplication"], "WSGIApplication"] = lambda application: application,
) -> str | None:
    """Serve the metrics in a thread, and the pages that `add_pages` puts beside them. Returns the URL, or None if no
    port can be opened, which is logged but not fatal."""
    for candidate in range(port, min(port + MAX_PORTS, 65_536)) if port else (0,):
        try:
            server, _ = start_http_server(candidate, host, registries[process])
        except OSError as exc:
            if exc.errno == errno.EADDRINUSE:
                continue
            log.error("cannot serve metrics on %s, port %s: %s", host, port, exc.strerror or exc)
            return None
        server.set_app(add_pages(make_wsgi_app(registries[process])))
        shown = f"[{host}]" if ":" in host else host
        url = f"http://{shown}:{server.server_port}/metrics"
        log.info("metrics on %s", url)
        return url
    log.error("cannot serve metrics: all %d ports of %s from %d on are in use", MAX_PORTS, host, port)
    return None
