"""The sequences of vLLM's batch as the logits processor needs them. Free of torch and vLLM.

The processor runs wherever vLLM computes: in the engine's process, or in one process for each GPU. So it does not share
the back end's sequences, but makes copies without text from the request's prompt and a plan, and follows the tokens
that vLLM reports. A sequence that was preempted or resumed is rebuilt in the same way.
"""

from collections.abc import Callable, Mapping
from collections.abc import Sequence as Rows
from dataclasses import dataclass
from typing import Protocol

import msgspec
from tokenizers import Tokenizer

from domain.requests import SamplingParams
from gpu_worker.engine.bans import bans_of
from gpu_worker.engine.detokenizer import TextStream
from gpu_worker.engine.sampling import LEAST_LOGPROB, Drawn, GrammarFailed, is_adjusted, nothing_left
from gpu_worker.engine.sequence import EngineJob, Grammars, Sequence


class RowPlan(msgspec.Struct, frozen=True):
    """What a request carries besides its prompt, which is the job's prompt followed by the committed tokens."""

    params: bytes  # dumped SamplingParams, as JSON
    seed: int
    index: int
    num_prompt_tokens: int  # of the job's own prompt
    end_token_ids: list[int]


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(RowPlan).decode


def plan_of(sequence: Sequence) -> bytes:
    """Logprobs are left to vLLM."""
    job = sequence.job
    params = job.params.model_copy(update={"logprobs": None, "best_of": None, "prompt_logprobs": None, "stop": ()})
    return _encode(
        RowPlan(
            params=params.model_dump_json().encode(),
            seed=job.seed,
            index=sequence.index,
            num_prompt_tokens=sequence.num_prompt_tokens,
            end_token_ids=sorted(job.end_token_ids),
        )
    )


@dataclass(slots=True, eq=False)
class FollowedRow:
    """A copy of a sequence. `output` is vLLM's own list of the request's output tokens, which grows with each step."""

    sequence: Sequence
    output: Rows[int]
    num_followed: int = 0

    def follow(self) -> bool:
        """Take in the tokens that vLLM has drawn since the last call; False if there are none."""
        new = self.output[self.num_followed :]
        for token_id in new:
            self.sequence.follow(token_id)
        self.num_followed += len(new)
        return bool(new)

    @property
    def is_drawn_by_us(self) -> bool:
        """False if its next token is the most likely one, which vLLM finds by itself."""
        params = self.sequence.job.params
        return self.sequence.grammar is not None or params.temperature != 0 or is_adjusted(self.sequence)


def make_row(
    plan: bytes,
    prompt_token_ids: Rows[int],
    output: Rows[int],
    tokenizer: Tokenizer,
    grammars: Grammars,
    vocab_size: int,
) -> FollowedRow:
    decoded = _decode(plan)
    params = SamplingParams.model_validate_json(decoded.params)
    prompt = list(prompt_token_ids[: decoded.num_prompt_tokens])
    job = EngineJob(
        id="",
        attempt=0,
        params=params,
        max_tokens=0,
        seed=decoded.seed,
        priority=0,
        cache_salt="",
        adapter=None,
        arrival=0,
        max_model_len=0,
        end_token_ids=frozenset(decoded.end_token_ids),
        penalised_prompt_ids=frozenset(prompt if params.repetition_penalty != 1.0 else ()),
        bans=bans_of(params, tokenizer, vocab_size),
    )
    structured = params.structured_output
    sequence = Sequence(
        job=job,
        index=decoded.index,
        token_ids=prompt,
        num_prompt_tokens=len(prompt),
        stream=TextStream(tokenizer, (), params),
        grammar=None if structured is None else grammars.start(structured),
    )
    for token_id in prompt_token_ids[decoded.num_prompt_tokens :]:
        sequence.follow(token_id)
    row = FollowedRow(sequence, output)
    row.follow()
    return row


#: Draws one token for each of these sequences, of which the numbers are rows of the logits. Raises GrammarFailed.
Draw = Callable[[list[int], list[Sequence]], list[int]]


def draw_rows(rows: Mapping[int, Sequence], draw: Draw, failed_token_id: int) -> dict[int, int]:
    """The token of each row. A row that has no token left gets `failed_token_id`, an end token that may not come there,
    so that the back end notices (`refuse_wrong_end`). The others are drawn without."""
    drawing = dict(rows)
    failed: dict[int, int] = {}
    while drawing:
        try:
            token_ids = draw(list(drawing), list(drawing.values()))
        except GrammarFailed as failure:
            wrong = [row for row, sequence in drawing.items() if sequence.job is failure.job]
            failed |= dict.fromkeys(wrong, failed_token_id)
            drawing = {row: sequence for row, sequence in drawing.items() if row not in wrong}
        else:
            return failed | dict(zip(drawing, token_ids, strict=True))
    return failed


def refuse_wrong_end(sequence: Sequence, token_id: int, eos_token_ids: frozenset[int]) -> None:
    """Call before the token is appended. Raises GrammarFailed if it is the sign of `draw_rows`."""
    if token_id not in eos_token_ids:
        return
    if not sequence.job.bans.allow(token_id) or token_id in sequence.banned_token_ids():
        raise GrammarFailed(sequence.job, nothing_left(sequence))
    if sequence.grammar is None:
        return
    if token_id not in sequence.job.params.stop_token_ids and not sequence.grammar.matcher.is_accepting():
        raise GrammarFailed(sequence.job, "its structured output cannot be continued; simplify the schema")


class TokenScore(Protocol):
    """A Logprob of vLLM's."""

    logprob: float


def drawn_of(token_id: int, scores: Mapping[int, TokenScore], num_top: int) -> Drawn:
    """`scores` has the token and the most likely ones, or is empty if nobody asked."""
    if not scores:
        return Drawn(token_id)
    logprobs = {other: max(score.logprob, LEAST_LOGPROB) for other, score in scores.items()}
    likely = sorted(logprobs, key=lambda other: (-logprobs[other], other))[:num_top]
    return Drawn(token_id, logprobs[token_id], tuple((other, logprobs[other]) for other in likely))
