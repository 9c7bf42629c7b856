"""The alerts that operators get: told as they are, on metrics that there are, and each shown to fire."""

import re
import shutil
import subprocess
from typing import Any

import pytest
import yaml
from prometheus_client import generate_latest

from metrics import registries
from settings import ROOT

DEPLOY = ROOT / "deploy"
RULES: list[dict[str, Any]] = [
    rule for group in yaml.safe_load((DEPLOY / "alerts.yml").read_text())["groups"] for rule in group["rules"]
]


def served_metrics() -> set[str]:
    text = "".join(generate_latest(registry).decode() for registry in registries.values())
    return set(re.findall(r"^# TYPE (\S+)", text, re.MULTILINE))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_an_alert_looks_at_metrics_that_there_are(rule: dict[str, Any]) -> None:
    names = {name.removesuffix("_bucket") for name in re.findall(r"celeriac_\w+", rule["expr"])}
    assert names <= served_metrics()
    assert names or rule["alert"] == "CeleriacTargetDown"


def test_the_documents_name_no_metric_that_is_not_there() -> None:
    known = served_metrics()
    for document in (ROOT / "docs").glob("*.md"):
        named = set(re.findall(r"\b(?:celeriac_\w+_(?:total|seconds|bytes|ratio)|vllm:\w+)\b", document.read_text()))
        assert named <= known, document.name


def test_the_table_of_alerts_is_that_of_the_rules() -> None:
    told = re.findall(r"^\| `(Celeriac\w+)` \|", (ROOT / "docs/operations.md").read_text(), re.MULTILINE)
    assert told == [rule["alert"] for rule in RULES]


def test_each_alert_has_its_section_in_the_runbooks() -> None:
    headings = re.findall(r"^## (Celeriac\w+)$", (ROOT / "docs/runbooks.md").read_text(), re.MULTILINE)
    assert headings == [rule["alert"] for rule in RULES]
    for rule in RULES:
        assert rule["annotations"]["runbook_url"] == f"docs/runbooks.md#{rule['alert'].lower()}"


@pytest.mark.parametrize("board", ["system", "model"])
def test_a_dashboard_looks_at_metrics_that_there_are(board: str) -> None:
    text = (DEPLOY / "grafana/dashboards" / f"{board}.json").read_text()
    names = {re.sub("_(bucket|count|sum)$", "", name) for name in re.findall(r"\bceleriac_\w+", text)}
    assert names <= served_metrics()


def test_each_alert_has_a_test_that_makes_it_fire() -> None:
    tests = yaml.safe_load((DEPLOY / "alerts_test.yml").read_text())["tests"]
    expected = [one for test in tests for one in test.get("alert_rule_test", ()) if one["exp_alerts"]]
    assert {one["alertname"] for one in expected} == {rule["alert"] for rule in RULES}


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool comes with Prometheus (Debian: prometheus)")
def test_each_alert_fires_where_it_should_and_none_where_all_is_well() -> None:
    for command in (
        "check rules alerts.yml",
        "check config --syntax-only prometheus.yml",
        "check config prometheus-local.yml",
        "test rules alerts_test.yml",
    ):
        done = subprocess.run(["promtool", *command.split()], cwd=DEPLOY, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
