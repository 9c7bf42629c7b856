"""Text to token ids and back, without torch or transformers."""

import secrets
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from tokenizers import AddedToken, Tokenizer

from tasks.contents import ContentMarks, Rendered
from tasks.token_table import TokenPiece, token_table_of

#: Across it a tokenizer does not read. Nobody outside of this process can write it.
_SEPARATOR = "\ue000" + secrets.token_hex(16)
_SPECIAL_TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Encoder(Protocol):
    """Text to token ids, and back."""

    vocab_size: int

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...

    def encode_rendered(self, rendered: Rendered) -> list[int]:
        """Without tokens across its cuts. What it begins with was written by a chat template."""
        ...

    def decode(self, token_ids: Sequence[int]) -> str: ...

    def pieces(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> list[TokenPiece]: ...


class TokenizerEncoder:
    """A Rust tokenizer. The batch call is the one that lets go of the GIL, and skips offsets."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.vocab_size: int = tokenizer.get_vocab_size()
        tokenizer.add_tokens([AddedToken(_SEPARATOR, normalized=False)])
        self._separator_id = tokenizer.token_to_id(_SEPARATOR)

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        ids: list[int] = self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
        return ids

    def encode_rendered(self, rendered: Rendered) -> list[int]:
        ids = self.encode(_SEPARATOR.join(rendered.stretches), add_special_tokens=False)
        return [token_id for token_id in ids if token_id != self._separator_id] if rendered.cuts else ids

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

    def encode_rendered(self, rendered: Rendered) -> list[int]:
        return list(rendered.text.encode())

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


def load_tokenizer(folder: Path, config: Mapping[str, Any], special_tokens: Mapping[str, str]) -> Tokenizer:
    """tokenizer.json and the tokens that only tokenizer_config.json knows, as AutoTokenizer has it; add_bos_token is
    ignored there too: what a prompt begins with is said by tokenizer.json. Raises ValueError that names the file."""
    try:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as exc:  # the library raises nothing narrower
        raise ValueError(
            f"tokenizer.json cannot be read: {str(exc)[:200]}; save the model's fast tokenizer anew"
        ) from exc
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = bool(config.get("split_special_tokens", False))
    try:
        _add_missing_tokens(tokenizer, config, special_tokens)
    except (AttributeError, KeyError, TypeError, ValueError) as exc:
        raise ValueError(f"tokenizer_config.json: a token that it adds cannot be read: {exc!r}; mend it") from exc
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


def content_marks(tokenizer: Tokenizer, template_text: str) -> ContentMarks:
    """For the control tokens of a model: its special tokens, and of the others that were added those that its chat
    template writes or that look like <|this|>. Words, tags of HTML and runs of blanks, which some models add to their
    vocabulary, may come from anywhere."""
    tokens = [
        (token_id, token)
        for token_id, token in tokenizer.get_added_tokens_decoder().items()
        if token.content != _SEPARATOR and token.content.strip() and _is_control_token(token, template_text)
    ]
    folded = {token_id for token_id, token in tokens if token.normalized}
    if tokenizer.normalizer is None or not folded:
        return ContentMarks(token.content for _, token in tokens)

    def find_folded(text: str) -> Iterator[tuple[int, int]]:
        encoding = tokenizer.encode(text, add_special_tokens=False)
        for token_id, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            if token_id in folded:
                num_blanks = len(text[start:end]) - len(text[start:end].lstrip())
                yield start + num_blanks, end

    return ContentMarks((token.content for _, token in tokens), find_folded)


def _is_control_token(token: AddedToken, template_text: str) -> bool:
    looks_like_one = token.content.startswith("<|") and token.content.endswith("|>")
    return token.special or looks_like_one or token.content in template_text
