"""The arguments that vLLM is started with: ours, the entry's own, and the keys that are refused by name."""

from pathlib import Path
from typing import Any

import pytest

from domain.catalog import ModelSpec
from gpu_worker.engine.vllm.arguments import engine_arguments
from tests.unit.test_adapters import configure, write_pair

KNOWN = {"enforce_eager", "tensor_parallel_size", "quantization", "load_format", "block_size", "max_loras"}


def arguments(*, is_cpu: bool = True, is_quantised: bool = False, **keys: Any) -> dict[str, Any]:
    spec = ModelSpec(id="m", path="owner/name", revision="abc", backend="vllm", max_model_len=64, **keys)
    return engine_arguments(spec, KNOWN, is_cpu=is_cpu, is_quantised=is_quantised)


def test_an_entrys_own_arguments_are_passed_on() -> None:
    given = arguments(vllm={"tensor_parallel_size": 2, "load_format": "bitsandbytes", "block_size": 64})
    assert given["tensor_parallel_size"] == 2
    assert given["load_format"] == "bitsandbytes"
    assert given["block_size"] == 64


def test_the_general_keys_mean_what_they_mean_with_every_engine() -> None:
    given = arguments(max_num_seqs=3, max_num_batched_tokens=99)
    assert (given["model"], given["revision"], given["max_model_len"]) == ("owner/name", "abc", 64)
    assert (given["max_num_seqs"], given["max_num_batched_tokens"]) == (3, 99)
    assert given["load_format"] == "safetensors"
    assert given["dtype"] == "float32"
    assert arguments(is_cpu=False)["dtype"] == "auto"
    assert arguments(dtype="bfloat16")["dtype"] == "bfloat16"
    assert arguments(is_quantised=True)["dtype"] == "auto", "not all kernels for quantised weights take float32"


@pytest.mark.parametrize(
    ("key", "remedy"),
    [
        ("max_model_len", "set by the model's own key max_model_len"),
        ("num_gpu_blocks_override", "set by the model's own key kv_cache_tokens"),
        ("enable_lora", "set by the model's own key adapters"),
        ("async_scheduling", "set by Celeriac"),
        ("logits_processors", "set by Celeriac"),
        ("tensor_paralel_size", "did you mean tensor_parallel_size?"),
        ("colour", "see vLLM's engine arguments"),
    ],
)
def test_a_key_that_cannot_be_set_is_named_with_the_remedy(key: str, remedy: str) -> None:
    with pytest.raises(ValueError, match=f"vllm.{key} .*") as refused:
        arguments(vllm={key: 1})
    assert remedy in str(refused.value)


def test_there_is_room_for_all_adapters_and_on_a_cpu_a_place_that_stays_empty(tmp_path: Path) -> None:
    adapters = {}
    for name, rank in (("poems", 4), ("support", 20)):
        adapters[name] = str(tmp_path / name)
        (tmp_path / name).mkdir()
        configure(tmp_path / name, r=rank)
        write_pair(tmp_path / name, rank=rank)
    given = arguments(adapters=adapters)
    assert given["enable_lora"] is True
    assert given["max_lora_rank"] == 32, "the least that vLLM has for the largest rank"
    assert (given["max_loras"], given["max_cpu_loras"]) == (3, 3)
    assert arguments(is_cpu=False, adapters=adapters)["max_loras"] == 2
    assert arguments(is_cpu=False, adapters=adapters, vllm={"max_loras": 1})["max_loras"] == 1
    with pytest.raises(ValueError, match=r"vllm\.max_loras is set by Celeriac"):
        arguments(adapters=adapters, vllm={"max_loras": 1})
    assert "enable_lora" not in arguments()
