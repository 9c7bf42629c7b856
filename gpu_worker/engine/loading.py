"""Loads a model's weights and tokenizer, from a folder or a hub id, and finds its limits.

Only safetensors are loaded, and code that comes with a model runs only with trust_remote_code. This file also holds
facts about model families that their configurations do not reliably state, and finds out how much memory is available:
as Linux reports it, or else all physical memory.
"""

import logging
import mmap
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.utils import logging as transformers_logging

from domain.catalog import ModelSpec
from gpu_worker.engine.detokenizer import with_visible_reasoning
from observability import describe_exception
from text.model_files import POSITIONS_BEHIND_PADDING

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Family:
    """Facts about a family of models.

    `turn_ends` are the tokens that end a turn in its chat format. Many checkpoints list only the end-of-text token in
    their configuration, so that the model would go on and write the user's next message.
    """

    turn_ends: tuple[str, ...] = ()
    pooling: Literal["mean", "cls", "last"] = "last"  # for embeddings, unless the model's files specify it


ENCODER = Family(pooling="mean")

CHAT_ML = Family(turn_ends=("<|im_end|>",))

#: By the `model_type` of the configuration. A family that is not listed needs no special treatment.
FAMILIES: dict[str, Family] = {
    **dict.fromkeys(
        ("albert", "bert", "camembert", "distilbert", "electra", "modernbert", "mpnet", "roberta", "xlm-roberta"),
        ENCODER,
    ),
    "cohere2": Family(turn_ends=("<|END_OF_TURN_TOKEN|>",)),
    "gemma2": Family(turn_ends=("<end_of_turn>",)),
    "gemma3_text": Family(turn_ends=("<end_of_turn>",)),
    "gpt_oss": Family(turn_ends=("<|return|>", "<|call|>")),
    "llama": Family(turn_ends=("<|eot_id|>", "<|eom_id|>", "<|im_end|>")),
    "mixtral": CHAT_ML,
    "olmo2": CHAT_ML,
    "phi3": Family(turn_ends=("<|end|>", "<|im_end|>")),
    "qwen2": CHAT_ML,
    "qwen3": CHAT_ML,
    "qwen3_moe": CHAT_ML,
    "smollm3": CHAT_ML,
}


def turn_end_token_ids(model_type: str, tokenizer: Tokenizer) -> frozenset[int]:
    """The family's turn ends that are special tokens of this tokenizer; one that it treats as ordinary text is left
    out."""
    special = {
        token.content: token_id for token_id, token in tokenizer.get_added_tokens_decoder().items() if token.special
    }
    turn_ends = FAMILIES.get(model_type, Family()).turn_ends
    return frozenset(special[content] for content in turn_ends if content in special)


@dataclass(frozen=True, slots=True)
class GroupFiles:
    """The names that one version of control groups gives to its files, and to a line of its `memory.stat`."""

    limit: str
    usage: str
    reclaimable: str


GROUP_FILES_BY_VERSION = {
    2: GroupFiles("memory.max", "memory.current", "inactive_file"),
    1: GroupFiles("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def available_bytes(root: Path = Path("/")) -> int:
    """Memory available to this process: the host's, or what is left in any of our control groups if that is less.

    In both cases, file pages that the kernel can reclaim count as available
    (https://docs.kernel.org/filesystems/proc.html, MemAvailable; https://docs.kernel.org/admin-guide/cgroup-v2.html).
    `root` is the directory that holds `proc` and `sys`.
    """
    return max(0, min([_of_host(root), *_left_by_groups(root)]))


def anonymous_bytes(root: Path = Path("/")) -> int:
    """Resident memory of this process that is not backed by a file; 0 if the kernel does not report it."""
    return _kibibytes(root / "proc/self/status").get("RssAnon", 0)


def lazy_zeros(num_bytes: int) -> mmap.mmap:
    """Anonymous memory, which the kernel zeroes page by page when it is first touched."""
    return mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def _of_host(root: Path) -> int:
    available = _kibibytes(root / "proc/meminfo").get("MemAvailable")
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if available is None else available


def _left_by_groups(root: Path) -> Iterator[int]:
    for folder, files in _groups(root):
        with suppress(OSError, ValueError):  # no memory controller here, or the limit is "max"
            limit = int((folder / files.limit).read_text())
            usage = int((folder / files.usage).read_text())
            stat = (folder / "memory.stat").read_text().splitlines()
            reclaimable = next((int(line.split()[1]) for line in stat if line.startswith(f"{files.reclaimable} ")), 0)
            yield limit - usage + reclaimable


def _groups(root: Path) -> Iterator[tuple[Path, GroupFiles]]:
    """The folders of our control group and of its ancestors. Inside a container, our group may appear as the root of
    the hierarchy although its path is the one that the host knows."""
    with suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            number, controllers, path = line.split(":", 2)
            version = 2 if number == "0" else 1
            if version == 1 and "memory" not in controllers.split(","):
                continue
            mount = root / "sys/fs/cgroup" / ("" if version == 2 else "memory")
            own = mount / path.lstrip("/")
            for folder in (own, *own.parents):
                yield folder, GROUP_FILES_BY_VERSION[version]
                if folder == mount:
                    break


def _kibibytes(path: Path) -> Mapping[str, int]:
    """The lines `name: number kB` of a file in /proc, in bytes."""
    sizes: dict[str, int] = {}
    with suppress(OSError):
        for line in path.read_text().splitlines():
            name, _, value = line.partition(":")
            if value.endswith(" kB"):
                sizes[name] = int(value.removesuffix(" kB")) * 1024
    return sizes


# The first call compiles a thousand patterns for all families, which takes a third of the time needed to load a small
# model. Made here, it is part of the imports, whose result an engine that is restarted after a crash inherits.
get_checkpoint_conversion_mapping("")

SMALL_MODEL_PARAMETERS = 50_000_000

MAX_SMALL_MODEL_THREADS = 4

MAX_COPIED_EMBEDDING_BYTES = 2**28


def choose_device(spec: ModelSpec) -> torch.device:
    if spec.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(spec.device)


def set_threads(model: Any) -> None:
    """Set the number of torch threads, unless OMP_NUM_THREADS is set: all cores, or for a small model all but one.

    The threads of a small model synchronise every few microseconds. If another process takes one of their cores, all
    of them wait for the thread that lost it.
    """
    if "OMP_NUM_THREADS" in os.environ:
        return
    num_cores = len(os.sched_getaffinity(0))
    is_small = model.num_parameters() < SMALL_MODEL_PARAMETERS
    torch.set_num_threads(max(1, min(num_cores - 1, MAX_SMALL_MODEL_THREADS)) if is_small else num_cores)


@torch.no_grad()
def store_weights_by_column(model: Any) -> None:
    """Store every linear layer's weight in column-major order, in place. Shapes do not change.

    On a CPU, this makes float32 products with few rows up to twice as fast. An output layer that shares its weight
    with the embedding gets its own copy, since the embedding reads rows.
    """
    embedding = model.get_input_embeddings().weight
    for module in model.modules():
        if not isinstance(module, torch.nn.Linear) or module.weight.dtype != torch.float32:
            continue
        if module.weight is embedding and embedding.nbytes > MAX_COPIED_EMBEDDING_BYTES:
            continue
        module.weight = torch.nn.Parameter(module.weight.t().contiguous().t(), requires_grad=False)


def load_model(spec: ModelSpec, device: torch.device) -> Any:
    """The model in evaluation mode on its device. Raises ValueError if its files or its entry in models.toml are not
    usable."""
    started = time.monotonic()
    transformers_logging.disable_progress_bar()  # its output would go to the log
    config = _load_config(spec)
    log.info("loading model", extra={"model": spec.id, "path": spec.path, "architecture": config.architectures})
    model_class = AutoModel if spec.task == "embedding" else AutoModelForCausalLM
    model, told = model_class.from_pretrained(
        spec.path,
        config=config,
        revision=spec.revision,
        dtype=_choose_dtype(spec, device),
        use_safetensors=True,
        trust_remote_code=spec.trust_remote_code,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # `_refuse_gaps` reports them
    )
    _refuse_gaps(spec, told)
    model = model.to(device).eval()
    log.info(
        "model loaded",
        extra={"model": spec.id, "num_parameters": model.num_parameters(), "seconds": time.monotonic() - started},
    )
    return model


def _refuse_gaps(spec: ModelSpec, told: Mapping[str, Any]) -> None:
    """Raise ValueError for weights that are missing or have the wrong shape: transformers would fill them with random
    numbers. An embedding model may lack a pooler; we do the pooling, and many checkpoints leave it out."""
    for name, found, wanted in sorted(told["mismatched_keys"]):
        raise ValueError(
            f"{name} has shape {tuple(found)}, but config.json implies {tuple(wanted)}; the weights do not match it"
        )
    names = sorted(name for name in told["missing_keys"] if spec.task != "embedding" or "pooler" not in name.split("."))
    if names:
        raise ValueError(f"{len(names)} weights are missing, including {names[0]}; fetch the model's files again")


def load_tokenizer(spec: ModelSpec) -> Tokenizer:
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            spec.path, revision=spec.revision, trust_remote_code=spec.trust_remote_code
        )
    except Exception as exc:  # transformers raises all kinds of errors for broken files
        raise ValueError(f"its tokenizer cannot be read: {describe_exception(exc)}") from exc
    backend: Tokenizer | None = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(f"model {spec.id!r} has no tokenizer.json; convert its tokenizer to a fast tokenizer")
    return with_visible_reasoning(backend)


def check_length(spec: ModelSpec, model: Any) -> None:
    """Raise ValueError if max_model_len exceeds the positions that the model was trained for: beyond them it has none,
    or would have to rescale all of them."""
    config = model.config.get_text_config()
    max_positions = getattr(config, "max_position_embeddings", None)
    if max_positions is not None and config.model_type in POSITIONS_BEHIND_PADDING:
        max_positions -= config.pad_token_id + 1
    if max_positions is not None and spec.max_model_len > max_positions:
        raise ValueError(
            f"max_model_len of model {spec.id!r} is {spec.max_model_len}, but the model supports {max_positions} "
            "positions; lower it"
        )


def eos_token_ids(model: Any) -> frozenset[int]:
    """All end-of-text tokens of this model, according to its generation config and its config."""
    token_ids: set[int] = set()
    for config in (model.generation_config, model.config.get_text_config()):
        eos = getattr(config, "eos_token_id", None)
        token_ids.update([] if eos is None else [eos] if isinstance(eos, int) else eos)
    return frozenset(token_ids)


def vocab_size(model: Any) -> int:
    """The number of token ids that are valid both as input and as output."""
    sizes = [e.weight.shape[0] for e in (model.get_input_embeddings(), model.get_output_embeddings()) if e is not None]
    return int(min(sizes))


def _load_config(spec: ModelSpec) -> PreTrainedConfig:
    values, _ = PreTrainedConfig.get_config_dict(spec.path, revision=spec.revision)
    if "auto_map" in values and not spec.trust_remote_code:
        raise ValueError(
            f"model {spec.id!r} comes with its own code; if you trust it, set trust_remote_code = true to run it"
        )
    config = AutoConfig.from_pretrained(spec.path, revision=spec.revision, trust_remote_code=spec.trust_remote_code)
    return config


def _choose_dtype(spec: ModelSpec, device: torch.device) -> torch.dtype | str:
    """`auto` means the checkpoint's own type on a GPU, and float32 on a CPU, where it is fastest and most exact."""
    if spec.dtype != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[spec.dtype]
    return "auto" if device.type == "cuda" else torch.float32
