"""What no worker can serve is called by its name before a job is accepted for it, by the model's files alone."""

import ast
from collections.abc import Mapping
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from domain.catalog import ModelEntry

_ARCHITECTURES_BY_TASK = {"generation": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "embedding": "MODEL_MAPPING_NAMES"}
_PICKLES = ("*.bin", "*.pt", "*.pth")


def refuse_unservable(entry: ModelEntry, folder: Path, config: Mapping[str, Any]) -> None:
    """Raises ValueError that says what `folder` holds instead of a model that can be served, and what to do."""
    is_whole = Path(entry.path).is_dir()  # of a model of the hub, only the descriptions are here
    has_weights = any(folder.glob("*.safetensors"))
    if (folder / "adapter_config.json").is_file() and not (config and (has_weights or not is_whole)):
        raise ValueError(
            f"{entry.path} holds a LoRA adapter, which is not served by itself; merge it into its base model with "
            "merge_and_unload(), and save that"
        )
    if not config and (any(folder.glob("*.gguf")) or "gguf" in entry.path.lower()):
        raise ValueError(f"{entry.path} holds GGUF files, which are not served; name a folder with safetensors")
    missing = [name for name in ("tokenizer.json", "config.json") if not (folder / name).is_file()]
    if is_whole and not has_weights and entry.backend == "transformers":
        missing.append("*.safetensors")
    if missing:
        raise ValueError(f"{entry.path} has no {', no '.join(missing)}; {_remedy(folder, missing)}")
    if entry.backend == "transformers":
        _refuse_configuration(entry, config)


def _remedy(folder: Path, missing: list[str]) -> str:
    is_tokenizer_slow = any(folder.glob("*.model")) or (folder / "vocab.json").is_file()
    if missing == ["tokenizer.json"] and is_tokenizer_slow:
        return "its tokenizer is a slow one, so convert it with AutoTokenizer.from_pretrained(…).save_pretrained(…)"
    if missing == ["tokenizer.json"]:
        return "save the model's fast tokenizer there"
    if missing == ["*.safetensors"] and any(file for pattern in _PICKLES for file in folder.glob(pattern)):
        return "its weights are pickled, so convert them with save_pretrained(…), which writes safetensors"
    return "add what is missing, or name the folder where it lies"


def _refuse_configuration(entry: ModelEntry, config: Mapping[str, Any]) -> None:
    quantisation = config.get("quantization_config")
    if quantisation:
        method = quantisation.get("quant_method") if isinstance(quantisation, dict) else quantisation
        raise ValueError(
            f"{entry.path} is quantised by {method or 'an unknown method'}, which is not served; name the model that "
            "it was made of"
        )
    if "auto_map" in config and not entry.trust_remote_code:
        raise ValueError(f"{entry.path} brings its own code; set trust_remote_code = true to run it, if you trust it")
    model_type = config.get("model_type")
    known = _known_architectures(_ARCHITECTURES_BY_TASK[entry.task])
    if "auto_map" in config or (model_type is not None and (model_type in known or not known)):
        return
    if not isinstance(model_type, str):
        raise ValueError("config.json: model_type is missing, so nobody knows the model's architecture; add it")
    raise ValueError(
        f"config.json: model_type is {model_type!r}, an architecture that transformers does not know for task "
        f"{entry.task!r}; change task, or update transformers"
    )


@lru_cache(maxsize=2)
def _known_architectures(table: str) -> frozenset[str]:
    """Read as text: transformers takes seconds to import. Empty where it is not installed."""
    package = find_spec("transformers")
    if package is None or package.origin is None:
        return frozenset()
    source = Path(package.origin).parent / "models" / "auto" / "modeling_auto.py"
    for node in ast.parse(source.read_text(encoding="utf-8")).body if source.is_file() else []:
        if isinstance(node, ast.Assign) and table in {getattr(target, "id", "") for target in node.targets}:
            texts = [part.elts[0] for part in ast.walk(node.value) if isinstance(part, ast.Tuple) and part.elts]
            return frozenset(str(text.value) for text in texts if isinstance(text, ast.Constant))
    return frozenset()
