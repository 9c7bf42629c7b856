"""The HTTP API as one ASGI application: routes, middleware and error handlers.

OpenAI routes that have no counterpart here answer 501 with an alternative, and need a key like the others.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import NoReturn

from fastapi import APIRouter, FastAPI
from starlette.requests import Request

from api import (
    admin,
    admin_keys,
    anthropic,
    anthropic_batches,
    durable_streams,
    erasures,
    health,
    jobs,
    model_pulls,
    own_key,
    scores,
    simple,
    stream_tokens,
    tokens,
    usage,
    webhooks,
)
from api.anthropic_batches import MAX_BATCH_BYTES
from api.errors import ImpliedMethods, register_error_handlers
from api.exposure import refuse_development_settings
from api.middleware import BodyLimit, Cors, OriginGuard, RequestContext
from api.openai import batches, compact, conversations, files, inference, response_socket, responses
from api.openai.files import FORM_BYTES
from api.opening import open_services
from api.pages import add_pages
from api.root_path import UnderRootPath
from api.routes import Application
from api.services import AnyKeyRoute
from domain.addresses import OriginPolicy
from domain.catalog import Catalog
from domain.errors import NotOffered
from settings import Settings, get_settings

METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE"]

#: Prefixes of OpenAI paths that are not offered, and what to use instead.
INSTEAD_BY_PREFIX = {
    "/v1/chat/completions/input_tokens": "count the same messages as the input of /v1/responses/input_tokens",
    "/v1/audio": "models here take text only: transcribe elsewhere and send the text to /v1/chat/completions",
    "/v1/images": "models here produce text only: use /v1/chat/completions",
    "/v1/fine_tuning": "train elsewhere and add the model's folder to models.toml",
    "/v1/moderations": "ask a model for a verdict, with a JSON schema as the response_format of /v1/chat/completions",
    "/v1/assistants": "keep the conversation yourself and send it to /v1/chat/completions",
    "/v1/threads": "keep the conversation yourself and send it to /v1/chat/completions",
    "/v1/vector_stores": "store the vectors in your own database",
    "/v1/realtime": "stream a job's events instead: GET /v1/jobs/{job_id}/events",
}


not_offered_router = APIRouter(route_class=AnyKeyRoute)  # the answer tells what to use instead


async def refuse(request: Request) -> NoReturn:
    path = request.url.path
    prefix = next(prefix for prefix in INSTEAD_BY_PREFIX if path == prefix or path.startswith(f"{prefix}/"))
    raise NotOffered(f"{prefix} is not offered here; {INSTEAD_BY_PREFIX[prefix]}")


for prefix in INSTEAD_BY_PREFIX:
    for path in (prefix, f"{prefix}/{{rest:path}}"):
        not_offered_router.add_api_route(path, refuse, methods=METHODS, include_in_schema=False, response_model=None)


ROUTERS = (
    not_offered_router,  # first: other routes would take some of its paths for ids
    jobs.router,
    jobs.readers,
    stream_tokens.router,
    durable_streams.router,
    *(module.router for module in (inference, responses, compact, conversations, files, batches)),
    anthropic.router,
    anthropic_batches.router,
    simple.router,
    scores.router,
    tokens.router,
    tokens.public,
    webhooks.router,
    usage.router,
    health.router,
    health.public,
    admin.router,
    admin_keys.router,
    erasures.router,
    model_pulls.router,
    own_key.router,
)


def create_app(settings: Settings | None = None, catalog: Catalog | None = None) -> FastAPI:
    """Raises ValueError if the settings would open the API to strangers, or if the models file is invalid."""
    settings = settings or get_settings()
    catalog = catalog or settings.load_catalog()
    refuse_development_settings(settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with open_services(settings, catalog) as services:
            app.state.services = services
            yield

    app = Application(
        title="Celeriac",
        version="1",
        lifespan=lifespan,
        redirect_slashes=False,  # a redirected POST would be sent twice, or fail without an explanation
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
    )
    uploads = {
        "/v1/files": settings.max_file_bytes + FORM_BYTES,
        "/v1/messages/batches": min(settings.max_file_bytes, MAX_BATCH_BYTES),
    }
    app.add_middleware(ImpliedMethods)
    app.add_middleware(BodyLimit, max_body_bytes=settings.max_body_bytes, max_body_bytes_by_path=uploads)
    if settings.auth == "none":
        app.add_middleware(OriginGuard, policy=OriginPolicy(settings.allowed_host_names, settings.cors_origin_list))
    app.add_middleware(RequestContext)
    if settings.cors_origin_list:
        app.add_middleware(Cors, origins=settings.cors_origin_list)  # outermost, so that pages can read refusals, too
    if settings.root_path:
        app.add_middleware(UnderRootPath, root_path=settings.root_path)
    register_error_handlers(app)
    # Not `include_router`, which would build each route's schemas again and look two levels deep at every request.
    app.router.routes.extend(route for router in ROUTERS for route in router.routes)
    app.router.routes.append(response_socket.route)
    app.state.root_path = settings.root_path
    app.state.drain_seconds = settings.api_drain_seconds
    app.state.ports = None  # those of api/processes.py, if there are several
    app.state.max_message_bytes = settings.max_body_bytes  # of WebSockets, which the server enforces
    add_pages(app)
    return app
