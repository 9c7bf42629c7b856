"""Loads a model's weights and tokenizer, from a folder or a hub id, and finds its limits.

Only safetensors are loaded, and code that comes with a model runs only with trust_remote_code.
"""

import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
)
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.utils import logging as transformers_logging

from domain.catalog import ModelSpec, Task
from gpu_worker.engine import load_progress
from gpu_worker.engine.detokenizer import with_visible_reasoning
from gpu_worker.engine.host_cpus import num_usable_cpus
from observability import describe_exception
from text.model_files import POSITIONS_AFTER_PADDING

log = logging.getLogger(__name__)


# The first call compiles a thousand patterns for all families, which takes a third of the time needed to load a small
# model. Made here, it is part of the imports, whose result an engine that is restarted after a crash inherits.
get_checkpoint_conversion_mapping("")

WEIGHTS_BAR = "Loading weights"  # what transformers calls the progress bar over the weights

SMALL_MODEL_PARAMETERS = 50_000_000

MAX_SMALL_MODEL_THREADS = 4

MAX_COPIED_EMBEDDING_BYTES = 2**28


def choose_device(spec: ModelSpec) -> torch.device:
    if spec.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(spec.device)


def set_threads(model: Any) -> None:
    """Set the number of torch threads, unless OMP_NUM_THREADS is set: one for each core that this process may use, or
    for a small model one less.

    The threads of a small model synchronise every few microseconds. If another process takes one of their cores, all
    of them wait for the thread that lost it.
    """
    if "OMP_NUM_THREADS" in os.environ:
        return
    num_cores = num_usable_cpus()
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


_CLASS_BY_TASK: dict[Task, Any] = {
    "generation": AutoModelForCausalLM,
    "embedding": AutoModel,
    "scoring": AutoModelForSequenceClassification,
}


def load_model(spec: ModelSpec, device: torch.device) -> Any:
    """The model in evaluation mode on its device. Raises ValueError if its files or its entry in models.toml are not
    usable."""
    started = time.monotonic()
    transformers_logging.disable_progress_bar()  # its output would go to the log
    transformers_logging.set_tqdm_hook(_watched_bar)
    config = _load_config(spec)
    log.info("loading model", extra={"model": spec.id, "path": spec.path, "architecture": config.architectures})
    model_class = _CLASS_BY_TASK[spec.task]
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


def _watched_bar(make_bar: Callable[..., Any], args: Sequence[Any], options: Mapping[str, Any]) -> Any:
    """The progress bar that transformers asks for. Reports how far the one over the weights has come."""
    bar = make_bar(*args, **options)
    if options.get("desc") != WEIGHTS_BAR or not args:
        return bar
    return _reported(bar, len(args[0]))


def _reported(names: Iterable[Any], num_names: int) -> Iterator[Any]:
    for num_done, name in enumerate(names):
        load_progress.report(num_done / num_names)
        yield name


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
    if max_positions is not None and config.model_type in POSITIONS_AFTER_PADDING:
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
    embedding, output_layer = model.get_input_embeddings(), model.get_output_embeddings()
    num_embedded = embedding.weight.shape[0]
    return int(num_embedded if output_layer is None else min(num_embedded, output_layer.out_features))


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
