"""The files of a model: where they lie, and the revision that they make."""

import hashlib
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from domain.catalog import ModelSpec

#: How an embedding model makes one vector of many, in the manner of sentence-transformers.
POOLING_FILES = ("modules.json", "1_Pooling/config.json")
_DESCRIPTION_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    *POOLING_FILES,
)
_WEIGHT_SUFFIXES = frozenset({".safetensors", ".gguf"})
_NUM_WEIGHT_SAMPLES = 64
_WEIGHT_SAMPLE_BYTES = 65_536


def model_folder(spec: ModelSpec) -> Path:
    """Where the files that describe the model lie; for a hub id they are downloaded first, weights never."""
    folder = Path(spec.path)
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(spec.path, revision=spec.revision, allow_patterns=list(_DESCRIPTION_FILES)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as exc:
        raise ValueError(
            f"model {spec.id}: {spec.path!r} is no local folder and could not be fetched from the hub; "
            "check path, revision and the network"
        ) from exc


def model_revision(spec: ModelSpec) -> str:
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
    if not file.is_file():
        return {}
    content = json.loads(file.read_text())
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds no JSON object")
    return content
