"""The HTTP API as one ASGI application: routes, error handlers, pages, and what lives as long as the process.

What a browser is shown: a page of links at `/`, and the whole API at `/docs`, without anything from the internet.

Routes of OpenAI that have no counterpart here: 501, and what there is instead. Behind the key.

The HTTP API as one ASGI application: routes, error handlers, and what lives as long as the process.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version
from pathlib import Path
from typing import NoReturn

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.staticfiles import StaticFiles

from api import admin, anthropic, anthropic_batches, health, jobs, simple, webhooks
from api.anthropic_batches import MAX_BATCH_BYTES
from api.errors import ImpliedMethods, register_error_handlers
from api.middleware import BodyLimit, Cors, DoorWithoutKeys, RequestContext
from api.openai import batches, files, inference, responses
from api.openai.files import FORM_BYTES
from api.openapi import document_of
from api.services import open_services, private_router
from domain.addresses import Door, is_loopback
from domain.catalog import Catalog
from domain.errors import NotOffered
from settings import Settings, get_settings

STATIC = Path(__file__).parent / "static"

#: Scripts and styles come from here alone, and nobody may frame the page. Swagger UI sets styles on its elements.
SECURITY = {
    "content-security-policy": (
        "default-src 'self'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
        "frame-ancestors 'none'; base-uri 'none'; form-action 'self'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}

LINKS = {
    "documentation": "/docs",
    "openapi": "/openapi.json",
    "health": "/health",
    "queue": "/v1/queue",
    "models": "/v1/models",
    "jobs": "/v1/jobs",
}


def add_pages(app: FastAPI) -> None:
    """Open to everybody: they say how the API looks, which is no secret, and nothing of what is in it. A browser could
    not send a key with them. FastAPI remembers these functions for ever, so none of them holds the application."""
    making = asyncio.Lock()

    @app.get("/", include_in_schema=False)
    async def root(request: Request) -> Response:
        """Links: a page for people, JSON for programs."""
        if "text/html" in request.headers.get("accept", ""):
            return _page("index.html")
        return JSONResponse({"name": "celeriac", "version": version("celeriac"), "links": LINKS}, headers=VARY)

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return _page("docs.html")

    @app.get("/openapi.json", include_in_schema=False)
    async def openapi(request: Request) -> Response:
        async with making:  # the first time takes a second, in which streams go on
            return JSONResponse(await asyncio.to_thread(document_of, request.app))

    app.mount("/static", StaticFiles(directory=STATIC), name="static")


VARY = {"vary": "accept"}


def _page(name: str) -> Response:
    return FileResponse(STATIC / name, media_type="text/html", headers=SECURITY | VARY)


METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE"]

#: What stands below each of these, and what to use instead.
INSTEAD_BY_PREFIX = {
    "/v1/chat/completions/input_tokens": "count the same messages as the input of /v1/responses/input_tokens",
    "/v1/audio": "models here read and write text: transcribe elsewhere and send the text to /v1/chat/completions",
    "/v1/images": "models here read and write text: /v1/chat/completions",
    "/v1/fine_tuning": "train elsewhere and name the folder in models.toml",
    "/v1/responses/compact": "shorten the conversation yourself and send it to /v1/responses",
    "/v1/moderations": "ask a model for a verdict: /v1/chat/completions with a JSON schema as response_format",
    "/v1/assistants": "keep the conversation yourself and send it to /v1/chat/completions",
    "/v1/threads": "keep the conversation yourself and send it to /v1/chat/completions",
    "/v1/vector_stores": "keep vectors in a database of your own",
    "/v1/realtime": "follow a job as it runs: GET /v1/jobs/{job_id}/events",
}

not_offered_router = private_router("Not offered")


async def refuse(request: Request) -> NoReturn:
    path = request.url.path
    prefix = next(prefix for prefix in INSTEAD_BY_PREFIX if path == prefix or path.startswith(f"{prefix}/"))
    raise NotOffered(f"{prefix} is not offered here; {INSTEAD_BY_PREFIX[prefix]}")


for prefix in INSTEAD_BY_PREFIX:
    for path in (prefix, f"{prefix}/{{rest:path}}"):
        not_offered_router.add_api_route(path, refuse, methods=METHODS, include_in_schema=False, response_model=None)


ROUTERS = (
    not_offered_router,  # first: some of its paths look like ids to others
    jobs.router,
    *(module.router for module in (inference, responses, files, batches)),
    anthropic.router,
    anthropic_batches.router,
    simple.router,
    webhooks.router,
    health.router,
    health.public,
    admin.router,
)


def create_app(settings: Settings | None = None, catalog: Catalog | None = None) -> FastAPI:
    """Raises ValueError where the settings would open the API to strangers, or the models file makes no sense."""
    settings = settings or get_settings()
    catalog = catalog or settings.load_catalog()
    refuse_open_door(settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with open_services(settings, catalog) as services:
            app.state.services = services
            yield

    app = FastAPI(
        title="Celeriac",
        version="1",
        lifespan=lifespan,
        redirect_slashes=False,  # a redirected POST is a second request, or an error that does not say why
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
        app.add_middleware(DoorWithoutKeys, door=Door(settings.allowed_host_names, settings.cors_origin_list))
    app.add_middleware(RequestContext)
    if settings.cors_origin_list:
        app.add_middleware(Cors, origins=settings.cors_origin_list)  # around the rest: a page may read refusals, too
    register_error_handlers(app)
    # Not `include_router`, which would build each route's schemas again and look two levels deep at every request.
    app.router.routes.extend(route for router in ROUTERS for route in router.routes)
    add_pages(app)
    return app


def refuse_open_door(settings: Settings) -> None:
    """Without keys everybody who reaches the API owns every job, so only this machine may reach it, and no page that
    its browser happens to show."""
    if settings.auth != "none":
        return
    if not is_loopback(settings.host):
        raise ValueError(
            f"CELERIAC_HOST is {settings.host!r} and CELERIAC_AUTH is 'none': anybody could use this API; "
            "set CELERIAC_AUTH=api_key, or leave CELERIAC_HOST at 127.0.0.1"
        )
    if "*" in settings.cors_origin_list:
        raise ValueError(
            "CELERIAC_CORS_ORIGINS is '*' and CELERIAC_AUTH is 'none': any web page could use this API; "
            "name the origins, or set CELERIAC_AUTH=api_key"
        )
