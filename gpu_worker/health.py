"""A worker's /health and /health/ready, beside its metrics: answered from the figures of this process alone."""

import json
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from domain.jobs import WorkerState
from gpu_worker.serving import ModelRunners

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

STUCK_SECONDS = 60.0  # a runner turns several times a second, also while its engine loads

#: A worker in one of these states is not yet what it was started for, or no longer.
NOT_READY = frozenset({WorkerState.LOADING, WorkerState.DRAINING})


def with_health(runners: ModelRunners) -> Callable[["WSGIApplication"], "WSGIApplication"]:
    """Adds the two pages to an application.

    /health is 503 if a runner has not turned for STUCK_SECONDS: restart the process. /health/ready is also 503 while
    the worker loads or drains; one whose model is unloaded by order is ready, since it does what it should.
    """

    def add(others: "WSGIApplication") -> "WSGIApplication":
        def application(environ: "WSGIEnvironment", start_response: "StartResponse") -> Iterable[bytes]:
            path = environ["PATH_INFO"]
            if path not in ("/health", "/health/ready"):
                return others(environ, start_response)
            stats, seconds = runners.stats(), runners.seconds_since_turn
            is_stuck = seconds > STUCK_SECONDS
            is_well = not is_stuck and (path == "/health" or stats.state not in NOT_READY)
            start_response("200 OK" if is_well else "503 Service Unavailable", [("Content-Type", "application/json")])
            body = {
                "status": "stuck" if is_stuck else "ok",
                "state": stats.state,
                "running": stats.num_running,
                "seconds_since_last_turn": round(seconds, 3),
            }
            return [json.dumps(body).encode()]

        return application

    return add
