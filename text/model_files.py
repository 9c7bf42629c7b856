"""A model's files: finding or downloading them, their revision, the values in them, and which models are refused.

Each value is checked where it is read, and errors name its file. A model that no worker can serve is recognised by its
files alone, before any job is accepted for it.
"""

import ast
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from domain.catalog import ModelEntry
from local.engine_environments import missing_interpreter
from text.adapters import adapters_revision, read_adapters

#: How an embedding model pools many vectors into one, as in sentence-transformers.
POOLING_FILES = ("modules.json", "1_Pooling/config.json")

ADDITIONAL_TEMPLATES = "additional_chat_templates"

_DESCRIPTION_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    *POOLING_FILES,
)

#: Also read, but without effect on a model's output.
_OTHER_FILES = ("adapter_config.json", "sentence_bert_config.json")

_WEIGHT_SUFFIXES = frozenset({".safetensors", ".gguf"})

_NUM_WEIGHT_SAMPLES = 64

_WEIGHT_SAMPLE_BYTES = 65_536


def model_folder(entry: ModelEntry) -> Path:
    """The folder with the files that describe the model. For a hub id they are downloaded first, but never the weights.
    Raises ValueError, which says what is wrong with `path` or why the files cannot be downloaded."""
    path = Path(entry.path)
    if path.is_dir():
        return path
    if path.is_file():
        raise ValueError(f"path {entry.path!r} is a file; name the folder that holds it and the model's tokenizer.json")
    if path.is_absolute() or entry.path[0] in ".~" or entry.path.count("/") > 1:
        raise ValueError(
            f"path {entry.path!r} is not a folder on this machine; correct it, or use the id of a model on the hub"
        )
    return _fetch(entry)


def _fetch(entry: ModelEntry) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    names = [*_DESCRIPTION_FILES, *_OTHER_FILES, f"{ADDITIONAL_TEMPLATES}/*.jinja"]
    try:
        return Path(snapshot_download(entry.path, revision=entry.revision, allow_patterns=names))
    except GatedRepoError as exc:
        raise ValueError(f"{entry.path} is gated on the hub; ask for access there and set HF_TOKEN") from exc
    except RevisionNotFoundError as exc:
        raise ValueError(f"the hub has no revision {entry.revision!r} of {entry.path}; correct revision") from exc
    except RepositoryNotFoundError as exc:
        raise ValueError(
            f"{entry.path!r} is neither a folder here nor a model on the hub; correct path, or set HF_TOKEN"
        ) from exc
    except HFValidationError as exc:
        raise ValueError(
            f"path {entry.path!r} is not a folder here and cannot be a model on the hub; correct it"
        ) from exc
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as exc:
        raise ValueError(
            f"{entry.path!r} is not a folder here and could not be fetched from the hub; check path, revision and the "
            "network"
        ) from exc


def model_revision(spec: ModelEntry) -> str:
    """The revision that a job is pinned to once it has output: equal on every machine that serves the same files.

    For a local folder it is a hash: of the descriptive files as a whole, and of the weights' sizes and evenly spaced
    samples, so that retrained weights differ and a large model costs milliseconds. For a hub model it is the commit
    that its revision names. The content of its adapters follows, if it has any, and how its weights are quantised.
    """
    if spec.backend == "fake" and not Path(spec.path).is_dir():
        return f"fake:{spec.revision}"
    own = _hash_folder(spec.path) if Path(spec.path).is_dir() else model_folder(spec).name
    if spec.remote is not None:  # all that we know of its weights is their name
        weights = spec.remote.model or spec.id
        own = f"remote:{hashlib.sha256(f'{weights} {own}'.encode()).hexdigest()[:40]}"
    return own + adapters_revision(spec) + ("" if spec.quantization == "none" else f"+{spec.quantization}")


@lru_cache(maxsize=64)
def _hash_folder(path: str) -> str:
    digest = hashlib.sha256()
    for file in sorted(Path(path).iterdir()):
        if file.name in _DESCRIPTION_FILES:
            digest.update(f"{file.name}\0{file.stat().st_size}\0".encode() + file.read_bytes())
        elif file.name == ADDITIONAL_TEMPLATES:
            for template in sorted(file.glob("*.jinja")):
                digest.update(f"{template.name}\0{template.stat().st_size}\0".encode() + template.read_bytes())
        elif file.name == "1_Pooling" and (file / "config.json").is_file():
            digest.update(b"1_Pooling\0" + (file / "config.json").read_bytes())
        elif file.suffix in _WEIGHT_SUFFIXES:
            digest.update(f"{file.name}\0{file.stat().st_size}\0".encode())
            _hash_samples(digest, file)
    return f"sha256:{digest.hexdigest()[:40]}"


def _hash_samples(digest: "hashlib._Hash", file: Path) -> None:
    size = file.stat().st_size
    stride = max(size // _NUM_WEIGHT_SAMPLES, _WEIGHT_SAMPLE_BYTES)
    with file.open("rb") as weights:
        for offset in range(0, size, stride):
            weights.seek(offset)
            digest.update(weights.read(_WEIGHT_SAMPLE_BYTES))


def read_json_file(file: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if there is no such file. Raises ValueError, which names the file."""
    if not file.is_file():
        return {}
    try:
        content = json.loads(read_text_file(file))
    except ValueError as exc:
        raise ValueError(f"{file.name} is not valid JSON: {exc}; correct it") from exc
    if not isinstance(content, dict):
        raise ValueError(f"{file.name} contains a {type(content).__name__}, not a JSON object; correct it")
    return content


def read_text_file(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as exc:
        raise ValueError(f"{file.name} is not UTF-8: {exc}; correct it") from exc


#: Families whose positions start after the id of the padding token.
POSITIONS_AFTER_PADDING = frozenset({"camembert", "mpnet", "roberta", "xlm-roberta"})

_CONFIG, _GENERATION, _TOKENIZER = "config.json", "generation_config.json", "tokenizer_config.json"

_LENGTHS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "seq_length", "n_ctx")

_WIDTHS = ("hidden_size", "n_embd", "d_model", "dim")

_NO_LENGTH = 10**9  # transformers writes 10^30 for a tokenizer without a limit

_MAX_LENGTH = 10_000_000


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """Defaults for what a request leaves out: the model's generation_config.json, else neutral values."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_new_tokens: int | None = None

    def without(self, params: Iterable[str]) -> "GenerationDefaults":
        """With neutral values for the parameters that the model's engine does not have."""
        neutral: dict[str, Any] = {field.name: field.default for field in fields(self) if field.name in set(params)}
        return replace(self, **neutral)


def generation_defaults(config: Mapping[str, Any]) -> GenerationDefaults:
    """`do_sample: false` only counts if it is in the file, since it is also the default. A top_k of -1 means off, like
    0. Raises ValueError, which names the field."""
    neutral = GenerationDefaults()
    temperature = 0.0 if config.get("do_sample") is False else neutral.temperature
    return GenerationDefaults(
        temperature=_number(config, _GENERATION, "temperature", temperature, at_least=0, at_most=2),
        top_p=_number(config, _GENERATION, "top_p", neutral.top_p, at_least=0, at_most=1),
        top_k=max(0, _whole(config, _GENERATION, "top_k", at_least=-1) or 0),
        min_p=_number(config, _GENERATION, "min_p", neutral.min_p, at_least=0, at_most=1),
        repetition_penalty=_number(
            config, _GENERATION, "repetition_penalty", neutral.repetition_penalty, at_least=0.01, at_most=10
        ),
        max_new_tokens=_whole(config, _GENERATION, "max_new_tokens", at_least=1),
    )


def eos_token_ids(generation_config: Mapping[str, Any], config: Mapping[str, Any]) -> tuple[int, ...]:
    """The tokens that end a text. Raises ValueError, which names the file."""
    token_ids: set[int] = set()
    for file_name, values in ((_GENERATION, generation_config), (_CONFIG, _text_config(config))):
        value = values.get("eos_token_id")
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if not all(isinstance(token_id, int) and not isinstance(token_id, bool) for token_id in ids):
            raise ValueError(f"{file_name}: eos_token_id is {value!r}; it must be a token id or a list of them")
        token_ids.update(ids)
    return tuple(sorted(token_ids))


def vocabulary_size(config: Mapping[str, Any], *, default: int) -> int:
    """The size of the model's vocabulary, which may differ from its tokenizer's."""
    return _whole(_text_config(config), _CONFIG, "vocab_size", at_least=1) or default


def embedding_width(config: Mapping[str, Any]) -> int:
    """The size of the hidden states, under any of the names that model families use; 0 if none of them is present."""
    widths = (_whole(_text_config(config), _CONFIG, name, at_least=1) for name in _WIDTHS)
    return next((width for width in widths if width), 0)


def own_length(entry: ModelEntry, folder: Path, config: Mapping[str, Any], tokenizer_config: Mapping[str, Any]) -> int:
    """The context length of the model. Raises ValueError if its files do not have it."""
    positions = _positions(config)
    bound = _whole(tokenizer_config, _TOKENIZER, "model_max_length", at_least=1)
    bound = None if bound is None or bound >= _NO_LENGTH else bound
    if entry.task != "generation":
        file_name = "sentence_bert_config.json"
        chosen = _whole(read_json_file(folder / file_name), file_name, "max_seq_length", at_least=1)
        lengths = [length for length in (positions, chosen or bound) if length]
        length = min(lengths, default=None)
    else:
        length = positions or bound
    if length is None:
        raise ValueError("max_model_len is missing, and the model's files do not give its context length; add it")
    return min(length, _MAX_LENGTH)


def _positions(config: Mapping[str, Any]) -> int | None:
    config = _text_config(config)
    length = next(filter(None, (_whole(config, _CONFIG, name, at_least=1) for name in _LENGTHS)), None)
    if length is not None and config.get("model_type") in POSITIONS_AFTER_PADDING:
        length -= (_whole(config, _CONFIG, "pad_token_id", at_least=0) or 0) + 1
    return length


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The language model's part of the config, which multimodal models keep separate."""
    text_config = config.get("text_config")
    return config if not isinstance(text_config, dict) else {**config, **text_config}


def _whole(config: Mapping[str, Any], file_name: str, name: str, *, at_least: int) -> int | None:
    value = config.get(name)
    if value is None:
        return None
    is_whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())  # 1e30 counts, too
    if not is_whole or isinstance(value, bool) or value < at_least:
        raise ValueError(f"{file_name}: {name} is {value!r}; it must be a whole number, {at_least} or more")
    return int(value)


def _number(
    config: Mapping[str, Any], file_name: str, name: str, default: float, *, at_least: float, at_most: float
) -> float:
    value = config.get(name)
    if value is None:
        return default
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not at_least <= value <= at_most:
        raise ValueError(f"{file_name}: {name} is {value!r}; it must be a number from {at_least} to {at_most}")
    return float(value)


_ARCHITECTURES_BY_TASK = {
    "generation": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "embedding": "MODEL_MAPPING_NAMES",
    "scoring": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
}

_PICKLES = ("*.bin", "*.pt", "*.pth")


def refuse_unservable(entry: ModelEntry, folder: Path, config: Mapping[str, Any]) -> None:
    """Raises ValueError if `folder` does not have a model that can be served; the message says what to do."""
    is_whole = Path(entry.path).is_dir()  # of a hub model, only the descriptive files are here
    has_weights = any(folder.glob("*.safetensors"))
    if (folder / "adapter_config.json").is_file() and not (config and (has_weights or not is_whole)):
        raise ValueError(
            f"{entry.path} contains a LoRA adapter, which cannot be served by itself; add it to `adapters` of its base "
            "model's entry"
        )
    read_adapters(entry)
    if entry.quantization != "none" and entry.backend not in ("transformers", "fake"):
        raise ValueError(
            f"quantization is {entry.quantization!r}, but backend {entry.backend!r} does not quantise; remove it, "
            "and use a checkpoint that is quantised"
        )
    if entry.python is not None and not os.access(entry.python, os.X_OK):
        raise ValueError(missing_interpreter(entry.python))
    if entry.backend == "llama_cpp":
        gguf_file(folder)
    elif not config and (any(folder.glob("*.gguf")) or "gguf" in entry.path.lower()):
        raise ValueError(f'{entry.path} holds GGUF files; set backend = "llama_cpp", or name a folder with safetensors')
    missing = [name for name in ("tokenizer.json", "config.json") if not (folder / name).is_file()]
    if is_whole and not has_weights and entry.backend in ("transformers", "vllm"):
        missing.append("*.safetensors")
    if missing:
        raise ValueError(f"{entry.path} has no {' and no '.join(missing)}; {_remedy(folder, missing)}")
    if entry.backend == "transformers":
        _refuse_configuration(entry, config)


def gguf_file(folder: Path) -> Path:
    """The weights of a model for llama.cpp; of a file in parts the first one. Raises ValueError unless there is one."""
    files = sorted(folder.glob("*.gguf"))
    whole = [file for file in files if "-of-" not in file.stem or "-00001-of-" in file.stem]
    if len(whole) != 1:
        names = ", ".join(file.name for file in whole) or "none"
        raise ValueError(f"backend llama_cpp needs one GGUF file in {folder}, which has {names}; leave or add one")
    return whole[0]


def _remedy(folder: Path, missing: list[str]) -> str:
    is_tokenizer_slow = any(folder.glob("*.model")) or (folder / "vocab.json").is_file()
    if missing == ["tokenizer.json"] and is_tokenizer_slow:
        return "it has only a slow tokenizer; convert it with AutoTokenizer.from_pretrained(…).save_pretrained(…)"
    if missing == ["tokenizer.json"]:
        return "save the model's fast tokenizer there"
    if missing == ["*.safetensors"] and any(file for pattern in _PICKLES for file in folder.glob(pattern)):
        return "its weights are pickled; convert them with save_pretrained(…), which writes safetensors"
    return "add the missing files, or use the folder that has them"


def _refuse_configuration(entry: ModelEntry, config: Mapping[str, Any]) -> None:
    quantisation = config.get("quantization_config")
    if quantisation:
        method = quantisation.get("quant_method") if isinstance(quantisation, dict) else quantisation
        raise ValueError(
            f"{entry.path} is quantised with {method or 'an unknown method'}, which is not supported; use the model "
            "that it was made from"
        )
    if "auto_map" in config and not entry.trust_remote_code:
        raise ValueError(f"{entry.path} needs its own code; if you trust it, set trust_remote_code = true to run it")
    model_type = config.get("model_type")
    known = _known_architectures(_ARCHITECTURES_BY_TASK[entry.task])
    if "auto_map" in config or (model_type is not None and (model_type in known or not known)):
        return
    if not isinstance(model_type, str):
        raise ValueError("config.json: model_type is missing, so the model's architecture is unknown; add it")
    raise ValueError(
        f"config.json: model_type is {model_type!r}, which the installed transformers does not support for task "
        f"{entry.task!r}; change task, or update transformers"
    )


@lru_cache(maxsize=2)
def _known_architectures(table: str) -> frozenset[str]:
    """The model types in a table of transformers, read as text because the import takes seconds. Empty if it is not
    installed."""
    package = find_spec("transformers")
    if package is None or package.origin is None:
        return frozenset()
    source = Path(package.origin).parent / "models" / "auto" / "modeling_auto.py"
    for node in ast.parse(source.read_text(encoding="utf-8")).body if source.is_file() else []:
        if isinstance(node, ast.Assign) and table in {getattr(target, "id", "") for target in node.targets}:
            texts = [part.elts[0] for part in ast.walk(node.value) if isinstance(part, ast.Tuple) and part.elts]
            return frozenset(str(text.value) for text in texts if isinstance(text, ast.Constant))
    return frozenset()
