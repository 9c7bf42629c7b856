"""What the files of a model say: each value is checked where it is read, and named with its file where it is bad."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from domain.catalog import ModelEntry
from tasks.model_files import read_json_file

#: Families whose positions begin behind the id of the padding token.
POSITIONS_BEHIND_PADDING = frozenset({"camembert", "mpnet", "roberta", "xlm-roberta"})

_CONFIG, _GENERATION, _TOKENIZER = "config.json", "generation_config.json", "tokenizer_config.json"
_LENGTHS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "seq_length", "n_ctx")
_WIDTHS = ("hidden_size", "n_embd", "d_model", "dim")
_NO_LENGTH = 10**9  # transformers writes 10^30 where a tokenizer has no bound
_MAX_LENGTH = 10_000_000


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """What applies where a request says nothing: the model's generation_config.json, else the neutral values."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_new_tokens: int | None = None


def generation_defaults(config: Mapping[str, Any]) -> GenerationDefaults:
    """`do_sample: false` only counts where it is written down: it is also the value of an absent one. A top_k of -1,
    as some write it, is off like 0. Raises ValueError that names the field."""
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
    """Raises ValueError that names the file."""
    token_ids: set[int] = set()
    for file_name, values in ((_GENERATION, generation_config), (_CONFIG, _text_config(config))):
        value = values.get("eos_token_id")
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if not all(isinstance(token_id, int) and not isinstance(token_id, bool) for token_id in ids):
            raise ValueError(f"{file_name}: eos_token_id is {value!r}; it must be a token id or a list of them")
        token_ids.update(ids)
    return tuple(sorted(token_ids))


def vocabulary_size(config: Mapping[str, Any], *, default: int) -> int:
    """Of the model, which may know more tokens than its tokenizer, or fewer."""
    return _whole(_text_config(config), _CONFIG, "vocab_size", at_least=1) or default


def embedding_width(config: Mapping[str, Any]) -> int:
    """Of the hidden states, by the names that families have for it; 0 where none of them is there."""
    widths = (_whole(_text_config(config), _CONFIG, name, at_least=1) for name in _WIDTHS)
    return next((width for width in widths if width), 0)


def own_length(entry: ModelEntry, folder: Path, config: Mapping[str, Any], tokenizer_config: Mapping[str, Any]) -> int:
    """How many tokens the model was made for. Raises ValueError where its files do not say."""
    positions = _positions(config)
    bound = _whole(tokenizer_config, _TOKENIZER, "model_max_length", at_least=1)
    bound = None if bound is None or bound >= _NO_LENGTH else bound
    if entry.task == "embedding":
        file_name = "sentence_bert_config.json"
        chosen = _whole(read_json_file(folder / file_name), file_name, "max_seq_length", at_least=1)
        lengths = [length for length in (positions, chosen or bound) if length]
        length = min(lengths, default=None)
    else:
        length = positions or bound
    if length is None:
        raise ValueError("max_model_len is missing, and the model's files do not say how many tokens it holds; add it")
    return min(length, _MAX_LENGTH)


def _positions(config: Mapping[str, Any]) -> int | None:
    config = _text_config(config)
    length = next(filter(None, (_whole(config, _CONFIG, name, at_least=1) for name in _LENGTHS)), None)
    if length is not None and config.get("model_type") in POSITIONS_BEHIND_PADDING:
        length -= (_whole(config, _CONFIG, "pad_token_id", at_least=0) or 0) + 1
    return length


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """A model that sees pictures, too, describes its language model apart."""
    text_config = config.get("text_config")
    return config if not isinstance(text_config, dict) else {**config, **text_config}


def _whole(config: Mapping[str, Any], file_name: str, name: str, *, at_least: int) -> int | None:
    value = config.get(name)
    if value is None:
        return None
    is_whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())  # 1e30 is one, too
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
