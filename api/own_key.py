"""GET /v1/key: what the key of the request may do, so that a client need not offer what would be refused."""

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from api.errors import json_response
from api.openapi import REFUSALS
from api.services import AnyKeyRoute
from dialects.administration import OwnKeyView

router = APIRouter(route_class=AnyKeyRoute, responses=REFUSALS, tags=["Operations"])


@router.get("/v1/key", responses={200: {"model": OwnKeyView}})
async def read_own_key(request: Request) -> Response:
    """The key that the request was sent with, and the scopes of the routes that it opens."""
    scopes = sorted(request.state.scopes)
    return json_response({"object": "api_key", "id": request.state.key_id, "scopes": scopes})
