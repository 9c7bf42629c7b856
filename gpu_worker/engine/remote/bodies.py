"""The body of a completion that goes on after the tokens that a sequence has, for each mode of a remote server."""

import hashlib
import struct
from typing import Any

from tokenizers import Tokenizer

from domain.catalog import ModelSpec
from gpu_worker.engine.sequence import Sequence
from text.tokenizers import TokenTable


def seed_at(seed: int, index: int, position: int) -> int:
    """The seed of a request for the tokens of a sequence from `position` on: 31 bits, as some servers take no more.

    It depends on the position, since the same seed would draw the first numbers of the sequence again.
    """
    digest = hashlib.blake2b(struct.pack(">qII", seed, index, position), digest_size=4).digest()
    return int.from_bytes(digest) & 0x7FFFFFFF


def completion_body(sequence: Sequence, spec: ModelSpec, tokenizer: Tokenizer) -> dict[str, Any]:
    """Stop strings are not sent: they are found here, and the request is then closed."""
    assert spec.remote is not None
    job, params = sequence.job, sequence.job.params
    num_output_tokens = sequence.num_output_tokens
    body: dict[str, Any] = {
        "model": spec.remote.model or spec.id,
        "stream": True,
        "max_tokens": min(job.max_tokens - num_output_tokens, job.max_model_len - len(sequence.token_ids)),
        "temperature": params.temperature,
        "top_p": params.top_p,
        "presence_penalty": params.presence_penalty,
        "frequency_penalty": params.frequency_penalty,
        "seed": seed_at(job.seed, sequence.index, num_output_tokens),
    }
    if spec.remote.mode == "text":
        return body | {"prompt": _text_of(sequence, tokenizer)}
    return body | {"prompt": sequence.token_ids, "return_token_ids": True} | _extensions(sequence)


def _extensions(sequence: Sequence) -> dict[str, Any]:
    """vLLM's and our own. Neutral values are sent, too, where a server would otherwise take the model's defaults."""
    params = sequence.job.params
    fields: dict[str, Any] = {
        "top_k": params.top_k or -1,
        "min_p": params.min_p,
        "repetition_penalty": params.repetition_penalty,
        "ignore_eos": params.ignore_eos,
        "min_tokens": max(0, params.min_tokens - sequence.num_output_tokens),
    }
    if params.stop_token_ids:
        fields["stop_token_ids"] = list(params.stop_token_ids)
    if params.allowed_token_ids:
        fields["allowed_token_ids"] = list(params.allowed_token_ids)
    if params.logit_bias:
        fields["logit_bias"] = {str(token_id): bias for token_id, bias in params.logit_bias.items()}
    if params.logprobs is not None or params.best_of is not None:
        fields |= {"logprobs": max(1, params.logprobs or 0), "return_tokens_as_token_ids": True}
    return fields


def _text_of(sequence: Sequence, tokenizer: Tokenizer) -> str:
    """Without the special tokens at its start that the server's tokenizer will add as well."""
    added: list[int] = tokenizer.encode("", add_special_tokens=True).ids
    token_ids = sequence.token_ids
    start = len(added) if added and token_ids[: len(added)] == added else 0
    text: str = tokenizer.decode(token_ids[start:], skip_special_tokens=False)
    return text


REPLACEMENT = "\ufffd"


class TextTokens:
    """Text as token ids that stand for exactly its bytes, piece by piece. The server's own tokens may differ. A
    character for which the tokenizer has no tokens, so that its model cannot write it, becomes U+FFFD."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Raises ValueError unless the tokenizer writes the bytes of its tokens as they are."""
        self._tokenizer = tokenizer
        self._tokens = TokenTable(tokenizer)
        shown = filter(self._tokens.shows, range(tokenizer.get_vocab_size()))
        found = [(self._tokens.bytes_of(token_id), token_id) for token_id in shown]
        self._id_by_byte = {text[0]: token_id for text, token_id in found if len(text) == 1}
        if not self._tokens.is_byte_level or not self._id_by_byte.keys() >= set(REPLACEMENT.encode()):
            raise ValueError(
                'mode = "text" needs a byte-level tokenizer, as those of GPT-2, Llama 3, Qwen or SmolLM; name a folder '
                "with such a one in path"
            )

    def encode(self, text: str) -> list[int]:
        token_ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        is_exact = all(map(self._tokens.shows, token_ids))
        if is_exact and b"".join(map(self._tokens.bytes_of, token_ids)) == text.encode():
            return token_ids
        return [token_id for character in text for token_id in self._ids_of(character)]

    def _ids_of(self, character: str) -> list[int]:
        utf8 = character.encode()
        known = utf8 if self._id_by_byte.keys() >= set(utf8) else REPLACEMENT.encode()
        return [self._id_by_byte[byte] for byte in known]
