"""LoRA adapters that vLLM applies: each is read at load, and each request names its own."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from vllm.lora.request import LoRARequest
from vllm.v1.engine.llm_engine import LLMEngine

from domain.catalog import ModelSpec
from gpu_worker.engine.lora import find_layers
from observability import describe_exception
from text.adapters import read_adapters


def load_adapters(spec: ModelSpec, engine: LLMEngine) -> dict[str, LoRARequest]:
    """By name. Raises ValueError, which names the adapter and what is wrong with it."""
    found: dict[str, LoRARequest] = {}
    model = _empty_model(spec) if spec.adapters else None
    for number, (name, files) in enumerate(read_adapters(spec).items(), start=1):
        request = LoRARequest(name, number, str(files.weights.parent))
        try:
            find_layers(model, files)  # vLLM would copy matrices that are too small into a part of the layer's
            is_new = engine.add_lora(request)
        except Exception as exc:  # vLLM raises all kinds of errors for adapters that it cannot apply
            raise ValueError(f"adapter {name!r}: {describe_exception(exc)}") from exc
        if not is_new:
            raise ValueError(f"adapter {name!r}: vLLM cannot keep it; lower vllm.max_loras")
        found[name] = request
    return found


def _empty_model(spec: ModelSpec) -> Any:
    """The model's layers without weights, to compare sizes with."""
    config = AutoConfig.from_pretrained(spec.path, revision=spec.revision, trust_remote_code=spec.trust_remote_code)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=spec.trust_remote_code)
