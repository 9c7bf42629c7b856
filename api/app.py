"""The HTTP API as one ASGI application: routes, error handlers, and what lives as long as the process."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI

from api import admin, dead_letters, health, jobs, not_offered, queue, simple, webhook_deliveries, webhook_endpoints
from api.door import Cors, DoorWithoutKeys
from api.errors import register_error_handlers
from api.methods import ImpliedMethods, build_routes
from api.middleware import BodyLimit, RequestContext
from api.openai import batches, chat, completions, embeddings, files, models, responses, stored_chats
from api.openai.uploads import FORM_BYTES
from api.pages import add_pages
from api.services import open_services
from domain.catalog import Catalog
from domain.door import Door, is_loopback
from settings import Settings, get_settings

#: The routes, under the titles of the documentation.
SECTIONS = {
    "Jobs": (jobs.router, dead_letters.router),
    "OpenAI": tuple(
        module.router for module in (chat, stored_chats, completions, embeddings, responses, models, files, batches)
    ),
    "Simple": (simple.router,),
    "Webhooks": (webhook_endpoints.router, webhook_deliveries.router),
    "Operations": (queue.router, health.router, health.public, admin.router),
}


def create_app(settings: Settings | None = None, catalog: Catalog | None = None) -> FastAPI:
    """Raises ValueError where the settings would open the API to strangers, or the models file makes no sense."""
    settings = settings or get_settings()
    catalog = catalog or Catalog.load(settings.models_file)
    refuse_open_door(settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        build_routes(app.router.routes)
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
    uploads = {"/v1/files": settings.max_file_bytes + FORM_BYTES}
    app.add_middleware(ImpliedMethods)
    app.add_middleware(BodyLimit, max_body_bytes=settings.max_body_bytes, max_body_bytes_by_path=uploads)
    if settings.auth == "none":
        app.add_middleware(DoorWithoutKeys, door=Door(settings.allowed_host_names, settings.cors_origin_list))
    app.add_middleware(RequestContext)
    if settings.cors_origin_list:
        app.add_middleware(Cors, origins=settings.cors_origin_list)  # around the rest: a page may read refusals, too
    register_error_handlers(app)
    app.include_router(not_offered.router)  # first: some of its paths look like ids to others
    for title, routers in SECTIONS.items():
        for router in routers:
            app.include_router(router, tags=[title])
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
