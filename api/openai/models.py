"""GET /v1/models: what is served, as OpenAI's models, how much each of them holds, and whether it is loaded now."""

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from api.errors import json_response
from api.services import Services, caller_of, private_router
from dialects.openai_views import ModelCardView, ModelListView

router = private_router()


@router.get("/v1/models", responses={200: {"model": ModelListView}})
async def list_models(request: Request) -> Response:
    services, _ = caller_of(request)
    catalog = services.catalog
    models = [_model_object(services, model) for model in dict.fromkeys([*catalog.ids, *catalog.unavailable])]
    return json_response({"object": "list", "data": models})


@router.get("/v1/models/{model:path}", responses={200: {"model": ModelCardView}})
async def read_model(model: str, request: Request) -> Response:
    """Slashes in a model's name come percent-encoded from the SDKs, and plain from people."""
    services, _ = caller_of(request)
    if not model:
        raise HTTPException(404)
    if model not in services.catalog.unavailable:
        model = services.catalog.get(model).id
    return json_response(_model_object(services, model))


def _model_object(services: Services, model: str) -> ModelCardView:
    reason = services.catalog.unavailable.get(model)
    return {
        "id": model,
        "object": "model",
        "created": _created(services),
        "owned_by": "celeriac",
        "max_model_len": services.views.get(model).max_model_len if reason is None else None,
        "loaded": _is_loaded(services, model) if reason is None else False,
        "unavailable": reason,
    }


def _created(services: Services) -> int:
    """When the list of models was last changed: nothing says when a model was made. 0 where there is no such file."""
    try:
        return int(services.settings.models_file.stat().st_mtime)
    except OSError:
        return 0


def _is_loaded(services: Services, model: str) -> bool | None:
    """By the figures of the last second, so that asking costs nothing; None while nobody can say."""
    queue = services.monitor.queues.get(model)
    return None if queue is None else queue.num_workers > 0  # workers report themselves once theirs is
