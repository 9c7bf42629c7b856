"""GET /v1/models: what is served, as OpenAI's models, and how much each of them holds."""

import orjson
from fastapi import Request
from starlette.responses import Response

from api.deps import caller_of, private_router
from api.openai.views import ModelListView, ModelView
from domain.catalog import ModelSpec

router = private_router()


@router.get("/v1/models", responses={200: {"model": ModelListView}})
async def list_models(request: Request) -> Response:
    services, _ = caller_of(request)
    models = [_model_object(spec) for spec in services.catalog]
    return Response(orjson.dumps({"object": "list", "data": models}), media_type="application/json")


@router.get("/v1/models/{model:path}", responses={200: {"model": ModelView}})
async def read_model(model: str, request: Request) -> Response:
    """Slashes in a model's name come percent-encoded from the SDKs, and plain from people."""
    services, _ = caller_of(request)
    return Response(orjson.dumps(_model_object(services.catalog.get(model))), media_type="application/json")


def _model_object(spec: ModelSpec) -> dict[str, object]:
    # Nothing says when a model was made; 0 is honest, and a number is what clients need.
    return {
        "id": spec.id,
        "object": "model",
        "created": 0,
        "owned_by": "celeriac",
        "max_model_len": spec.max_model_len,
    }
