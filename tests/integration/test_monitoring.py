"""Dashboards and alerts on the metrics of a running system: every panel has data, and every name and label exists.

If there is a Prometheus (on Debian: apt install prometheus), it scrapes the system and evaluates every expression.
"""

import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from celeriac.client import ApiError, Client
from local.lifetime import ending_with_us
from local.processes import free_port
from settings import ROOT
from tests.chaos.plant import Plant, start_prepared
from tests.waiting import wait_until

pytestmark = pytest.mark.slow

DEPLOY = ROOT / "deploy"
MODEL = "fake"
MODELS = f"""
[[models]]
id = "{MODEL}"
path = "fake"
backend = "fake"
max_model_len = 4096
max_num_seqs = 4

[models.fake]
step_seconds = 0.01
"""
#: Panels about what does not happen here.
MAY_BE_EMPTY = {"system: Findings A", "system: Attempts that were lost A", "system: Webhooks B"}
OF_PROMETHEUS = {"job", "instance", "le"}


def panels(name: str) -> list[dict[str, Any]]:
    board = json.loads((DEPLOY / "grafana/dashboards" / f"{name}.json").read_text())
    return list(board["panels"])


def expressions() -> dict[str, str]:
    """Every expression of the dashboards, the alerts and the scalers of workers, by where it stands."""
    found = {}
    for board in ("system", "model"):
        for panel in panels(board):
            for target in panel["targets"]:
                expr = target["expr"].replace("$__rate_interval", "30s").replace("$model", ".+")
                found[f"{board}: {panel['title']} {target['refId']}"] = expr
    for group in yaml.safe_load((DEPLOY / "alerts.yml").read_text())["groups"]:
        for rule in group["rules"]:
            found[f"alert: {rule['alert']}"] = rule["expr"]
    for scaler in yaml.safe_load_all((DEPLOY / "k8s/scale.yaml").read_text()):
        for number, trigger in enumerate(scaler["spec"]["triggers"]):
            found[f"scaler: {number}"] = trigger["metadata"]["query"].replace("qwen3-8b", MODEL)
    return found


SELECTOR = re.compile(r"\b((?:celeriac|process)_\w+)(?:\{([^}]*)\})?")
MATCHER = re.compile(r'(\w+)(=~|!~|!=|=)"([^"]*)"')
GROUPING = re.compile(r"\b(?:by|on) \(([^)]*)\)")


@pytest.fixture(scope="module")
def plant() -> Iterator[Plant]:
    folder = Path(tempfile.mkdtemp(prefix="celeriac-monitoring-"))
    ports = {"worker_metrics_port": free_port("127.0.0.1", 0), "maintenance_port": free_port("127.0.0.1", 0)}
    plant = Plant(folder, models=MODELS, worker_models={"gpu-1": MODEL}, settings=ports, start=start_prepared)
    with plant:
        plant.start_servers()
        plant.start_parts()
        plant.wait_until_ready()
        plant.urls = [*plant.api_urls, *(f"http://127.0.0.1:{port}" for port in ports.values())]  # type: ignore[attr-defined]
        use(plant)
        yield plant
    shutil.rmtree(folder, ignore_errors=True)


def use(plant: Plant) -> None:
    with Client(plant.api_urls[0]) as client:
        jobs = [client.submit(f"Story {number}", max_tokens=8, model=MODEL) for number in range(4)]
        for job in jobs:
            assert list(client.stream(job.id))[-1].is_terminal
        with pytest.raises(ApiError):
            client.submit("x", max_tokens=100_000, model=MODEL)


def samples_of(plant: Plant) -> dict[str, list[dict[str, str]]]:
    """The labels of every series, by name."""
    found: dict[str, list[dict[str, str]]] = {}
    for url in plant.urls:  # type: ignore[attr-defined]
        for family in text_string_to_metric_families(httpx.get(f"{url}/metrics", timeout=30).text):
            for sample in family.samples:
                found.setdefault(sample.name, []).append(sample.labels)
    return found


def matches(labels: dict[str, str], matchers: list[tuple[str, str, str]]) -> bool:
    for name, operator, value in matchers:
        if name in OF_PROMETHEUS:
            continue
        is_equal = (
            re.fullmatch(value, labels.get(name, "")) is not None if "~" in operator else labels.get(name, "") == value
        )
        if is_equal == operator.startswith("!"):
            return False
    return True


def test_every_selector_names_series_and_labels_that_there_are(plant: Plant) -> None:
    samples = wait_until(
        lambda: (seen := samples_of(plant)) and "celeriac_jobs_latency_seconds_bucket" in seen and seen
    )
    wrong = []
    for place, expr in expressions().items():
        if place in MAY_BE_EMPTY:
            continue
        labels: set[str] = set(OF_PROMETHEUS)
        for name, matchers in SELECTOR.findall(expr):
            series = samples.get(name, [])
            if not series:
                wrong.append(f"{place}: {name} is not there")
            known = {label for one in series for label in one} | OF_PROMETHEUS
            labels |= known
            parsed = MATCHER.findall(matchers)
            wrong += [f"{place}: {name} has no {label}" for label, _, _ in parsed if label not in known]
        grouped = {name.strip() for names in GROUPING.findall(expr) for name in names.split(",")}
        wrong += [f"{place}: nothing has {label}" for label in grouped - labels]
    assert not wrong, "\n".join(wrong)


def test_every_panel_of_a_dashboard_has_series(plant: Plant) -> None:
    samples = samples_of(plant)
    empty = [
        f"{place}: {name}{{{matchers}}}"
        for place, expr in expressions().items()
        if must_show(place)
        for name, matchers in SELECTOR.findall(expr)
        if not any(matches(labels, MATCHER.findall(matchers)) for labels in samples.get(name, []))
    ]
    assert not empty, "\n".join(empty)


def must_show(place: str) -> bool:
    return not place.startswith("alert") and place not in MAY_BE_EMPTY


def test_the_tenants_dashboard_reads_counts_and_nothing_else(plant: Plant) -> None:
    script = (DEPLOY / "grafana/reader.sql").read_text().replace(":'password'", "'secret'")
    create, rest = script.split("\\gexec")
    with psycopg.connect(plant.postgres.url, autocommit=True) as connection:
        [[statement]] = connection.execute(create.encode()).fetchall()
        connection.execute(statement.encode())
        connection.execute(rest.encode())
    with plant.connect() as connection:
        connection.execute("SET ROLE celeriac_grafana")
        for panel in panels("tenant"):
            for target in panel["targets"]:
                query = re.sub(r"\$__timeFilter\(([^)]+)\)", r"\1 > now() - interval '1 hour'", target["rawSql"])
                rows = connection.execute(query.replace("$tenant", "'default'").encode()).fetchall()
                assert rows, panel["title"]
        for secret in (
            "request FROM job_payloads",
            "metadata FROM jobs",
            "secret_sha256 FROM api_keys",
            "signing_key FROM tenants",
        ):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                connection.execute(f"SELECT {secret}".encode())


@pytest.mark.skipif(shutil.which("prometheus") is None, reason="there is no Prometheus (Debian: prometheus)")
def test_prometheus_evaluates_every_expression(plant: Plant, tmp_path: Path) -> None:
    jobs = zip(("celeriac-api", "celeriac-worker", "celeriac-maintenance"), plant.urls, strict=True)  # type: ignore[attr-defined]
    scrapes = [{"job_name": job, "static_configs": [{"targets": [url.removeprefix("http://")]}]} for job, url in jobs]
    shutil.copy(DEPLOY / "alerts.yml", tmp_path)
    settings = {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"}
    config = {"global": settings, "rule_files": ["alerts.yml"], "scrape_configs": scrapes}
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(config))
    port = free_port("127.0.0.1", 0)
    command = ["prometheus", f"--config.file={tmp_path}/prometheus.yml", f"--storage.tsdb.path={tmp_path}/data"]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            ending_with_us([*command, f"--web.listen-address=127.0.0.1:{port}"]), stdout=log, stderr=log
        )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as http:
            evaluate_all(plant, http)
    finally:
        process.terminate()
        process.wait()


def evaluate_all(plant: Plant, http: httpx.Client) -> None:
    def result_of(expr: str) -> Any:
        try:
            answer = http.get("/api/v1/query", params={"query": expr})
        except httpx.HTTPError:  # it is still starting
            return None
        assert answer.status_code in (200, 503), answer.text
        return answer.json()["data"]["result"] if answer.status_code == 200 else None

    def is_counted_by_all() -> bool:
        use(plant)
        counters = ('celeriac_jobs_submitted_total{outcome="accepted"}', "celeriac_jobs_latency_seconds_count")
        rates = [result_of(f"sum(rate({counter}[30s]))") for counter in counters]
        return all(rate and float(rate[0]["value"][1]) > 0 for rate in rates)

    wait_until(is_counted_by_all, "Prometheus has seen the counters grow", pause_seconds=0.5)
    for place, expr in expressions().items():
        if must_show(place):
            wait_until(partial(result_of, expr), f"{place} shows something: {expr}", pause_seconds=0.2)
        else:
            assert result_of(expr) is not None, place
    groups = http.get("/api/v1/rules").json()["data"]["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert {rule["health"] for rule in rules} <= {"ok", "unknown"}
    assert [rule["name"] for rule in rules if rule["state"] == "firing"] == []
