"""What each token of a model is worth: whether it shows in a text, and with which bytes. Without torch or transformers.

Two ways of writing bytes as tokens are in use, and a decoder says which (https://huggingface.co/docs/tokenizers,
"Decoders"): ByteLevel spells each byte as one printable character (GPT-2's alphabet); ByteFallback has a token `<0xNN>`
for each byte that no other token covers (SentencePiece). The tokens of all other decoders are pieces of text.
"""

import json
import re
from collections.abc import Iterator, Sequence
from enum import Enum, auto
from functools import lru_cache
from typing import Any, NamedTuple

from tokenizers import Tokenizer

BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")


class TokenKind(Enum):
    HIDDEN = auto()  # special, or unknown to the tokenizer: `decode` leaves it out
    BYTE = auto()  # `<0xNN>`: what its run of bytes means is known at the run's end only
    TEXT = auto()


class TokenPiece(NamedTuple):
    """A token of a text. Either may be a part of a character."""

    name: bytes
    added: bytes  # to the UTF-8 of the text; nothing where the token is left out of it


def _byte_by_character() -> dict[str, int]:
    """GPT-2's alphabet: printable bytes stand for themselves, the others for the characters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + number): byte for number, byte in enumerate(others)}


_BYTE_BY_CHARACTER = _byte_by_character()


class TokenTable:
    """Remembers what it was asked for, so that each token is looked at once."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder().values()
        self._special = frozenset(token.content for token in added if token.special)
        self._decoders = frozenset(_decoder_types(tokenizer))
        self._kinds: dict[int, TokenKind] = {}
        self._bytes: dict[int, bytes] = {}
        self._word: int | None = None  # an ordinary one; found when it is first needed

    def kind(self, token_id: int) -> TokenKind:
        kind = self._kinds.get(token_id)
        if kind is None:
            kind = self._kinds[token_id] = self._find_kind(token_id)
        return kind

    def shows(self, token_id: int) -> bool:
        """Whether `decode` without special tokens writes anything for it."""
        return self.kind(token_id) is not TokenKind.HIDDEN

    def bytes_of(self, token_id: int) -> bytes:
        """What the token adds to a text that something stands in already; of a special token the way it is written, of
        an id that the tokenizer does not know nothing."""
        found = self._bytes.get(token_id)
        if found is None:
            found = self._bytes[token_id] = self._find_bytes(token_id)
        return found

    def first_bytes_of(self, token_id: int) -> bytes:
        """The same at the start of a text, where many decoders leave a leading space out."""
        found = self.bytes_of(token_id)
        is_half_a_character = self.kind(token_id) is TokenKind.BYTE and not found.isascii()
        if is_half_a_character or not self.shows(token_id) or "ByteLevel" in self._decoders:
            return found
        return self._decode(token_id).encode()

    def pieces(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> list[TokenPiece]:
        """The tokens of a text, which is what `decode` makes of them all."""
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
            except KeyError:  # an added token, which is written as it is
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
    """A token as the OpenAI API writes it: bytes that are no character by themselves as `\\xNN`."""
    return token.decode(errors="backslashreplace")


@lru_cache(maxsize=4)
def token_table_of(tokenizer: Tokenizer) -> TokenTable:
    """The one of this tokenizer object, which must not change any more."""
    return TokenTable(tokenizer)


def _decoder_types(tokenizer: Tokenizer) -> Iterator[str]:
    if tokenizer.decoder is None:
        return
    waiting: list[dict[str, Any]] = [json.loads(tokenizer.decoder.__getstate__())]
    while waiting:
        decoder = waiting.pop()
        yield decoder["type"]
        waiting += decoder.get("decoders", [])
