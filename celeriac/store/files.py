"""Chooses the files of a source that make up a model, and refuses unsafe or broken ones."""

import json
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

from text.model_files import read_json_file

#: The files that a model may have besides its weights, as path patterns.
DESCRIPTIONS = (
    "*.json",
    "*.jinja",
    "*.txt",
    "tokenizer.model",
    "1_Pooling/config.json",
    "additional_chat_templates/*.jinja",
    "LICENSE*",
    "NOTICE*",
    "README.md",
)
MAX_DESCRIPTION_BYTES = 256 * 1024**2  # far more than any tokenizer needs
PICKLES = (".bin", ".ckpt", ".h5", ".msgpack", ".pickle", ".pkl", ".pt", ".pth")
NUM_SHOWN = 8  # file names per message
MAX_HEADER_BYTES = 100_000_000  # the safetensors library's own limit


class ModelRefused(ValueError):
    """The source, or its content, cannot be stored as a model; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file of a source. `path` is relative to the model's folder; `sha256` is the published hash, if any."""

    path: str
    size: int
    sha256: str | None = None

    @property
    def is_weights(self) -> bool:
        return self.path.endswith((".safetensors", ".gguf"))


def under(prefix: str, files: Iterable[RemoteFile]) -> list[RemoteFile]:
    """The files at or below `prefix`, with paths relative to it."""
    chosen = []
    for file in files:
        if file.path == prefix:
            return [RemoteFile(PurePosixPath(prefix).name, file.size, file.sha256)]
        if not prefix or file.path.startswith(f"{prefix}/"):
            chosen.append(RemoteFile(file.path[len(prefix) :].lstrip("/"), file.size, file.sha256))
    return chosen


def choose(files: Sequence[RemoteFile], source: str) -> list[RemoteFile]:
    """The files to store: safetensors with configuration and tokenizer, or one GGUF file. Weights come last. Raises
    ModelRefused."""
    for file in files:
        refuse_unsafe_path(file.path)
    ggufs = [file for file in files if "/" not in file.path and file.path.endswith(".gguf")]
    weights = _safetensors(files)
    if not weights and len(ggufs) == 1:
        return ggufs
    if not weights:
        raise ModelRefused(_why_no_weights(files, ggufs, source))
    described = [file for file in files if not file.is_weights and _is_description(file.path)]
    for file in described:
        if file.size > MAX_DESCRIPTION_BYTES:
            raise ModelRefused(f"{file.path} of {source} has {file.size:,} bytes, too many for a file without weights")
    return [*sorted(described, key=lambda file: file.size), *weights]


def _is_description(path: str) -> bool:
    return any(fnmatch(path, pattern) and path.count("/") == pattern.count("/") for pattern in DESCRIPTIONS)


def _safetensors(files: Iterable[RemoteFile]) -> list[RemoteFile]:
    """Many repositories hold their weights twice, under transformers' names and their own. The former are preferred."""
    all_of_them = [file for file in files if "/" not in file.path and file.path.endswith(".safetensors")]
    usual = [file for file in all_of_them if file.path == "model.safetensors" or fnmatch(file.path, "model-*-of-*")]
    return usual or all_of_them


def _why_no_weights(files: Iterable[RemoteFile], ggufs: Sequence[RemoteFile], source: str) -> str:
    names = [file.path for file in files]
    if ggufs:
        shown = ", ".join(file.path for file in ggufs[:NUM_SHOWN])
        return f"{source} holds {len(ggufs)} GGUF files; choose one as {source}/FILE, FILE being one of {shown}"
    if any(name.endswith(PICKLES) for name in names):
        return (
            f"{source} has its weights only as pickles, which can run code when they are loaded; "
            "convert them with save_pretrained(…), which writes safetensors, and pull that folder"
        )
    if not names:
        return f"{source} holds no files; check the source"
    return f"{source} holds neither safetensors nor GGUF, but {', '.join(sorted(names)[:NUM_SHOWN])}; check the source"


def refuse_unsafe_path(path: str) -> None:
    """Refuse a path that leads out of the model's folder on any system."""
    parts = path.split("/")
    if not path or "\\" in path or ":" in path or not path.isprintable() or {"", ".", ".."} & set(parts):
        raise ModelRefused(
            f"a file is called {path[:200]!r}, which leads out of the model's folder; do not trust its source"
        )


def refuse_description(folder: Path, source: str) -> None:
    """Refuse a model for what its configuration files say, before the weights are fetched."""
    for name in ("config.json", "tokenizer_config.json"):
        if "auto_map" in read_json_file(folder / name):
            raise ModelRefused(
                f"{source} ships its own code ({name} has an auto_map), which would run here; pull a model that "
                "transformers supports, or name the folder in models.toml with trust_remote_code = true"
            )
    quantisation = read_json_file(folder / "config.json").get("quantization_config")
    if quantisation:
        method = quantisation.get("quant_method") if isinstance(quantisation, dict) else quantisation
        raise ModelRefused(
            f"{source} is quantised by {method}, which is not supported; pull the model it was made from"
        )


def refuse_broken_weights(file: Path) -> None:
    """Raises ModelRefused for a file that is incomplete, or not of the format that its name claims."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        if file.suffix == ".gguf":
            if stream.read(4) != b"GGUF":
                raise ModelRefused(f"{file.name} does not begin like a GGUF file; its source is broken")
            return
        head = stream.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
        if length > min(size, MAX_HEADER_BYTES):
            raise ModelRefused(f"{file.name} does not begin like a safetensors file; its source is broken")
        try:
            tensors = json.loads(stream.read(length))
            ends = [tensor["data_offsets"][1] for name, tensor in tensors.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as exc:
            raise ModelRefused(f"{file.name} has an invalid header; its source is broken") from exc
    if 8 + length + max(ends, default=0) != size:
        raise ModelRefused(f"{file.name} has {size:,} bytes, which does not match its header; fetch it again")
