"""What a model is expected to need, from its files alone."""

import json
from pathlib import Path
from typing import Any

import pytest

from domain.catalog import ModelSpec
from gpu_worker import model_size
from gpu_worker.model_size import ENGINE_BYTES, budget_bytes, need_bytes
from local.gpus import Gpu

BUDGET = 100 * 2**30
CONFIG = {"num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 2, "hidden_size": 64}
BYTES_PER_TOKEN = 2 * 2 * 2 * 8 * 4  # keys and values, layers, heads, head size, float32


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"torch_dtype": "bfloat16"}))
    for name, size in (("model-1.safetensors", 3000), ("model-2.safetensors", 1000)):
        (tmp_path / name).write_bytes(bytes(size))
    return tmp_path


def spec(folder: Path, **values: Any) -> ModelSpec:
    given = {"id": "m", "path": str(folder), "max_model_len": 64, "max_num_seqs": 4, "device": "cpu"}
    return ModelSpec.model_validate(given | values)


def test_on_a_cpu_the_weights_become_float32_and_the_cache_is_as_large_as_set(folder: Path) -> None:
    model = spec(folder, kv_cache_tokens=1000)
    assert need_bytes(model, budget_bytes=BUDGET) == ENGINE_BYTES + 2 * 4000 + 1000 * BYTES_PER_TOKEN


def test_a_cache_whose_size_is_not_set_is_that_of_all_sequences_up_to_a_share(folder: Path) -> None:
    assert need_bytes(spec(folder), budget_bytes=BUDGET) == ENGINE_BYTES + 8000 + 4 * 64 * BYTES_PER_TOKEN
    assert need_bytes(spec(folder), budget_bytes=4000) == ENGINE_BYTES + 8000 + 1000


def test_a_gpu_keeps_the_type_of_the_weights_and_without_a_set_cache_the_model_takes_it_all(folder: Path) -> None:
    model = spec(folder, device="cuda", kv_cache_tokens=1000)
    assert need_bytes(model, budget_bytes=BUDGET) == ENGINE_BYTES + 4000 + 1000 * BYTES_PER_TOKEN // 2
    assert need_bytes(spec(folder, device="cuda"), budget_bytes=BUDGET) == BUDGET


def test_weights_that_are_not_here_may_be_of_any_size(tmp_path: Path) -> None:
    assert need_bytes(spec(tmp_path / "owner/name"), budget_bytes=BUDGET) == BUDGET


def test_a_fake_model_needs_what_it_says(tmp_path: Path) -> None:
    assert need_bytes(spec(tmp_path, backend="fake", fake={"memory_bytes": 7}), budget_bytes=BUDGET) == 7


def test_the_memory_to_share_is_that_of_the_gpu_or_of_the_machine(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_size, "visible_gpus", lambda: [Gpu("0", 1000)])
    monkeypatch.setattr(model_size, "available_bytes", lambda: 500)
    assert budget_bytes([spec(folder, device="cuda"), spec(folder)]) == 900
    assert budget_bytes([spec(folder)]) == 450
