"""A chunk: the smallest piece of a job's stream that is committed, published and replayed."""

from pydantic import Field

from domain.jobs import FinishReason, Frozen


def _utf8(text: str) -> tuple[int, ...]:
    return tuple(text.encode())


class TokenLogprob(Frozen):
    """A token may be a part of a character: its `bytes` are what it adds to the UTF-8 of the text, and in `token` those
    that are no character by themselves are written `\\xNN`, as the OpenAI API does it. A special token adds none; as an
    alternative it has those of its name. Chunks stored before tokens had bytes get those of the text."""

    token: str
    token_id: int
    logprob: float
    bytes: tuple[int, ...] = Field(default_factory=lambda data: _utf8(data["token"]))
    top: tuple[tuple[int, str, float], ...] = ()  # (token id, text, logprob), most likely first
    top_bytes: tuple[tuple[int, ...], ...] = Field(
        default_factory=lambda data: tuple(_utf8(text) for _, text, _ in data["top"])
    )


class TokenChunk(Frozen):
    """What one sequence of a job gained since its last chunk.

    `sequence_number` counts the chunks of the whole job from 1 without a hole, over all its sequences and attempts.
    What a reset made void is gone from the log: its numbers are not used again, and the reset takes the next one.
    `text` may lag behind `token_ids`: text that could still become a stop string, or is half a UTF-8 character, comes
    with a later chunk. The concatenated `text` of one `index` is the sequence's final text, byte for byte.

    What a later attempt needs to know rides on the chunks: under best_of the sum of the tokens' logprobs, on the first
    chunk of all the prompt's, where they are asked for, and where the first </think> ends.
    """

    sequence_number: int = Field(ge=1)
    index: int = Field(default=0, ge=0)  # which of the job's n sequences
    text: str = ""
    token_ids: tuple[int, ...] = ()
    finish_reason: FinishReason | None = None  # set on the last chunk of its index
    logprobs: tuple[TokenLogprob, ...] | None = None
    sum_logprobs: float | None = None  # of token_ids, under best_of
    num_reasoning_tokens: int | None = None  # of the sequence up to </think>, on the chunk whose tokens complete it
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None  # one per prompt token; the first has none
    is_reset: bool = False  # the job begins anew here: whatever came before is void, and this chunk says nothing else
