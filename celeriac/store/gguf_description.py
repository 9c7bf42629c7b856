"""Writes what a GGUF file says of its model as the files that the API reads: configuration, tokenizer, chat templates.

They are the same on every machine, with and without transformers, since a job may be continued by any of them.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from celeriac.store.gguf_header import read_header
from celeriac.store.gguf_tokenizer import PREFIX, build_tokenizer, special_token
from text.model_files import ADDITIONAL_TEMPLATES

#: Architectures that transformers calls otherwise.
MODEL_TYPES = {
    "command-r": "cohere",
    "gemma3": "gemma3_text",
    "gemma4": "gemma4_text",
    "gpt-oss": "gpt_oss",
    "qwen2moe": "qwen2_moe",
    "qwen3moe": "qwen3_moe",
}
KEYS = {
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
}
ROLES = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad", "mask": "mask"}
TEMPLATE, TEMPLATE_NAME = "tokenizer.chat_template", re.compile(r"[\w-]{1,64}")


def write_description(file: Path, folder: Path) -> None:
    """Raises UnknownVocabulary before anything is written, or ValueError for a faulty file."""
    header = read_header(file)
    tokenizer = build_tokenizer(header)
    tokenizer.save(str(folder / "tokenizer.json"))
    ends = _end_token_ids(header)
    config = _config(header) | ({"eos_token_id": ends} if ends else {})
    _write(folder / "config.json", config)
    _write(folder / "generation_config.json", {key: config[key] for key in config if key.endswith("_token_id")})
    tokens = {f"{ours}_token": special_token(header, theirs) for theirs, ours in ROLES.items()}
    named = {role: token for role, token in tokens.items() if token is not None}
    _write(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"} | named)
    _write_templates(header, folder)


def write_tokenizer(file: Path, folder: Path) -> None:
    """Only that. Raises as `write_description` does."""
    build_tokenizer(read_header(file)).save(str(folder / "tokenizer.json"))


def _config(header: Mapping[str, Any]) -> dict[str, Any]:
    """The model's shape. What differs from layer to layer is left out."""
    architecture = header.get("general.architecture")
    if not isinstance(architecture, str):
        raise ValueError("the file does not name its architecture")
    found: dict[str, Any] = {
        name: header[f"{architecture}.{key}"]
        for key, name in KEYS.items()
        if isinstance(header.get(f"{architecture}.{key}"), int)
    }
    found["model_type"] = MODEL_TYPES.get(architecture, architecture)
    found["vocab_size"] = len(header[PREFIX + "tokens"])
    for theirs, ours in ROLES.items():
        if isinstance(token_id := header.get(f"{PREFIX}{theirs}_token_id"), int):
            found[f"{ours}_token_id"] = token_id
    return found


def _end_token_ids(header: Mapping[str, Any]) -> list[int]:
    """Those of a text, of a turn and of a message."""
    values = [header.get(f"{PREFIX}{name}_token_id") for name in ("eos", "eot", "eom")]
    return list(dict.fromkeys(value for value in values if isinstance(value, int)))


def _write_templates(header: Mapping[str, Any], folder: Path) -> None:
    if isinstance(template := header.get(TEMPLATE), str):
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    for key, template in header.items():
        name = key.removeprefix(f"{TEMPLATE}.")
        if name != key and TEMPLATE_NAME.fullmatch(name) and isinstance(template, str):
            (folder / ADDITIONAL_TEMPLATES).mkdir(exist_ok=True)
            (folder / ADDITIONAL_TEMPLATES / f"{name}.jinja").write_text(template, encoding="utf-8")


def _write(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
