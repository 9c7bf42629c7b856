"""Random LoRA adapters as PEFT writes them, and models with one merged into their weights, to compare with."""

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

LLAMA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
CONFIG = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none", "use_dora": False, "modules_to_save": None}


def write_adapter(
    folder: Path, model: Any, *, seed: int, targets: Sequence[str] = LLAMA_TARGETS, **config: object
) -> Path:
    """An adapter of every layer of `model` whose name ends with one of `targets`."""
    options = CONFIG | config
    rank = int(str(options["r"]))
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in targets:
            num_out, num_in = module.weight.shape
            for half, shape in (("A", (rank, num_in)), ("B", (num_out, rank))):
                tensors[f"base_model.model.{name}.lora_{half}.weight"] = 0.2 * torch.randn(shape, generator=generator)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(options | {"target_modules": list(targets)}))
    return folder


@torch.no_grad()
def merged(model: Any, folder: Path) -> Any:
    """A copy of the model with W + scaling * B A for each of the adapter's W."""
    config = json.loads((folder / "adapter_config.json").read_text())
    scaling = config["lora_alpha"] / (config["r"] ** 0.5 if config.get("use_rslora") else config["r"])
    tensors = load_file(folder / "adapter_model.safetensors")
    result = copy.deepcopy(model)
    for name, module in result.named_modules():
        down = tensors.get(f"base_model.model.{name}.lora_A.weight")
        if down is not None:
            module.weight += scaling * tensors[f"base_model.model.{name}.lora_B.weight"] @ down
    return result
