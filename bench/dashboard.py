"""Measures what an open tab of the dashboard costs the API and PostgreSQL: `python -m bench.dashboard`.

A Chromium looks at each view in turn for a few seconds, and at the overview in a hidden tab, with 10,000 jobs in the
table of which 50 are held as running. CPU is that of the processes while the tab is open, less that of the same time
without one. Prints a line for each view, then one JSON line. Needs a Chromium and the packages of `make test`.
"""

import argparse
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from uuid import uuid4

import psutil
from playwright.sync_api import sync_playwright
from sqlalchemy import Engine

from bench.accept import cpu_seconds, server
from bench.api_costs import postgres_seconds
from bench.response_cache import MODEL, SERVE
from local.servers import EmbeddedPostgres, EmbeddedRedis
from storage import job_accept, jobs
from storage.database import migrate, open_database, session_factory
from tests.storage_samples import new_job

VIEWS = ("#/", "#/jobs", "#/jobs?status=in_progress", "#/batches", "#/dead-letters", "#/models", "#/usage")
HIDE = "Object.defineProperty(document, 'hidden', {value: true}); document.dispatchEvent(new Event('visibilitychange'))"
GROUP = 500
NUM_RUNNING = 50
REVISION = "main"


def fill(database: Engine, num_jobs: int) -> None:
    sessions = session_factory(database)
    for _ in range(num_jobs // GROUP):
        request = new_job().request.model_copy(update={"model": MODEL})
        with sessions.begin() as session:
            group = [new_job(request=request, model_revision=REVISION) for _ in range(GROUP)]
            job_accept.accept(session, group, max_queued_jobs=10**9)
    with sessions.begin() as session:
        running = jobs.claim(
            session, MODEL, limit=NUM_RUNNING, owner=uuid4(), model_revision=REVISION, lease_seconds=86_400
        )
    assert len(running) == NUM_RUNNING


def spent(api: psutil.Process, database: Engine) -> tuple[float, float]:
    return cpu_seconds(api), postgres_seconds(database)


def cost(page: Any, api: psutil.Process, database: Engine, seconds: float) -> dict[str, float]:
    """Requests and milliseconds of CPU per second while the page stays as it is."""
    asked: list[Any] = []

    def note(request: Any) -> None:
        asked.append(request)

    page.on("requestfinished", note)
    before = spent(api, database)
    page.wait_for_timeout(seconds * 1000)
    after = spent(api, database)
    page.remove_listener("requestfinished", note)
    api_ms, postgres_ms = ((end - start) * 1000 / seconds for start, end in zip(before, after, strict=True))
    return {"requests": len(asked) / seconds, "api_ms": api_ms, "postgres_ms": postgres_ms}


def measure(url: str, api: psutil.Process, database: Engine, seconds: float) -> dict[str, dict[str, float]]:
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    figures = {}
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page()
        figures["no tab"] = cost(page, api, database, seconds)
        for view in VIEWS:
            page.goto(f"{url}/{view}")
            page.reload()
            page.wait_for_timeout(3_000)  # what is asked once, when it opens, is no running cost
            figures[view] = cost(page, api, database, seconds)
        page.goto(f"{url}/#/")
        page.wait_for_timeout(3_000)
        page.evaluate(HIDE)
        figures["hidden"] = cost(page, api, database, seconds)
        browser.close()
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=10_000)
    parser.add_argument("--seconds", type=float, default=15)
    given = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as name,
        EmbeddedPostgres(Path(name) / "postgres") as postgres,
        EmbeddedRedis(Path(name) / "redis") as redis,
    ):
        migrate(postgres.url)
        database = open_database(postgres.url)
        fill(database, given.jobs)
        urls = {"CELERIAC_DATABASE_URL": postgres.url, "CELERIAC_REDIS_URL": redis.url, "CELERIAC_PORT": "0"}
        with server([sys.executable, "-c", SERVE], urls, Path(name) / "api.log") as (api, port):
            time.sleep(5)  # its start is over
            figures = measure(f"http://127.0.0.1:{port}", api, database, given.seconds)
        database.dispose()
    idle = figures["no tab"]
    for view, one in figures.items():
        api_ms, postgres_ms = (one[name] - idle[name] for name in ("api_ms", "postgres_ms"))
        print(
            f"{view:26} {one['requests']:5.2f} requests/s, ms of CPU a second: API {api_ms:.1f}, SQL {postgres_ms:.1f}"
        )
    machine = {"cpu": platform.processor(), "cores": os.cpu_count()}
    print(json.dumps({"bench": "dashboard"} | machine | {"jobs": given.jobs, "figures": figures}))


if __name__ == "__main__":
    main()
