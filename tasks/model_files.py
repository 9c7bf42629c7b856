"""The files of a model: where they lie, and the revision that they make."""

import hashlib
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from domain.catalog import ModelEntry

#: How an embedding model makes one vector of many, in the manner of sentence-transformers.
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
#: They are read, too, but do not change what a model says.
_OTHER_FILES = ("adapter_config.json", "sentence_bert_config.json")
_WEIGHT_SUFFIXES = frozenset({".safetensors", ".gguf"})
_NUM_WEIGHT_SAMPLES = 64
_WEIGHT_SAMPLE_BYTES = 65_536


def model_folder(entry: ModelEntry) -> Path:
    """Where the files that describe the model lie; for a hub id they are downloaded first, weights never. Raises
    ValueError that says what `path` is, or why it cannot be had."""
    path = Path(entry.path)
    if path.is_dir():
        return path
    if path.is_file():
        kind = "a GGUF file, which is not served" if path.suffix == ".gguf" else "a file"
        raise ValueError(f"path {entry.path!r} is {kind}; name the folder of a model with safetensors")
    if path.is_absolute() or entry.path[0] in ".~" or entry.path.count("/") > 1:
        raise ValueError(f"path {entry.path!r} is no folder on this machine; mend it, or name a model of the hub")
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
        raise ValueError(f"the hub has no revision {entry.revision!r} of {entry.path}; mend revision") from exc
    except RepositoryNotFoundError as exc:
        raise ValueError(
            f"{entry.path!r} is no folder here and no model of the hub; mend path, or set HF_TOKEN"
        ) from exc
    except HFValidationError as exc:
        raise ValueError(f"path {entry.path!r} is no folder here and cannot be a model of the hub; mend it") from exc
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as exc:
        raise ValueError(
            f"{entry.path!r} is no folder here and could not be fetched from the hub; check path, revision and the "
            "network"
        ) from exc


def model_revision(spec: ModelEntry) -> str:
    """What a job is pinned to once it has output: equal on every machine that serves the same files.

    A local folder is hashed: its descriptions whole, its weights by size and evenly spread samples, so that retrained
    weights differ and a large model costs milliseconds. A hub model is the commit that its revision names.
    """
    if spec.backend == "fake" and not Path(spec.path).is_dir():
        return f"fake:{spec.revision}"
    if Path(spec.path).is_dir():
        return _hash_folder(spec.path)
    return model_folder(spec).name


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
    """Empty where there is no such file. Raises ValueError that names it."""
    if not file.is_file():
        return {}
    try:
        content = json.loads(read_text_file(file))
    except ValueError as exc:
        raise ValueError(f"{file.name} holds no JSON: {exc}; mend it") from exc
    if not isinstance(content, dict):
        raise ValueError(f"{file.name} holds {type(content).__name__}, not a JSON object; mend it")
    return content


def read_text_file(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as exc:
        raise ValueError(f"{file.name} is not UTF-8: {exc}; mend it") from exc
