"""Findings in /metrics, which is written in a thread while they change."""

from collections.abc import Iterator

import pytest
from prometheus_client import generate_latest

from api import queue_monitor
from api.queue_monitor import _publish_findings
from metrics import Process, maintenance_findings, registries

LASTING = ("unserved_jobs", "tiny")


@pytest.fixture(autouse=True)
def nothing_found() -> Iterator[None]:
    maintenance_findings.clear()
    yield
    maintenance_findings.clear()


class Scraped:
    """The metric, of which a scrape comes after each change."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def __getattr__(self, name: str) -> object:
        self.texts.append(generate_latest(registries[Process.API]).decode())
        return getattr(maintenance_findings, name)


def test_a_finding_that_lasts_is_in_every_scrape(monkeypatch: pytest.MonkeyPatch) -> None:
    _publish_findings({LASTING: 3.0}, ["janitor"])
    scraped = Scraped()
    monkeypatch.setattr(queue_monitor, "maintenance_findings", scraped)
    _publish_findings({LASTING: 3.0, ("orphans", "tiny"): 1.0}, [])
    line = 'celeriac_maintenance_findings{label="tiny",name="unserved_jobs"} 3.0'
    assert scraped.texts
    assert all(line in text for text in scraped.texts)


def test_a_finding_that_no_longer_applies_is_not_shown() -> None:
    _publish_findings({LASTING: 3.0, ("orphans", "tiny"): 1.0}, ["janitor", "batches"])
    _publish_findings({LASTING: 4.0}, ["batches"])
    shown = {
        (sample.labels["name"], sample.labels["label"]): sample.value
        for metric in maintenance_findings.collect()
        for sample in metric.samples
    }
    assert shown == {LASTING: 4.0, ("silent_clocks", "batches"): 1.0}
