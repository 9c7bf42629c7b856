"""The files of LoRA adapters, in the format of PEFT: which are served, what they change, and their content as a hash.

Free of torch, since the API refuses a faulty adapter before any job is accepted for it. Every error names the file and
the field.
"""

import hashlib
import json
import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from domain.catalog import ModelEntry

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

MAX_RANK = 256

_MAX_CONFIG_BYTES = 2**20
_MAX_HEADER_BYTES = 2**24
_MAX_ALPHA = 2**16

_BACK_ENDS = frozenset({"transformers", "vllm", "fake"})

#: PEFT's options that change what an adapter computes; any other value than these is refused.
_PLAIN_OPTIONS: Mapping[str, tuple[object, ...]] = {
    "alora_invocation_tokens": (None,),
    "alpha_pattern": (None, {}),
    "bias": ("none",),
    "fan_in_fan_out": (False,),
    "kasa_config": (None,),
    "layer_replication": (None,),
    "lora_bias": (False,),
    "modules_to_save": (None, []),
    "monteclora_config": (None,),
    "rank_pattern": (None, {}),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, [], {}),
    "use_bdlora": (None, False),
    "use_dora": (False,),
    "use_qalora": (False,),
}

_TENSOR_NAME = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<half>[AB])\.weight")

_FLOATS = frozenset({"F32", "F16", "BF16"})


@dataclass(frozen=True, slots=True)
class LayerSize:
    """Of the change to one linear layer: A is (rank, num_in) and B (num_out, rank)."""

    num_in: int
    num_out: int


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """A readable adapter: it adds `scaling * B A x` to what each of its modules makes of x."""

    weights: Path
    rank: int
    scaling: float
    size_by_module: Mapping[str, LayerSize]  # by the module's name in the base model

    def tensor_name(self, module: str, half: str) -> str:
        return f"base_model.model.{module}.lora_{half}.weight"


def read_adapters(entry: ModelEntry) -> dict[str, AdapterFiles]:
    """By name. Raises ValueError if the entry has adapters that cannot be served."""
    if not entry.adapters:
        return {}
    if entry.backend not in _BACK_ENDS:
        raise ValueError(
            f'adapters cannot be served by backend {entry.backend!r}; set backend = "transformers", or merge them into '
            "the model"
        )
    if entry.task != "generation":
        raise ValueError(
            f"adapters cannot be served by a model with task {entry.task!r}; remove them, or merge one into the model"
        )
    return {name: _read(name, Path(path)) for name, path in entry.adapters.items()}


def adapters_revision(entry: ModelEntry) -> str:
    """What the entry's adapters add to its revision, so that a text continues only with the same ones; empty if there
    are none."""
    if not entry.adapters:
        return ""
    digest = hashlib.sha256()
    for name, path in sorted(entry.adapters.items()):
        digest.update(f"{name}\0{_hash_files(path)}\0".encode())
    return f"+adapters:{digest.hexdigest()[:16]}"


@lru_cache(maxsize=256)
def _hash_files(path: str) -> str:
    digests = []
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        with (Path(path) / name).open("rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    return " ".join(digests)


def _read(name: str, folder: Path) -> AdapterFiles:
    try:
        config = _read_config(folder)
        rank, scaling = _rank_and_scaling(config)
        return AdapterFiles(folder / WEIGHTS_FILE, rank, scaling, _read_sizes(folder, rank))
    except ValueError as exc:
        raise ValueError(f"adapter {name!r}: {exc}") from exc


def _read_config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder on this machine; correct its path, or fetch it first")
    file = folder / CONFIG_FILE
    if not file.is_file():
        raise ValueError(f"{folder} has no {CONFIG_FILE}; name a folder that PEFT's save_pretrained(…) wrote")
    if file.stat().st_size > _MAX_CONFIG_BYTES:
        raise ValueError(f"{CONFIG_FILE} has more than {_MAX_CONFIG_BYTES} bytes; fetch it again")
    try:
        config = json.loads(file.read_text(encoding="utf-8-sig"))
    except ValueError as exc:
        raise ValueError(f"{CONFIG_FILE} is not valid JSON: {exc}; fetch it again") from exc
    if not isinstance(config, dict):
        raise ValueError(f"{CONFIG_FILE} contains a {type(config).__name__}, not a JSON object; fetch it again")
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{CONFIG_FILE}: peft_type is {config.get('peft_type')!r}, but only 'LORA' is served")
    for option, plain in _PLAIN_OPTIONS.items():
        if option in config and not any(config[option] == value for value in plain):
            raise ValueError(
                f"{CONFIG_FILE}: {option} is {str(config[option])[:100]!r}, which is not supported; merge the adapter "
                "into its model with merge_and_unload(), and serve the result"
            )
    return config


def _rank_and_scaling(config: Mapping[str, Any]) -> tuple[int, float]:
    rank, alpha, is_stabilised = config.get("r"), config.get("lora_alpha"), config.get("use_rslora", False)
    if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= MAX_RANK:
        raise ValueError(f"{CONFIG_FILE}: r is {rank!r}; it must be a whole number from 1 to {MAX_RANK}")
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not 0 < alpha <= _MAX_ALPHA:
        raise ValueError(f"{CONFIG_FILE}: lora_alpha is {alpha!r}; it must be a number above 0, up to {_MAX_ALPHA}")
    if not isinstance(is_stabilised, bool):
        raise ValueError(f"{CONFIG_FILE}: use_rslora is {is_stabilised!r}; it must be true or false")
    return rank, alpha / (math.sqrt(rank) if is_stabilised else rank)


def _read_sizes(folder: Path, rank: int) -> dict[str, LayerSize]:
    halves: dict[str, dict[str, tuple[int, int]]] = {}
    for name, (rows, columns) in _tensor_shapes(folder).items():
        found = _TENSOR_NAME.fullmatch(name)
        if found is None:
            raise ValueError(f"{WEIGHTS_FILE}: {name[:200]!r} is not part of a LoRA of linear layers; merge it")
        if rank != (rows if found["half"] == "A" else columns):
            raise ValueError(f"{WEIGHTS_FILE}: {name} is {rows} x {columns}, but {CONFIG_FILE} says r is {rank}")
        halves.setdefault(found["module"], {})[found["half"]] = rows, columns
    if not halves:
        raise ValueError(f"{WEIGHTS_FILE} is empty; save the adapter again")
    for module, pair in halves.items():
        if len(pair) < 2:
            raise ValueError(f"{WEIGHTS_FILE}: {module} has lora_{next(iter(pair))} alone; save the adapter again")
    return {module: LayerSize(num_in=pair["A"][1], num_out=pair["B"][0]) for module, pair in halves.items()}


def _tensor_shapes(folder: Path) -> dict[str, tuple[int, int]]:
    """From the file's header (https://huggingface.co/docs/safetensors, Format)."""
    file = folder / WEIGHTS_FILE
    if not file.is_file():
        is_pickled = any(folder.glob("adapter_model.bin")) or any(folder.glob("*.pt"))
        remedy = "its weights are pickled; save it with save_pretrained(…, safe_serialization=True)"
        raise ValueError(f"{folder} has no {WEIGHTS_FILE}; {remedy if is_pickled else 'fetch it again'}")
    with file.open("rb") as stream:
        start = stream.read(8)
        num_bytes = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= num_bytes <= _MAX_HEADER_BYTES:
            raise ValueError(f"{WEIGHTS_FILE} has a header of {num_bytes} bytes; fetch it again")
        header = stream.read(num_bytes)
    try:
        tensors = json.loads(header)
        tensors.pop("__metadata__", None)
        shapes = {name: (tensor["dtype"], tensor["shape"]) for name, tensor in tensors.items()}
    except (ValueError, TypeError, AttributeError, KeyError) as exc:
        raise ValueError(f"{WEIGHTS_FILE} has a header that cannot be read; fetch it again") from exc
    for name, (dtype, shape) in shapes.items():
        if dtype not in _FLOATS or not _is_matrix(shape):
            raise ValueError(f"{WEIGHTS_FILE}: {name[:200]} is {dtype} {str(shape)[:100]}, not a matrix of floats")
    return {name: (shape[0], shape[1]) for name, (_, shape) in shapes.items()}


def _is_matrix(shape: object) -> bool:
    return isinstance(shape, list) and len(shape) == 2 and all(type(size) is int and 0 < size < 2**31 for size in shape)
