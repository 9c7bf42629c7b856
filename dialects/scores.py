"""Rerank and score: how well texts match, by an embedding job.

A scoring model reads two texts together; of any other model, the vectors of the texts are compared.

The bodies and answers of /v1/rerank are Cohere's, Jina's and vLLM's, those of /v1/score vLLM's.
"""

import base64
import math
import operator
from array import array
from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal, NotRequired

from pydantic import ConfigDict, Discriminator, Field, StringConstraints, Tag

from dialects.aliases import Alias, Aliases
from dialects.bodies import with_body_names
from dialects.openai import CallerId, OpenAIModel, TimeoutFields, build, publish_default_model
from dialects.openai_views import View
from domain.catalog import ModelSpec
from domain.errors import InvalidRequest
from domain.jobs import external_id
from domain.requests import MAX_INPUTS, MAX_PROMPT_CHARS, EmbeddingRequest, EmbeddingResult
from storage.job_queries import JobRecord

MAX_DOCUMENTS = 1_000

Words = Annotated[str, StringConstraints(max_length=MAX_PROMPT_CHARS)]


class TextObject(OpenAIModel):
    text: Words


#: A text, or an object with one. The tags keep the branches out of error messages.
Scored = Annotated[
    Annotated[Words, Tag("<text>")] | Annotated[TextObject, Tag("<object>")],
    Discriminator(lambda value: "<object>" if isinstance(value, dict | TextObject) else "<text>"),
]

OneOrMany = Annotated[
    Annotated[Words, Tag("<text>")] | Annotated[list[Words], Field(max_length=MAX_INPUTS - 1), Tag("<texts>")],
    Discriminator(lambda value: "<text>" if isinstance(value, str) else "<texts>"),
]


class ScoringBody(TimeoutFields):
    model_config = ConfigDict(json_schema_extra=publish_default_model)

    model: Annotated[str, StringConstraints(min_length=1, max_length=256)]
    truncate_prompt_tokens: int | None = None
    user: CallerId | None = None


class RerankBody(ScoringBody):
    ALIASES: ClassVar[Aliases] = {"max_tokens_per_doc": Alias("truncate_prompt_tokens")}

    query: Scored
    documents: Annotated[list[Scored], Field(min_length=1, max_length=MAX_DOCUMENTS)]
    top_n: Annotated[int, Field(ge=0)] | None = None  # 0, as None: all
    return_documents: bool | None = None


class ScoreBody(ScoringBody):
    ALIASES: ClassVar[Aliases] = {
        "data_1": Alias("text_1"),
        "queries": Alias("text_1"),
        "data_2": Alias("text_2"),
        "documents": Alias("text_2"),
        "items": Alias("text_2"),
    }

    text_1: OneOrMany
    text_2: OneOrMany


class DocumentView(View):
    text: str


class RankedView(View):
    index: Annotated[int, Field(description="Of the document in the request.")]
    relevance_score: float
    document: NotRequired[DocumentView]


class ScoringUsageView(View):
    prompt_tokens: int
    total_tokens: int


class RerankView(View):
    id: str
    model: str
    results: Annotated[list[RankedView], Field(description="The most relevant document first.")]
    usage: ScoringUsageView


class ScoreView(View):
    object: Literal["score"]
    index: int
    score: float


class ScoreListView(View):
    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[ScoreView]
    usage: ScoringUsageView


def to_rerank_request(body: RerankBody, spec: ModelSpec) -> EmbeddingRequest:
    """Raises InvalidRequest."""
    query, documents = _text_of(body.query), list(map(_text_of, body.documents))
    return _request(body, [query], documents, spec, spelling_of_rerank(body, spec))


def spelling_of_rerank(body: RerankBody, spec: ModelSpec) -> dict[str, str]:
    if spec.can_score:
        places = {f"inputs.{number}": f"documents.{number}" for number in range(len(body.documents))}
        return {"inputs": "documents", "queries": "query", "queries.0": "query"} | places
    places = {f"inputs.{number}": f"documents.{number - 1}" for number in range(1, len(body.documents) + 1)}
    return {"inputs": "documents", "inputs.0": "query"} | places


def rerank_from_result(record: JobRecord, body: RerankBody) -> RerankView:
    scores = _scores(record, 1)
    ranked = sorted(range(len(scores)), key=lambda index: (-scores[index], index))[: body.top_n or None]
    results: list[RankedView] = [{"index": index, "relevance_score": scores[index]} for index in ranked]
    if body.return_documents is not False:
        for result in results:
            result["document"] = {"text": _text_of(body.documents[result["index"]])}
    return {
        "id": external_id(record.job.id, "rerank"),
        "model": record.job.model_name,
        "results": results,
        "usage": _usage(record),
    }


def to_score_request(body: ScoreBody, spec: ModelSpec) -> EmbeddingRequest:
    """Raises InvalidRequest."""
    first, second = _texts_of(body.text_1), _texts_of(body.text_2)
    for name, texts in (("text_1", first), ("text_2", second)):
        if not texts:
            raise InvalidRequest(f"{name} is an empty list; send some text", param=name)
    if len(first) not in (1, len(second)):
        raise InvalidRequest(
            f"text_1 has {len(first)} texts and text_2 {len(second)}; send one text as text_1, or as many as in text_2",
            param="text_1",
        )
    return _request(body, first, second, spec, spelling_of_score(body, spec))


def spelling_of_score(body: ScoreBody, spec: ModelSpec) -> dict[str, str]:
    first, second = _places_of("text_1", body.text_1), _places_of("text_2", body.text_2)
    queries, inputs = (first, second) if spec.can_score else ([], [*first, *second])
    return (
        {"inputs": "text_2", "queries": "text_1"}
        | {f"queries.{number}": place for number, place in enumerate(queries)}
        | {f"inputs.{number}": place for number, place in enumerate(inputs)}
    )


def scores_from_result(record: JobRecord, body: ScoreBody) -> ScoreListView:
    scores = _scores(record, len(_texts_of(body.text_1)))
    return {
        "id": external_id(record.job.id, "score"),
        "object": "list",
        "created": int(record.job.created_at.timestamp()),
        "model": record.job.model_name,
        "data": [{"object": "score", "index": at, "score": score} for at, score in enumerate(scores)],
        "usage": _usage(record),
    }


def _request(
    body: ScoringBody, first: Sequence[str], second: Sequence[str], spec: ModelSpec, spelling: dict[str, str]
) -> EmbeddingRequest:
    """For a scoring model the pairs; for others all texts of the first list, and then those of the second."""
    fields: dict[str, object] = {"model": body.model, "truncate_prompt_tokens": body.truncate_prompt_tokens}
    fields |= {"queries": first, "inputs": second} if spec.can_score else {"inputs": [*first, *second]}
    try:
        return build(EmbeddingRequest, fields)
    except InvalidRequest as exc:
        exc.param = exc.param or "inputs"
        raise with_body_names(exc, spelling) from None


def _text_of(scored: str | TextObject) -> str:
    return scored if isinstance(scored, str) else scored.text


def _texts_of(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


def _places_of(name: str, value: str | list[str]) -> list[str]:
    return [name] if isinstance(value, str) else [f"{name}.{place}" for place in range(len(value))]


def _scores(record: JobRecord, num_first: int) -> list[float]:
    """Of each text of the second list, in order."""
    assert isinstance(record.result, EmbeddingResult)
    assert isinstance(record.request, EmbeddingRequest)
    vectors = [array("f", base64.b64decode(vector)) for vector in record.result.embeddings]
    if record.request.queries is not None:
        return [score for [score] in vectors]
    second = vectors[num_first:]
    first = vectors[:num_first] * (len(second) if num_first == 1 else 1)
    return [_similarity(*pair) for pair in zip(first, second, strict=True)]


def _similarity(one: "array[float]", other: "array[float]") -> float:
    """The cosine of the angle between two vectors of unit length, from -1 to 1."""
    return max(-1.0, min(1.0, math.fsum(map(operator.mul, one, other))))


def _usage(record: JobRecord) -> ScoringUsageView:
    assert record.result is not None
    num_tokens = record.result.usage.prompt_tokens
    return {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
