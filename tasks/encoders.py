"""Text to token ids and back, without torch or transformers."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from tokenizers import AddedToken, Tokenizer

from domain.catalog import ModelSpec
from tasks.token_table import TokenPiece, token_table_of

_SPECIAL_TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Encoder(Protocol):
    """Text to token ids, and back."""

    vocab_size: int

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...

    def decode(self, token_ids: Sequence[int]) -> str: ...

    def pieces(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> list[TokenPiece]: ...


class TokenizerEncoder:
    """A Rust tokenizer. The batch call is the one that lets go of the GIL, and skips offsets."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.vocab_size: int = tokenizer.get_vocab_size()

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        ids: list[int] = self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
        return ids

    def decode(self, token_ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(list(token_ids), skip_special_tokens=False)
        return text

    def pieces(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> list[TokenPiece]:
        return token_table_of(self._tokenizer).pieces(token_ids, skip_special_tokens=skip_special_tokens)


class ByteEncoder:
    """One token per byte of UTF-8, for the fake back end, which has no vocabulary of its own for prompts."""

    vocab_size = 257  # that of the fake back end: the bytes and its end token

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return list(text.encode())

    def decode(self, token_ids: Sequence[int]) -> str:
        return bytes(id_ for id_ in token_ids if id_ < 256).decode(errors="replace")

    def pieces(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> list[TokenPiece]:
        texts = [bytes([token_id]) if token_id < 256 else b"" for token_id in token_ids]
        return [TokenPiece(text, text) for text in texts]


def special_tokens_of(config: Mapping[str, Any]) -> dict[str, str]:
    """By name, as templates see them. A token is a string, or an object with its content and flags."""
    values = {name: config.get(name) for name in _SPECIAL_TOKEN_NAMES}
    texts = {name: value.get("content") if isinstance(value, dict) else value for name, value in values.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def load_tokenizer(
    spec: ModelSpec, folder: Path, config: Mapping[str, Any], special_tokens: Mapping[str, str]
) -> Tokenizer:
    """tokenizer.json and the tokens that only tokenizer_config.json knows, as AutoTokenizer has it; add_bos_token is
    ignored there too: what a prompt begins with is said by tokenizer.json."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise ValueError(f"model {spec.id}: {folder} has no tokenizer.json; save the model's fast tokenizer there")
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = bool(config.get("split_special_tokens", False))
    _add_missing_tokens(tokenizer, config, special_tokens)
    return tokenizer


def _add_missing_tokens(tokenizer: Tokenizer, config: Mapping[str, Any], special_tokens: Mapping[str, str]) -> None:
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    listed = sorted(config.get("added_tokens_decoder", {}).items(), key=lambda item: int(item[0]))
    missing = [AddedToken(**token) for _, token in listed if token["content"] not in known]
    known |= {token.content for token in missing}
    named = dict.fromkeys([*special_tokens.values(), *_extra_special_tokens(config)])
    missing += [AddedToken(text, special=True, normalized=False) for text in named if text not in known]
    tokenizer.add_tokens(missing)


def _extra_special_tokens(config: Mapping[str, Any]) -> list[str]:
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    values = list(extra.values()) if isinstance(extra, dict) else list(extra)
    return [value["content"] if isinstance(value, dict) else value for value in values]
