"""A job's request and its result, of whichever kind the job is: told apart by `kind`, which every dump bears."""

from typing import Annotated, Any

from pydantic import Discriminator, Tag, TypeAdapter

from domain.embeddings import EmbeddingRequest, EmbeddingResult
from domain.jobs import JobKind
from domain.requests import GenerationRequest, GenerationResult

JobRequest = GenerationRequest | EmbeddingRequest
JobOutput = GenerationResult | EmbeddingResult


def kind_of(value: Any) -> str:
    """Of a request or result, or its dump. Those that were stored before there were kinds are of a generation."""
    kind = value.get("kind") if isinstance(value, dict) else getattr(value, "kind", None)
    return str(kind or JobKind.GENERATION)


REQUEST: TypeAdapter[JobRequest] = TypeAdapter(
    Annotated[
        Annotated[GenerationRequest, Tag("generation")] | Annotated[EmbeddingRequest, Tag("embedding")],
        Discriminator(kind_of),
    ]
)
RESULT: TypeAdapter[JobOutput] = TypeAdapter(
    Annotated[
        Annotated[GenerationResult, Tag("generation")] | Annotated[EmbeddingResult, Tag("embedding")],
        Discriminator(kind_of),
    ]
)
