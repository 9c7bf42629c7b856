"""vLLM's engine arguments: the entry's general keys in vLLM's terms, and the entry's own `vllm` table. Free of vLLM."""

from collections.abc import Collection, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from domain.catalog import ModelSpec
from domain.requests import MAX_ALTERNATIVES
from text.adapters import MAX_RANK, read_adapters

CPU_BLOCK_SIZE = (
    32  # the least that vLLM's attention on CPUs accepts; its default is 128, which are rarely shared whole
)

#: What the `vllm` table may not set, and where it is set instead.
OWN_KEYS = {
    "model": "path",
    "revision": "revision",
    "dtype": "dtype",
    "max_model_len": "max_model_len",
    "max_num_seqs": "max_num_seqs",
    "max_num_batched_tokens": "max_num_batched_tokens",
    "num_gpu_blocks_override": "kv_cache_tokens",
    "trust_remote_code": "trust_remote_code",
    "enable_lora": "adapters",
    "max_lora_rank": "adapters",
    "max_cpu_loras": "adapters",
}

LORA_RANKS = (8, 16, 32, 64, 128, MAX_RANK)  # for which vLLM can reserve memory


def engine_arguments(
    spec: ModelSpec, known: Collection[str], *, is_cpu: bool, is_quantised: bool = False
) -> dict[str, Any]:
    """The arguments of vLLM's EngineArgs, whose fields are `known`. Raises ValueError, which names the key."""
    ours = (
        _fixed_arguments()
        | _general_arguments(spec, is_exact=is_cpu and not is_quantised)
        | _adapter_arguments(spec, is_cpu=is_cpu)
    )
    refuse_bad_keys(spec.vllm, known, ours)
    defaults: dict[str, Any] = {"load_format": "safetensors"}
    if spec.adapters:
        defaults["max_loras"] = len(spec.adapters)  # in one batch
    if is_cpu:
        defaults["block_size"] = CPU_BLOCK_SIZE
    return defaults | dict(spec.vllm) | ours


def refuse_bad_keys(options: Mapping[str, object], known: Collection[str], ours: Collection[str]) -> None:
    for key in options:
        if key in OWN_KEYS:
            raise ValueError(f"vllm.{key} is set by the model's own key {OWN_KEYS[key]}; move the value there")
        if key in ours:
            raise ValueError(f"vllm.{key} is set by Celeriac, as its jobs depend on it; remove it")
        if key not in known:
            close = get_close_matches(key, known, n=1)
            remedy = f"did you mean {close[0]}?" if close else "see vLLM's engine arguments"
            raise ValueError(f"vllm.{key} is not an engine argument of the vLLM installed here; {remedy}")


def _fixed_arguments() -> dict[str, Any]:
    return {
        "tokenizer": None,
        "skip_tokenizer_init": True,  # token ids in, token ids out
        "generation_config": "vllm",  # its defaults are filled in when a job is submitted
        "disable_log_stats": True,
        "enable_prefix_caching": True,
        "scheduling_policy": "priority",
        # The next step's draws depend on this step's tokens: grammars and penalties.
        "async_scheduling": False,
        "speculative_config": None,
        "logprobs_mode": "raw_logprobs",
        "max_logprobs": MAX_ALTERNATIVES,
        "seed": 0,
        "logits_processors": ["gpu_worker.engine.vllm.processor:OurDraws"],
        "scheduler_cls": "gpu_worker.engine.vllm.scheduler.RecordingScheduler",
    }


def _general_arguments(spec: ModelSpec, *, is_exact: bool) -> dict[str, Any]:
    """`dtype` auto means float32 on a CPU, as with the other back ends, except for quantised checkpoints, of which
    vLLM's kernels for CPUs do not all take float32."""
    return {
        "model": spec.path,
        "revision": None if Path(spec.path).is_dir() else spec.revision,
        "dtype": "float32" if is_exact and spec.dtype == "auto" else spec.dtype,
        "max_model_len": spec.max_model_len,
        "max_num_seqs": spec.max_num_seqs,
        "max_num_batched_tokens": spec.max_num_batched_tokens,
        "num_gpu_blocks_override": None,  # set once the size of a block is known
        "trust_remote_code": spec.trust_remote_code,
    }


def _adapter_arguments(spec: ModelSpec, *, is_cpu: bool) -> dict[str, Any]:
    """All adapters stay in the host's memory, so that none is read from its files again while jobs run.

    On a CPU, vLLM 0.32 adds the adapter in its last place to the rows that have none. That place stays empty here:
    there is one more than there are adapters.
    """
    if not spec.adapters:
        return {}
    rank = max(files.rank for files in read_adapters(spec).values())
    places: dict[str, Any] = {"max_loras": len(spec.adapters) + 1} if is_cpu else {}
    return places | {
        "enable_lora": True,
        "max_lora_rank": next(room for room in LORA_RANKS if room >= rank),
        "max_cpu_loras": len(spec.adapters) + 1,
    }
