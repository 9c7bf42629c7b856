"""A sequence: one text being decoded, with everything that must survive a preemption. Free of torch.

If it has a grammar, that determines which tokens its structured output allows next. The grammar's matcher advances only
when a token is appended to the sequence, so a step that is run again, in whole or in halves, gets the same masks.
"""

import logging
from collections import Counter, OrderedDict
from collections.abc import Iterable
from collections.abc import Sequence as Rows
from dataclasses import dataclass, field

import numpy as np
from llguidance import LLExecutor, LLMatcher, LLTokenizer
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask_par
from numpy.typing import NDArray
from tokenizers import Tokenizer

from domain.errors import InvalidRequest, UnsupportedParameter
from domain.jobs import FinishReason
from domain.requests import SamplingParams
from domain.structured_output import StructuredOutput
from gpu_worker.engine.bans import NO_BANS, Bans, words_of
from gpu_worker.engine.detokenizer import TextStream
from text.grammars import error_of, make_grammar_tokenizer, make_matcher

log = logging.getLogger(__name__)

MAX_COMPILED = 64  # compiled grammars kept for later jobs


@dataclass(frozen=True, slots=True)
class Grammar:
    """The state of one sequence within its grammar."""

    matcher: LLMatcher
    grammars: "Grammars"

    def advance(self, token_id: int) -> bool:
        """Consume the token; True if the grammar allows nothing after it. After a token that is not allowed, the next
        mask raises GrammarFailed."""
        self.matcher.consume_token(token_id)
        return bool(self.matcher.is_stopped() and not self.matcher.is_error())


class Grammars:
    """The model's vocabulary in the form that llguidance needs, recently compiled grammars, and a buffer for the masks
    of one step."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Iterable[int]) -> None:
        self._tokenizer = _make_tokenizer(tokenizer, vocab_size, eos_token_ids)
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()
        self._executor: LLExecutor | None = None
        self._words = allocate_token_bitmask(0, vocab_size)
        self._known = words_of(range(vocab_size), vocab_size)  # a tokenizer may have more tokens than its model

    def start(self, output: StructuredOutput) -> Grammar:
        """A grammar in its initial state. Takes up to half a second if the grammar has not been used recently. Raises
        UnsupportedParameter or InvalidRequest."""
        if self._tokenizer is None:
            raise UnsupportedParameter(
                "this model does not support structured output", param="params.structured_output"
            )
        key = output.model_dump_json()
        if key not in self._compiled:
            self._compiled[key] = _compile(self._tokenizer, output)
        self._compiled.move_to_end(key)
        if len(self._compiled) > MAX_COMPILED:
            self._compiled.popitem(last=False)
        return Grammar(self._compiled[key].deep_copy(), self)

    def fill(self, matchers: Rows[LLMatcher]) -> NDArray[np.int32]:
        """Bit masks of the allowed tokens, (num_matchers, num_words). Overwritten by the next call."""
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


def _compile(tokenizer: LLTokenizer, output: StructuredOutput) -> LLMatcher:
    matcher = make_matcher(tokenizer, output)
    if matcher.is_error():
        raise InvalidRequest(
            f"the structured output cannot be used: {error_of(matcher)}", param="params.structured_output"
        )
    return matcher


def _make_tokenizer(tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Iterable[int]) -> LLTokenizer | None:
    try:
        return make_grammar_tokenizer(tokenizer.to_str(), vocab_size, eos_token_ids)
    except ValueError as exc:
        log.warning("structured output is not available", extra={"reason": str(exc)})
        return None


@dataclass(slots=True, eq=False)
class EngineJob:
    """What the sequences of one AddJob share."""

    id: str
    attempt: int
    params: SamplingParams
    max_tokens: int
    seed: int
    priority: int
    cache_salt: str
    adapter: str | None  # the name of a LoRA adapter
    arrival: int  # the job's number in this engine; among jobs of equal priority, the lower one runs first
    max_model_len: int
    end_token_ids: frozenset[int]  # end-of-sequence tokens (unless ignored) and the job's stop tokens
    penalised_prompt_ids: frozenset[int]  # the prompt's tokens if there is a repetition penalty, else empty
    bans: Bans = NO_BANS
    is_scored: bool = False  # the prompt's logprobs have been reported, or were not requested
    sequences: "list[Sequence]" = field(default_factory=list)


@dataclass(slots=True, eq=False)
class Sequence:
    """`token_ids` is the prompt followed by the output. Keys and values exist for its first `num_computed_tokens`."""

    job: EngineJob
    index: int
    token_ids: list[int]
    num_prompt_tokens: int
    stream: TextStream
    grammar: Grammar | None = None  # if the job asks for structured output
    num_computed_tokens: int = 0
    num_cached_tokens: int | None = None  # tokens found in the prefix cache at the first admission
    block_ids: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)  # chained hashes of its first full blocks; grows as needed
    num_published_blocks: int = 0  # how many of those blocks are in the prefix cache
    output_counts: Counter[int] = field(default_factory=Counter)  # occurrences of each output token, for penalties
    finish_reason: FinishReason | None = None
    unsent_text: str = ""
    num_reasoning_tokens: int | None = None  # output tokens up to the one that completes the first </think>
    prompt_logprobs: list[dict[str, object] | None] = field(default_factory=lambda: [None])  # for the computed tokens

    @property
    def rank(self) -> tuple[int, int, int]:
        """Sequences run in this order; the last one is preempted first."""
        return (-self.job.priority, self.job.arrival, self.index)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_uncomputed_tokens(self) -> int:
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def is_finished(self) -> bool:
        return self.finish_reason is not None

    @property
    def is_scoring(self) -> bool:
        """Whether its prompt's logprobs have yet to be reported, so that no position may come from the prefix cache."""
        return self.job.params.prompt_logprobs is not None and not self.job.is_scored

    @property
    def may_end(self) -> bool:
        """False while the job's min_tokens forbids end tokens and stop strings."""
        return self.num_output_tokens >= self.job.params.min_tokens

    @property
    def is_masked(self) -> bool:
        """Whether only the host can tell which tokens may come next."""
        return self.grammar is not None or self.job.bans.needs_mask

    def banned_token_ids(self) -> list[int]:
        """What may not be drawn next, apart from what its grammar forbids or `allowed_token_ids` does not have."""
        bans = self.job.bans
        ends = () if self.may_end else self.job.end_token_ids
        return [*ends, *bans.token_ids, *bans.completing(self.token_ids, self.num_prompt_tokens)]

    @property
    def ends_with_next_token(self) -> bool:
        """Whether the next token reaches the maximum length, whatever token it is."""
        return self.num_output_tokens + 1 >= self.job.max_tokens or len(self.token_ids) + 1 >= self.job.max_model_len

    def append(self, token_id: int) -> None:
        """Append a drawn or replayed token, update the text, and end the sequence at a stop string or limit.

        Drawn and replayed tokens take the same path, so that a resumed sequence is in exactly the state that it had.
        """
        is_complete = self.follow(token_id)
        if token_id in self.job.end_token_ids:
            if self.job.params.include_stop_str_in_output:
                self.unsent_text += self.stream.push(token_id, may_stop=False)[0]
            self.finish(FinishReason.STOP)
            return
        text, is_stopped = self.stream.push(token_id, may_stop=self.may_end)
        self.unsent_text += text
        if self.stream.has_reasoned and self.num_reasoning_tokens is None:
            self.num_reasoning_tokens = self.num_output_tokens
        if is_stopped:
            self.finish_reason = FinishReason.STOP
        elif is_complete:
            self.finish(FinishReason.STOP)
        elif self.num_output_tokens >= self.job.max_tokens or len(self.token_ids) >= self.job.max_model_len:
            self.finish(FinishReason.LENGTH)

    def follow(self, token_id: int) -> bool:
        """Append a token without its text: only what later draws depend on. True if the grammar allows nothing after
        it."""
        self.token_ids.append(token_id)
        self.output_counts[token_id] += 1
        if token_id in self.job.end_token_ids:
            return False
        return self.grammar is not None and self.grammar.advance(token_id)

    def finish(self, reason: FinishReason) -> None:
        """End without a stop string. Text that was held back as the possible start of one is now part of the output."""
        self.unsent_text += self.stream.flush()
        self.finish_reason = reason

    def take_text(self) -> str:
        text, self.unsent_text = self.unsent_text, ""
        return text
