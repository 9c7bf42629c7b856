"""Estimates the memory that a model will need, from its files and its entry, before it has been loaded."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from domain.catalog import ModelSpec
from gpu_worker.engine.host_memory import available_bytes
from local.gpus import visible_gpus
from text.model_files import model_folder, read_json_file
from text.models import uses_gpu

BUDGET_SHARE = 0.9  # of the memory there is; the rest is for whatever else runs there
ENGINE_BYTES = 512 * 2**20  # an engine process without a model: its libraries, and on a GPU CUDA's context
CPU_CACHE_SHARE = 0.25  # a cache whose size is not set is limited to this share of the memory
BYTES_BY_DTYPE = {"float32": 4, "bfloat16": 2, "float16": 2}


def budget_bytes(models: Sequence[ModelSpec]) -> int:
    """The memory that these models may use together: of the GPU, if any of them runs on it, else of this machine."""
    if any(map(uses_gpu, models)) and (gpus := visible_gpus()):
        return int(BUDGET_SHARE * gpus[0].total_bytes)
    return int(BUDGET_SHARE * available_bytes())


def need_bytes(model: ModelSpec, *, budget_bytes: int) -> int:
    """The weights, the key/value cache and the engine itself. All of `budget_bytes` if the weights are not in a folder
    here, or if the cache takes what a GPU has left: such a model cannot share."""
    if model.backend == "fake":
        return int(model.fake.get("memory_bytes", 0))
    if model.backend == "remote":  # the model is in another server's memory
        return 0
    weight_bytes = _weight_bytes(Path(model.path))
    on_gpu = uses_gpu(model)
    if not weight_bytes or (on_gpu and model.kv_cache_tokens is None and model.task == "generation"):
        return budget_bytes
    if model.backend != "transformers":  # the file is what is loaded; the cache is added once it has been measured
        return ENGINE_BYTES + weight_bytes
    config = read_json_file(model_folder(model) / "config.json")
    stored_bytes = BYTES_BY_DTYPE.get(str(config.get("dtype") or config.get("torch_dtype")), 4)
    number_bytes = BYTES_BY_DTYPE.get(model.dtype, stored_bytes if on_gpu else 4)  # of `auto`: see docs/models.md
    cache_bytes = _cache_bytes(model, config, number_bytes)
    if model.kv_cache_tokens is None:
        cache_bytes = min(cache_bytes, int(CPU_CACHE_SHARE * budget_bytes))
    return ENGINE_BYTES + weight_bytes * number_bytes // stored_bytes + cache_bytes


def _weight_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for pattern in ("*.safetensors", "*.gguf") for file in folder.glob(pattern))


def _cache_bytes(model: ModelSpec, config: Mapping[str, Any], number_bytes: int) -> int:
    """The keys and values of all tokens that may be cached; 0 if the configuration does not tell their sizes."""
    if model.task != "generation":
        return 0
    text = config.get("text_config") or config
    num_layers, num_heads = text.get("num_hidden_layers") or 0, text.get("num_attention_heads") or 1
    num_kv_heads = text.get("num_key_value_heads") or num_heads
    head_size = text.get("head_dim") or (text.get("hidden_size") or 0) // num_heads
    num_tokens = model.kv_cache_tokens or model.max_num_seqs * model.max_model_len
    return int(2 * num_layers * num_kv_heads * head_size * number_bytes * num_tokens)
