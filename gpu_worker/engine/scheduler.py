"""Decides which sequences run in the next step and how many tokens of each; turns jobs into sequences. Free of torch.

A step is one forward pass over one token of each decoding sequence and, within what is left of the token budget, chunks
of prompts (chunked prefill, after Sarathi-Serve, Agrawal et al. 2024). Sequences run in order of rank; when the cache
is full, the one with the last rank is preempted. When the device runs out of memory, the budget is halved, and then
grows back slowly (additive increase, multiplicative decrease).

`make_engine_job` turns an AddJob frame into sequences and validates everything that it can before the job joins a step.
"""

import sys
from bisect import insort
from collections.abc import Sequence as Rows
from dataclasses import dataclass, field

from pydantic import ValidationError
from tokenizers import Tokenizer

from domain.errors import ContextLengthExceeded, InvalidRequest, ModelNotFound
from domain.requests import SamplingParams
from gpu_worker.engine.bans import bans_of
from gpu_worker.engine.detokenizer import TextStream
from gpu_worker.engine.kv_cache import BlockCopy, CachePool
from gpu_worker.engine.sequence import EngineJob, Grammars, Sequence
from gpu_worker.engine_process.frames import AddJob

STEPS_PER_RISE = 64  # steps without running out of memory before the budget grows by a sixteenth

RISES_TO_FULL = 16


class TokenBudget:
    """How many tokens a step may compute: at most `full`, at least `floor`."""

    def __init__(self, full: int, floor: int = 16) -> None:
        self._full = full
        self._floor = min(floor, full)
        self._num_good_steps = 0
        self.tokens = full

    @property
    def is_least(self) -> bool:
        return self.tokens == self._floor

    def shrink(self) -> None:
        self.tokens = max(self._floor, self.tokens // 2)
        self._num_good_steps = 0

    def count_good_step(self) -> None:
        self._num_good_steps += 1
        if self._num_good_steps % STEPS_PER_RISE == 0:
            self.tokens = min(self._full, self.tokens + max(1, self._full // RISES_TO_FULL))


@dataclass(frozen=True, slots=True)
class ScheduledRow:
    """One sequence's share of a step: its next `num_new_tokens` tokens are computed.

    If `is_ahead`, the one token of the row is still being drawn by the previous step and is not in the sequence yet.
    The properties of such a row are valid until that step is committed.
    """

    sequence: Sequence
    num_new_tokens: int
    is_ahead: bool = False

    @property
    def start(self) -> int:
        """Position of the first new token."""
        return len(self.sequence.token_ids) if self.is_ahead else self.sequence.num_computed_tokens

    @property
    def num_output_tokens(self) -> int:
        """Tokens drawn before this row's, which is also the output position of the token that it draws."""
        return self.sequence.num_output_tokens + self.is_ahead

    @property
    def needs_token(self) -> bool:
        """Whether the row reaches the end of the sequence, so that a next token is drawn from its logits."""
        is_end = self.num_new_tokens == self.sequence.num_uncomputed_tokens
        return self.is_ahead or (is_end and self.sequence.job.max_tokens > 0)

    @property
    def num_scored_tokens(self) -> int:
        """How many of the row's positions, counted from its start, score the prompt token that follows them."""
        if not self.sequence.is_scoring:
            return 0
        return max(0, min(self.num_new_tokens, self.sequence.num_prompt_tokens - 1 - self.start))


@dataclass(slots=True)
class SchedulerOutput:
    rows: list[ScheduledRow] = field(default_factory=list)
    copies: list[BlockCopy] = field(default_factory=list)  # to be carried out before the forward pass
    preempted: list[Sequence] = field(default_factory=list)


def _rank(sequence: Sequence) -> tuple[int, int, int]:
    return sequence.rank


class Scheduler:
    """Owns the waiting and running sequences. `can_fork` is False if they cannot share blocks (SequentialRunner)."""

    def __init__(
        self,
        pool: CachePool,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_num_scored_tokens: int = sys.maxsize,
        can_fork: bool = True,
    ) -> None:
        self.pool = pool
        self.can_fork = can_fork
        self.max_num_seqs = max_num_seqs
        self.budget = TokenBudget(max_num_batched_tokens, floor=16 if can_fork else max_num_batched_tokens)
        self.max_num_scored_tokens = max_num_scored_tokens  # prompt positions that one step may score
        self._num_scorable_tokens = max_num_scored_tokens  # how many of them are left in this step
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        self.num_prefix_cache_queries = self.num_prefix_cache_hits = 0  # tokens
        self._is_entry_blocked = True  # no waiting sequence can be admitted until another one leaves

    def add(self, sequence: Sequence) -> None:
        insort(self.waiting, sequence, key=_rank)
        self._is_entry_blocked = False

    def remove(self, sequence: Sequence) -> None:
        """Remove a waiting or running sequence and free its blocks."""
        for queue in (self.running, self.waiting):
            if sequence in queue:
                queue.remove(sequence)
        self.pool.free(sequence)
        self._is_entry_blocked = False

    def schedule(self) -> SchedulerOutput:
        output = SchedulerOutput()
        self._num_scorable_tokens = self.max_num_scored_tokens
        self._schedule_decodes(output)
        # Prompts get at least a quarter of the budget, however many sequences decode; otherwise waiting sequences might
        # have to wait for running ones to end.
        budget = max(self.budget.tokens - len(output.rows), self.budget.tokens // 4)
        budget = self._schedule_prefills(output, budget)
        self._is_entry_blocked = self._admit(output, budget)
        return output

    def schedule_ahead(self, rows: Rows[ScheduledRow]) -> list[ScheduledRow]:
        """Schedule the step after `rows`, which are still being computed. Empty if that step depends on their tokens.

        This is possible only if all sequences in both steps decode. A sequence that reaches its maximum length with the
        current token is left out. If one ends for another reason, the row scheduled for it here is wasted.
        """
        if self.waiting and not self._is_entry_blocked:
            return []
        current = [row.sequence for row in rows if row.needs_token]
        if len(current) < len(rows) or not set(self.running) <= set(current):
            return []
        running = set(self.running)
        going_on = [sequence for sequence in current if sequence in running and not sequence.ends_with_next_token]
        if not self.pool.grow_all(going_on, num_more_tokens=1):
            return []
        return [ScheduledRow(sequence, 1, is_ahead=True) for sequence in going_on]

    def _schedule_decodes(self, output: SchedulerOutput) -> None:
        """One token for every decoding sequence, whatever the budget, so that prompts never stall decoding."""
        for sequence in list(self.running):
            if sequence.num_uncomputed_tokens == 1 and sequence.block_ids and self._grow(sequence, output):
                output.rows.append(ScheduledRow(sequence, 1))

    def _grow(self, sequence: Sequence, output: SchedulerOutput) -> bool:
        """Make room for the sequence's last token, preempting others if needed. False if it was preempted itself."""
        while not self.pool.grow(sequence, len(sequence.token_ids)):
            victim = self.running[-1]
            self.preempt(victim)
            output.preempted.append(victim)
            if victim is sequence:
                return False
        return True

    def preempt(self, victim: Sequence) -> None:
        """Move a running sequence back to the waiting ones. Its tokens are kept; their keys and values will be
        recomputed, or found in the prefix cache, when it is admitted again."""
        self.running.remove(victim)
        self.pool.free(victim)
        self.add(victim)
        self.num_preemptions += 1

    def _schedule_prefills(self, output: SchedulerOutput, budget: int) -> int:
        """Schedule the next chunk of every prompt in progress, whose blocks were allocated at admission. Returns the
        remaining budget."""
        for sequence in self.running:
            if budget > 0 and sequence.num_uncomputed_tokens > 1:
                budget -= self._schedule_chunk(output, sequence, budget)
        return budget

    def _schedule_chunk(self, output: SchedulerOutput, sequence: Sequence, budget: int) -> int:
        num_new_tokens = min(sequence.num_uncomputed_tokens, budget)
        if sequence.is_scoring:
            num_new_tokens = min(num_new_tokens, self._num_scorable_tokens)
            self._num_scorable_tokens -= num_new_tokens
        if not num_new_tokens:
            return 0
        output.rows.append(ScheduledRow(sequence, num_new_tokens))
        return num_new_tokens

    def _admit(self, output: SchedulerOutput, budget: int) -> bool:
        """Admit waiting sequences in order of rank. The first that does not fit blocks those behind it, so that it
        cannot starve. Returns True if no waiting sequence can be admitted until another one leaves."""
        is_blocked = True
        for sequence in list(self.waiting):
            if len(self.running) >= self.max_num_seqs:
                return is_blocked
            if budget <= 0:
                return False
            parent = self._running_sibling(sequence)
            if parent is not None and parent.num_computed_tokens < parent.num_prompt_tokens:
                is_blocked = False
                continue  # a sibling is computing the same prompt: wait, then fork it
            # One that goes on may have its output in the prefix cache, too; a sibling has only the prompt.
            if parent is not None and sequence.num_output_tokens and self.pool.use_prefix_cache:
                parent = None
            if not (self._fork(parent, sequence, output) if parent else self._enter(sequence)):
                return is_blocked
            self.waiting.remove(sequence)
            insort(self.running, sequence, key=_rank)
            budget -= self._schedule_chunk(output, sequence, budget)
        return is_blocked

    def _running_sibling(self, sequence: Sequence) -> Sequence | None:
        """The running sequence of the same job that has computed the most tokens. Past the prompt, it can be forked."""
        siblings = [sibling for sibling in sequence.job.sequences if sibling.block_ids and self.can_fork]
        return max(siblings, key=lambda sibling: sibling.num_computed_tokens, default=None)

    def _fork(self, parent: Sequence, child: Sequence, output: SchedulerOutput) -> bool:
        copies = self.pool.fork(parent, child, num_spare=len(self.running))
        if copies is None:
            return False
        output.copies.extend(copies)
        if child.num_cached_tokens is None:
            child.num_cached_tokens = 0  # counted by its sibling
        return True

    def _enter(self, sequence: Sequence) -> bool:
        """Admit one sequence if it fits. One block per running sequence is kept spare, so that the admission does not
        force a preemption one step later."""
        if not self.pool.admit(sequence, num_spare=len(self.running)):
            return False
        if self.pool.use_prefix_cache and not sequence.is_scoring:
            self.num_prefix_cache_queries += len(sequence.token_ids)
        self.num_prefix_cache_hits += sequence.num_computed_tokens
        if sequence.num_cached_tokens is None:
            sequence.num_cached_tokens = sequence.num_computed_tokens
        return True


@dataclass(frozen=True, slots=True)
class ModelLimits:
    """The model's limits, against which jobs are validated."""

    vocab_size: int
    max_model_len: int
    eos_token_ids: frozenset[int]
    adapters: frozenset[str] = frozenset()


def make_engine_job(
    command: AddJob, limits: ModelLimits, tokenizer: Tokenizer, grammars: Grammars | None, *, arrival: int
) -> EngineJob:
    """Make the job and its unfinished sequences, with committed tokens replayed. `grammars` is None if no sequence has
    one.

    `arrival` orders jobs of equal priority. Raises InvalidRequest, UnsupportedParameter or ContextLengthExceeded.
    """
    try:
        params = SamplingParams.model_validate(command.params)
    except ValidationError as exc:
        raise InvalidRequest(f"the sampling parameters are invalid: {exc}", param="params") from exc
    _check(command, params, limits)
    job = EngineJob(
        id=command.job_id,
        attempt=command.attempt,
        params=params,
        max_tokens=command.max_tokens,
        seed=command.seed,
        priority=command.priority,
        cache_salt=command.cache_salt if command.adapter is None else f"{command.cache_salt}\0{command.adapter}",
        adapter=command.adapter,
        arrival=arrival,
        max_model_len=limits.max_model_len,
        end_token_ids=frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else limits.eos_token_ids),
        penalised_prompt_ids=frozenset(command.prompt_token_ids if params.repetition_penalty != 1.0 else ()),
        bans=bans_of(params, tokenizer, limits.vocab_size),
        is_scored=command.has_prompt_logprobs,
    )
    indexes = [index for index in range(params.num_sequences) if index not in command.finished_indexes]
    job.sequences = [_make_sequence(job, command, tokenizer, grammars, index) for index in indexes]
    return job


def _make_sequence(
    job: EngineJob, command: AddJob, tokenizer: Tokenizer, grammars: Grammars | None, index: int
) -> Sequence:
    """Replay the committed tokens as if they had just been drawn. Text that was committed is not emitted again."""
    prompt = command.prompt_token_ids
    stream = TextStream(tokenizer, prompt, job.params)
    output = job.params.structured_output
    sequence = Sequence(
        job=job,
        index=index,
        token_ids=list(prompt),
        num_prompt_tokens=len(prompt),
        stream=stream,
        grammar=None if output is None or grammars is None else grammars.start(output),
    )
    for token_id in command.committed_token_ids[index]:
        if sequence.is_finished:
            break
        sequence.append(token_id)
    sequence.unsent_text = sequence.unsent_text[command.num_emitted_chars[index] :]
    return sequence


def _check(command: AddJob, params: SamplingParams, limits: ModelLimits) -> None:
    if command.adapter is not None and command.adapter not in limits.adapters:
        raise ModelNotFound(
            f"this worker has no adapter {command.adapter!r}; restart the workers after a change of adapters",
            param="model",
        )
    if not command.prompt_token_ids:
        raise InvalidRequest("the prompt has no tokens; give at least one", param="prompt")
    if len(command.prompt_token_ids) + min(1, command.max_tokens) > limits.max_model_len:
        raise ContextLengthExceeded(
            f"the prompt has {len(command.prompt_token_ids)} tokens, but the model accepts {limits.max_model_len} "
            "including at least one generated token; shorten it",
            param="prompt",
        )
    if not len(command.committed_token_ids) == len(command.num_emitted_chars) == params.num_sequences:
        raise InvalidRequest(
            f"n is {params.num_sequences}, but {len(command.committed_token_ids)} sequences have committed tokens"
        )
    _check_token_ids("prompt", command.prompt_token_ids, limits)
    _check_token_ids("logit_bias", list(params.logit_bias), limits)
    _check_token_ids("stop_token_ids", params.stop_token_ids, limits)
    _check_token_ids("bad_token_ids", params.bad_token_ids, limits)
    _check_token_ids("allowed_token_ids", params.allowed_token_ids or (), limits)
    for token_ids in command.committed_token_ids:
        _check_token_ids("committed_token_ids", token_ids, limits)


def _check_token_ids(param: str, token_ids: Rows[int], limits: ModelLimits) -> None:
    if token_ids and not 0 <= min(token_ids) <= max(token_ids) < limits.vocab_size:
        wrong = next(token_id for token_id in token_ids if not 0 <= token_id < limits.vocab_size)
        raise InvalidRequest(
            f"{param} contains token id {wrong}; the model's ids are 0 to {limits.vocab_size - 1}", param=param
        )
