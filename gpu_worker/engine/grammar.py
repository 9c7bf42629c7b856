"""Which tokens a structured output allows next: a matcher per sequence. Free of torch.

A sequence's matcher moves with its tokens, drawn or replayed, and nothing else moves it: a step that is run again, in
whole or in halves, asks it the same question and gets the same answer.
"""

import logging
from collections import OrderedDict
from collections.abc import Iterable
from collections.abc import Sequence as Rows
from dataclasses import dataclass

import numpy as np
from llguidance import LLExecutor, LLMatcher, LLTokenizer
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask_par
from numpy.typing import NDArray
from tokenizers import Tokenizer

from domain.errors import InvalidRequest, UnsupportedParameter
from domain.structured_output import StructuredOutput
from tasks.grammars import error_of, make_grammar_tokenizer, make_matcher

log = logging.getLogger(__name__)

MAX_COMPILED = 64  # grammars kept for jobs to come
BITS = 32  # of a mask's words


@dataclass(frozen=True, slots=True)
class Grammar:
    """How far one sequence has come in its grammar."""

    matcher: LLMatcher
    grammars: "Grammars"

    def advance(self, token_id: int) -> bool:
        """Take the token; True if nothing may follow it. A token that is not allowed is an error of the next mask."""
        self.matcher.consume_token(token_id)
        return bool(self.matcher.is_stopped() and not self.matcher.is_error())


class Grammars:
    """The model's vocabulary as grammars see it, those that were compiled of late, and room for the masks of a step."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Iterable[int]) -> None:
        self._tokenizer = _make_tokenizer(tokenizer, vocab_size, eos_token_ids)
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()
        self._executor: LLExecutor | None = None
        self._words = allocate_token_bitmask(0, vocab_size)
        self._known = words_of(range(vocab_size), vocab_size)  # a tokenizer may have tokens that its model has not

    def start(self, output: StructuredOutput) -> Grammar:
        """The beginning of the grammar. Raises UnsupportedParameter or InvalidRequest; takes up to half a second for a
        grammar that was not seen of late."""
        if self._tokenizer is None:
            raise UnsupportedParameter("the model cannot follow a structured output", param="params.structured_output")
        key = output.model_dump_json()
        if key not in self._compiled:
            self._compiled[key] = _compile(self._tokenizer, output)
        self._compiled.move_to_end(key)
        if len(self._compiled) > MAX_COMPILED:
            self._compiled.popitem(last=False)
        return Grammar(self._compiled[key].deep_copy(), self)

    def fill(self, matchers: Rows[LLMatcher]) -> NDArray[np.int32]:
        """A mask for each, (num_matchers, words), overwritten by the next call."""
        assert self._tokenizer is not None
        if self._executor is None:
            self._executor = LLExecutor()
        if len(self._words) < len(matchers):
            self._words = allocate_token_bitmask(len(matchers), self._tokenizer.vocab_size)
        words: NDArray[np.int32] = self._words[: len(matchers)]
        fill_next_token_bitmask_par(self._executor, list(zip(matchers, range(len(matchers)), strict=True)), words)
        words[:, : len(self._known)] &= self._known
        words[:, len(self._known) :] = 0
        return words


def words_of(token_ids: Iterable[int], num_bits: int) -> NDArray[np.int32]:
    """A bit for each of the tokens, in words as the masks have them."""
    bits = np.zeros(-(-num_bits // BITS) * BITS, dtype=np.uint8)
    bits[list(token_ids)] = 1
    return np.packbits(bits, bitorder="little").view(np.int32)


def _compile(tokenizer: LLTokenizer, output: StructuredOutput) -> LLMatcher:
    matcher = make_matcher(tokenizer, output)
    if matcher.is_error():
        raise InvalidRequest(f"it cannot be followed: {error_of(matcher)}", param="params.structured_output")
    return matcher


def _make_tokenizer(tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Iterable[int]) -> LLTokenizer | None:
    try:
        return make_grammar_tokenizer(tokenizer.to_str(), vocab_size, eos_token_ids)
    except ValueError as exc:
        log.warning("structured output is not available", extra={"reason": str(exc)})
        return None
