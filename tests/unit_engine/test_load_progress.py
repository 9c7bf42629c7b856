"""How far a load has come, as the back ends that can tell report it."""

import pytest
import torch

from domain.catalog import Catalog
from gpu_worker.engine import load_progress
from gpu_worker.engine.loading import load_model
from settings import ROOT
from text.models import complete


def test_loading_weights_is_reported_from_nothing_to_nearly_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_progress, "MIN_PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(load_progress, "_listener", None)
    shares: list[float] = []
    load_progress.listen(shares.append)
    load_model(complete(Catalog.load(ROOT / "models.toml").first), torch.device("cpu"))
    assert len(shares) > 10
    assert shares == sorted(shares)
    assert shares[0] == 0.0
    assert 0.8 < shares[-1] < 1.0


def test_reports_that_follow_each_other_closely_are_not_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_progress, "MIN_PAUSE_SECONDS", 3600.0)
    monkeypatch.setattr(load_progress, "_listener", None)
    shares: list[float] = []
    load_progress.listen(shares.append)
    for percent in range(100):
        load_progress.report(percent / 100)
    assert shares == [0.0]


def test_weights_that_a_back_end_reads_itself_are_told_by_their_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_progress, "MIN_PAUSE_SECONDS", 0.0)
    shares: list[float] = []
    load_progress.listen(shares.append)
    weights = [("embedding", torch.zeros(6, dtype=torch.int8)), ("head", torch.zeros(2, dtype=torch.int8))]
    assert [name for name, _ in load_progress.reported(weights, 8)] == ["embedding", "head"]
    assert shares == [0.0, 0.75]
