"""Texts to vectors: what is asked for (EmbeddingRequest) and what comes back (EmbeddingResult)."""

import base64
from typing import Annotated, Literal, Self

from pydantic import Discriminator, Field, StringConstraints, Tag, model_validator

from domain.jobs import Frozen, Usage
from domain.requests import MAX_PROMPT_CHARS, TokenId

MAX_INPUTS = 2048
MAX_INPUT_TOKENS = 300_000  # of one request, over all its inputs
MAX_NUMBERS = 2**22  # of one result, 16 MiB of them: they travel in one frame and lie in one row
MAX_DIMENSIONS = 65_536

_Text = Annotated[str, StringConstraints(min_length=1, max_length=MAX_PROMPT_CHARS)]
_TokenIds = Annotated[tuple[TokenId, ...], Field(min_length=1, max_length=MAX_INPUT_TOKENS)]

#: The tags keep the two branches out of error messages.
EmbeddingInput = Annotated[
    Annotated[_Text, Tag("<text>")] | Annotated[_TokenIds, Tag("<token ids>")],
    Discriminator(lambda value: "<text>" if isinstance(value, str) else "<token ids>"),
]


class EmbeddingRequest(Frozen):
    """One vector for each of `inputs`, texts or token ids. `dimensions` are kept from the front of each vector."""

    kind: Literal["embedding"] = "embedding"
    model: str = Field(min_length=1, max_length=256)
    inputs: tuple[EmbeddingInput, ...] = Field(min_length=1, max_length=MAX_INPUTS)
    dimensions: int | None = Field(default=None, ge=1, le=MAX_DIMENSIONS)

    @model_validator(mode="after")
    def _bounded_in_total(self) -> Self:
        if self.num_chars > MAX_PROMPT_CHARS:
            raise ValueError(f"inputs have {self.num_chars} characters, more than {MAX_PROMPT_CHARS}; send fewer")
        return self

    @property
    def num_chars(self) -> int:
        return sum(len(text) for text in self.inputs if isinstance(text, str))


class EmbeddingResult(Frozen):
    """`embeddings` are unit vectors in the order of the inputs: little-endian float32, in base64."""

    kind: Literal["embedding"] = "embedding"
    embeddings: tuple[str, ...]
    dimensions: int
    usage: Usage


def encode_vector(vector: bytes) -> str:
    return base64.b64encode(vector).decode()
