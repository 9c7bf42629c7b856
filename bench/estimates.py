"""Measures how right the estimates of a job's start and end are: `python -m bench.estimates`.

Mixed jobs of several tenants, whose load swings above and below what the worker can do, go through the whole system
with the fake engine. Each job's estimate is the one that it got when it was accepted; what came is read from SQL.
Prints the share of starts before p90, and the errors of p50, then one JSON line.
"""

import argparse
import http.client
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import psycopg

from bench.accept import server
from bench.time_to_first_token import wait_for_worker, worker
from domain.eta import CLAIM_SECONDS, FLOOR_SECONDS
from local.servers import EmbeddedPostgres, EmbeddedRedis
from storage.database import migrate, open_database, session_factory
from storage.tenants import create_key, create_tenant

MODELS = """
[[models]]
id = "fake"
path = "none"
backend = "fake"
max_model_len = 1024
max_num_seqs = 8
fake = { step_seconds = 0.01, end_chance = 0.01 }
"""

NUM_TENANTS = 4
SWING_SECONDS = 20.0

#: What came, in seconds since acceptance, beside the estimate: [raw start, raw end, p50 and p90 of the start].
STARTS = """
SELECT extract(epoch FROM started_at - created_at)::float8, eta FROM jobs
WHERE eta IS NOT NULL AND started_at IS NOT NULL ORDER BY id"""


def submit_all(port: int, keys: Sequence[str], num_jobs: int, rate: float, draw: random.Random) -> None:
    """At random times; the rate alternates between half and one and a half of `rate`."""
    connection = http.client.HTTPConnection("127.0.0.1", port)
    began_at = due = time.monotonic()
    for _ in range(num_jobs):
        is_busy = (due - began_at) % (2 * SWING_SECONDS) < SWING_SECONDS
        due += draw.expovariate(rate * (1.5 if is_busy else 0.5))
        time.sleep(max(0.0, due - time.monotonic()))
        params = {"max_tokens": draw.choice((8, 32, 128, 256)), "seed": draw.randrange(2**31)}
        body = {"model": "fake", "prompt": "word " * draw.randrange(5, 100), "params": params}
        headers = {"content-type": "application/json", "authorization": f"Bearer {draw.choice(keys)}"}
        connection.request("POST", "/v1/jobs", json.dumps(body), headers)
        response = connection.getresponse()
        answer = response.read()
        assert response.status == 202, answer


def wait_for_all(url: str) -> None:
    with psycopg.connect(url, autocommit=True) as connection:
        while connection.execute("SELECT FROM jobs WHERE finished_at IS NULL LIMIT 1").fetchone():
            time.sleep(1)


def report(url: str, num_first: int) -> dict[str, float]:
    """Without the first jobs, for which there is nothing to go by."""
    with psycopg.connect(url) as connection:
        rows = connection.execute(STARTS).fetchall()[num_first:]
    before = [waited <= eta[3] + CLAIM_SECONDS for waited, eta in rows]
    errors = [abs(eta[2] - waited) / max(waited, FLOOR_SECONDS) for waited, eta in rows]
    waiting = [abs(eta[2] - waited) / waited for waited, eta in rows if waited > 1]
    return {
        "num_jobs": len(rows),
        "num_waiting": len(waiting),
        "share_before_p90": round(sum(before) / len(before), 3),
        "median_error": round(statistics.median(errors), 3),
        "median_error_of_waits_over_1_s": round(statistics.median(waiting), 3) if waiting else 0.0,
        "median_wait_seconds": round(statistics.median(waited for waited, _ in rows), 2),
        "longest_wait_seconds": round(max(waited for waited, _ in rows), 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=1_200)
    parser.add_argument("--rate", type=float, default=11.0, help="jobs per second, on average")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="celeriac-bench-"))
    models = folder / "models.toml"
    models.write_text(MODELS)
    with EmbeddedPostgres(folder / "postgres") as postgres, EmbeddedRedis(folder / "redis") as redis:
        migrate(postgres.url)
        database = open_database(postgres.url)
        with session_factory(database).begin() as session:
            tenants = [create_tenant(session, f"tenant-{number}") for number in range(NUM_TENANTS)]
            keys = [create_key(session, tenant.id) for tenant in tenants]
        database.dispose()
        environment = {
            "CELERIAC_DATABASE_URL": postgres.url,
            "CELERIAC_REDIS_URL": redis.url,
            "CELERIAC_MODELS_FILE": str(models),
            "CELERIAC_AUTH": "api_key",
            "CELERIAC_PORT": "0",
        }
        serve = "from api.server import serve; from settings import get_settings; serve(get_settings())"
        with (
            server([sys.executable, "-c", serve], environment, folder / "api.log") as (_, port),
            worker("fake", environment, folder / "worker.log"),
        ):
            wait_for_worker(port, folder / "worker.log")
            submit_all(port, keys, arguments.jobs + 100, arguments.rate, random.Random(arguments.seed))
            wait_for_all(postgres.url)
        figures = report(postgres.url, 100)
    for name, value in figures.items():
        print(f"  {name:36} {value}")
    print(json.dumps({"bench": "estimates", "rate": arguments.rate, **figures}))


if __name__ == "__main__":
    main()
