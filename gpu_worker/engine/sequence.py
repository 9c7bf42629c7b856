"""A sequence: one text being decoded, with everything that must survive a preemption. Free of torch."""

from collections import Counter
from dataclasses import dataclass, field

from domain.jobs import FinishReason
from domain.requests import SamplingParams
from gpu_worker.engine.detokenizer import TextStream
from gpu_worker.engine.grammar import Grammar


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
    arrival: int  # counts the jobs of this engine; earlier ones run first within a priority
    max_model_len: int
    end_token_ids: frozenset[int]  # end-of-sequence tokens (unless ignored) and the job's stop tokens
    penalised_prompt_ids: frozenset[int]  # the prompt's tokens where a repetition penalty counts them, else none
    is_scored: bool = False  # the prompt's logprobs, where asked for, have been told
    sequences: "list[Sequence]" = field(default_factory=list)


@dataclass(slots=True, eq=False)
class Sequence:
    """`token_ids` is the prompt and the output; keys and values exist for the first `num_computed_tokens` of it."""

    job: EngineJob
    index: int
    token_ids: list[int]
    num_prompt_tokens: int
    stream: TextStream
    grammar: Grammar | None = None  # where the job asks for structured output
    num_computed_tokens: int = 0
    num_cached_tokens: int | None = None  # prompt tokens found in the prefix cache at its first admission
    block_ids: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)  # of the first full blocks, a chain; grows as needed
    num_published_blocks: int = 0  # of those, how many are in the prefix cache
    output_counts: Counter[int] = field(default_factory=Counter)  # of each token in the output, for the penalties
    finish_reason: FinishReason | None = None
    unsent_text: str = ""
    num_reasoning_tokens: int | None = None  # of the output, up to the one that completes the first </think>
    prompt_logprobs: list[dict[str, object] | None] = field(default_factory=lambda: [None])  # of the computed tokens

    @property
    def rank(self) -> tuple[int, int, int]:
        """Sorts the sequences by who runs first; the last one is preempted first."""
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
        """The logprobs of its prompt are wanted still, so that every position must be computed here."""
        return self.job.params.prompt_logprobs is not None and not self.job.is_scored

    @property
    def may_end(self) -> bool:
        """False while the job's min_tokens keeps end tokens and stop strings off."""
        return self.num_output_tokens >= self.job.params.min_tokens

    @property
    def ends_with_next_token(self) -> bool:
        """Whatever that token is."""
        return self.num_output_tokens + 1 >= self.job.max_tokens or len(self.token_ids) + 1 >= self.job.max_model_len

    def append(self, token_id: int) -> None:
        """Take a drawn (or committed) token: text, stop strings, limits. The same for a fresh token and a replayed one,
        so that a resumed sequence stands exactly where it stood."""
        self.token_ids.append(token_id)
        self.output_counts[token_id] += 1
        if token_id in self.job.end_token_ids:
            self.finish(FinishReason.STOP)
            return
        text, is_stopped = self.stream.push(token_id, may_stop=self.may_end)
        self.unsent_text += text
        if self.stream.has_reasoned and self.num_reasoning_tokens is None:
            self.num_reasoning_tokens = self.num_output_tokens
        is_complete = self.grammar is not None and self.grammar.advance(token_id)
        if is_stopped:
            self.finish_reason = FinishReason.STOP
        elif is_complete:
            self.finish(FinishReason.STOP)
        elif self.num_output_tokens >= self.job.max_tokens or len(self.token_ids) >= self.job.max_model_len:
            self.finish(FinishReason.LENGTH)

    def finish(self, reason: FinishReason) -> None:
        """End without a stop string: the text held back for one belongs to the output after all."""
        self.unsent_text += self.stream.flush()
        self.finish_reason = reason

    def take_text(self) -> str:
        text, self.unsent_text = self.unsent_text, ""
        return text
