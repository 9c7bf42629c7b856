"""Text to token ids and back, without torch or transformers.

Tokens encode bytes in one of two ways, by the decoder (https://huggingface.co/docs/tokenizers, "Decoders"):
ByteLevel writes each byte as one printable character (GPT-2's alphabet); ByteFallback has a token `<0xNN>` for each
byte that no other token covers (SentencePiece). With all other decoders, tokens are pieces of text.
"""

import json
import os
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum, auto
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from tokenizers import AddedToken, Tokenizer

from text.content_marks import ContentMarks, Rendered

# We pass one text at a time. The tokenizer would hand it over to a thread of its own, and the event loop would stand
# still until that thread has got a core and has finished.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")


class TokenKind(Enum):
    HIDDEN = auto()  # special, or unknown to the tokenizer; `decode` leaves it out
    BYTE = auto()  # `<0xNN>`; its text is known only at the end of a run of such tokens
    TEXT = auto()


class TokenPiece(NamedTuple):
    """A token of a text: its name and the bytes it adds. Either may be only part of a character."""

    name: bytes
    added: bytes  # to the UTF-8 of the text; empty if the token is left out of it


def _byte_by_character() -> dict[str, int]:
    """GPT-2's alphabet: printable bytes are written as themselves, the others as the characters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + number): byte for number, byte in enumerate(others)}


_BYTE_BY_CHARACTER = _byte_by_character()


class TokenTable:
    """The bytes of each token, and whether the token appears in a text. Each token is looked up only once."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder().values()
        self._special = frozenset(token.content for token in added if token.special)
        self._decoders = frozenset(_decoder_types(tokenizer))
        self._kinds: dict[int, TokenKind] = {}
        self._bytes: dict[int, bytes] = {}
        self._word: int | None = None  # an ordinary token, found on first use

    @property
    def is_byte_level(self) -> bool:
        """Whether the bytes of a text are those of its tokens, whatever stands before."""
        return self._decoders == {"ByteLevel"}

    def kind(self, token_id: int) -> TokenKind:
        kind = self._kinds.get(token_id)
        if kind is None:
            kind = self._kinds[token_id] = self._find_kind(token_id)
        return kind

    def shows(self, token_id: int) -> bool:
        """Whether the token appears in the text if `decode` skips special tokens."""
        return self.kind(token_id) is not TokenKind.HIDDEN

    def bytes_of(self, token_id: int) -> bytes:
        """The bytes that the token adds within a text; of a special token, its name; of an unknown id, none."""
        found = self._bytes.get(token_id)
        if found is None:
            found = self._bytes[token_id] = self._find_bytes(token_id)
        return found

    def first_bytes_of(self, token_id: int) -> bytes:
        """Like `bytes_of`, at the start of a text, where many decoders drop a leading space."""
        found = self.bytes_of(token_id)
        is_half_a_character = self.kind(token_id) is TokenKind.BYTE and not found.isascii()
        if is_half_a_character or not self.shows(token_id) or "ByteLevel" in self._decoders:
            return found
        return self._decode(token_id).encode()

    def pieces(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> list[TokenPiece]:
        """The text that `decode` makes of these tokens, token by token."""
        pieces: list[TokenPiece] = []
        is_first = True
        for token_id in token_ids:
            if skip_special_tokens and not self.shows(token_id):
                pieces.append(TokenPiece(self.bytes_of(token_id), b""))
                continue
            added = self.first_bytes_of(token_id) if is_first else self.bytes_of(token_id)
            pieces.append(TokenPiece(added, added))
            is_first = False
        return pieces

    def _find_kind(self, token_id: int) -> TokenKind:
        spelling = self._tokenizer.id_to_token(token_id)
        if spelling is None or spelling in self._special:
            return TokenKind.HIDDEN
        return TokenKind.BYTE if self._byte_of(spelling) is not None else TokenKind.TEXT

    def _find_bytes(self, token_id: int) -> bytes:
        spelling: str = self._tokenizer.id_to_token(token_id) or ""
        byte = self._byte_of(spelling)
        if byte is not None:
            return bytes([byte])
        if self.kind(token_id) is TokenKind.HIDDEN:
            return spelling.encode()
        if "ByteLevel" in self._decoders:
            try:
                return bytes(_BYTE_BY_CHARACTER[character] for character in spelling)
            except KeyError:  # an added token, which stands for itself
                return spelling.encode()
        return self._text_behind_a_word(token_id).encode()

    def _byte_of(self, spelling: str) -> int | None:
        match = BYTE_TOKEN.fullmatch(spelling) if "ByteFallback" in self._decoders else None
        return int(match[1], 16) if match else None

    def _text_behind_a_word(self, token_id: int) -> str:
        if self._word is None:
            ids = range(self._tokenizer.get_vocab_size())
            self._word = next((id_ for id_ in ids if self._decode(id_).isalnum()), None)
        if self._word is None:
            return self._decode(token_id)
        return self._decode(self._word, token_id).removeprefix(self._decode(self._word))

    def _decode(self, *token_ids: int) -> str:
        text: str = self._tokenizer.decode(token_ids, skip_special_tokens=True)
        return text


def as_text(token: bytes) -> str:
    """A token in the notation of the OpenAI API: bytes that are not a character are written as `\\xNN`."""
    return token.decode(errors="backslashreplace")


@lru_cache(maxsize=4)
def token_table_of(tokenizer: Tokenizer) -> TokenTable:
    """The cached table of this tokenizer object, which must not be modified any more."""
    return TokenTable(tokenizer)


def _decoder_types(tokenizer: Tokenizer) -> Iterator[str]:
    if tokenizer.decoder is None:
        return
    waiting: list[dict[str, Any]] = [json.loads(tokenizer.decoder.__getstate__())]
    while waiting:
        decoder = waiting.pop()
        yield decoder["type"]
        waiting += decoder.get("decoders", [])


#: Separates stretches of text, so that no token extends across. Random, so that no client can send it.
_SEPARATOR = "\ue000" + secrets.token_hex(16)

_SPECIAL_TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Encoder(Protocol):
    vocab_size: int

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...

    def encode_pair(self, first: str, second: str) -> list[int]:
        """Encode two texts that a model reads together, with the special tokens around and between them."""
        ...

    def encode_rendered(self, rendered: Rendered) -> list[int]:
        """Encode without tokens across the cuts, and without adding special tokens, which the chat template has
        written."""
        ...

    def decode(self, token_ids: Sequence[int]) -> str: ...

    def pieces(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> list[TokenPiece]: ...


class TokenizerEncoder:
    """An encoder with a Rust tokenizer. Uses the batch call, which releases the GIL and computes no offsets."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.vocab_size: int = tokenizer.get_vocab_size()
        tokenizer.add_tokens([AddedToken(_SEPARATOR, normalized=False)])
        self._separator_id = tokenizer.token_to_id(_SEPARATOR)

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        ids: list[int] = self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
        return ids

    def encode_pair(self, first: str, second: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode_batch_fast([(first, second)], add_special_tokens=True)[0].ids
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
    """One token per byte of UTF-8, for the fake back end, which has no vocabulary for prompts."""

    vocab_size = 257  # as in the fake back end: the bytes and an end token

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return list(text.encode())

    def encode_pair(self, first: str, second: str) -> list[int]:
        return [*first.encode(), self.vocab_size - 1, *second.encode(), self.vocab_size - 1]

    def encode_rendered(self, rendered: Rendered) -> list[int]:
        return list(rendered.text.encode())

    def decode(self, token_ids: Sequence[int]) -> str:
        return bytes(id_ for id_ in token_ids if id_ < 256).decode(errors="replace")

    def pieces(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> list[TokenPiece]:
        texts = [bytes([token_id]) if token_id < 256 else b"" for token_id in token_ids]
        return [TokenPiece(text, text) for text in texts]


def special_tokens_of(config: Mapping[str, Any]) -> dict[str, str]:
    """The special tokens by name, for templates. In the file, each is a string or an object with content and flags."""
    values = {name: config.get(name) for name in _SPECIAL_TOKEN_NAMES}
    texts = {name: value.get("content") if isinstance(value, dict) else value for name, value in values.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def load_tokenizer(folder: Path, config: Mapping[str, Any], special_tokens: Mapping[str, str]) -> Tokenizer:
    """Load what AutoTokenizer would: tokenizer.json, plus tokens that only tokenizer_config.json has. add_bos_token is
    ignored, as tokenizer.json defines how a prompt starts. Raises ValueError, which names the file."""
    try:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as exc:  # the library raises plain Exception
        raise ValueError(
            f"tokenizer.json cannot be read: {str(exc)[:200]}; save the model's fast tokenizer again"
        ) from exc
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = bool(config.get("split_special_tokens", False))
    try:
        _add_missing_tokens(tokenizer, config, special_tokens)
    except (AttributeError, KeyError, TypeError, ValueError) as exc:
        raise ValueError(f"tokenizer_config.json: an added token cannot be read: {exc!r}; correct it") from exc
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
    """Marks for a model's control tokens: its special tokens, and those added tokens that its chat template writes or
    that look like <|this|>. Other added tokens, such as words, HTML tags and runs of spaces, may come from anyone."""
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
