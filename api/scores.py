"""/v1/rerank and /v1/score: how well texts match. Each is an embedding job, from whose vectors the scores follow."""

from starlette.requests import Request
from starlette.responses import Response

from api.inputs import off_loop, read_for_model
from api.openai.answers import WholeAnswer
from api.openai.running import Asked, start
from api.openapi import request_body
from api.services import private_router, services_of
from dialects.fields import HINT_TREE
from dialects.scores import (
    RerankBody,
    RerankView,
    ScoreBody,
    ScoreListView,
    rerank_from_result,
    scores_from_result,
    spelling_of_rerank,
    spelling_of_score,
    to_rerank_request,
    to_score_request,
)
from domain.jobs import Endpoint

router = private_router("Scores")


@router.post("/v1/rerank", responses={200: {"model": RerankView}}, openapi_extra=request_body(RerankBody))
@router.post("/v2/rerank", responses={200: {"model": RerankView}}, openapi_extra=request_body(RerankBody))
@router.post("/rerank", responses={200: {"model": RerankView}}, openapi_extra=request_body(RerankBody))
async def rerank(request: Request) -> Response:
    """Order documents by how well they match a query, as Cohere's, Jina's and vLLM's rerank does."""
    body = await read_for_model(request, RerankBody, HINT_TREE, task="scoring")
    spec = services_of(request).views.get(body.model).spec
    asked = Asked(
        endpoint=Endpoint.EMBEDDINGS, has_stream=False, spelling=spelling_of_rerank(body, spec), timeouts=body.timeouts
    )
    run = await start(request, await off_loop(request, to_rerank_request, body, spec), asked)
    return WholeAnswer([run], lambda records: rerank_from_result(records[0], body))


@router.post("/v1/score", responses={200: {"model": ScoreListView}}, openapi_extra=request_body(ScoreBody))
@router.post("/score", responses={200: {"model": ScoreListView}}, openapi_extra=request_body(ScoreBody))
async def score(request: Request) -> Response:
    """How well one text matches others, or each of several texts its counterpart, as vLLM's score does."""
    body = await read_for_model(request, ScoreBody, HINT_TREE, task="scoring")
    spec = services_of(request).views.get(body.model).spec
    asked = Asked(
        endpoint=Endpoint.EMBEDDINGS, has_stream=False, spelling=spelling_of_score(body, spec), timeouts=body.timeouts
    )
    run = await start(request, await off_loop(request, to_score_request, body, spec), asked)
    return WholeAnswer([run], lambda records: scores_from_result(records[0], body))
