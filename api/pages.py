"""The pages for browsers: the dashboard at `/`, the API's documentation at `/docs`, and the files that both load.

They need no key, which a browser could not send with a link: they contain no data, and what they show they fetch from
the API with the key that their user enters. Nothing comes from the internet.
"""

import asyncio
from importlib.metadata import version
from pathlib import Path

import orjson
from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

from api.openapi import document_of
from api.root_path import link

STATIC = Path(__file__).parent / "static"

#: Nothing may be loaded, run or asked but what this server sends; no page may frame ours, and no text becomes HTML
#: (https://www.w3.org/TR/trusted-types/).
STRICT_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)

#: Swagger UI sets styles on its elements and makes HTML of the descriptions of routes.
DOCS_POLICY = (
    "default-src 'self'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'self'"
)

LINKS = {
    "documentation": "/docs",
    "openapi": "/openapi.json",
    "health": "/health",
    "queue": "/v1/queue",
    "models": "/v1/models",
    "jobs": "/v1/jobs",
}

VARY = {"vary": "accept"}


def security_headers(policy: str) -> dict[str, str]:
    """`no-cache`: a browser may keep a file, but asks each time whether it has changed, so that no page runs the
    modules of two releases."""
    return {
        "content-security-policy": policy,
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cache-control": "no-cache",
    }


class PageFiles(StaticFiles):
    """The files of the pages, with the headers of the pages."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        response = await super().get_response(path, scope)
        response.headers.update(security_headers(STRICT_POLICY))
        return response


def add_pages(app: FastAPI) -> None:
    """FastAPI caches these functions for the life of the process, so none of them may refer to `app`."""
    building = asyncio.Lock()
    app.state.document = None  # as it is sent

    @app.get("/", include_in_schema=False)
    async def root(request: Request) -> Response:
        """The dashboard for people, links for programs."""
        if "text/html" in request.headers.get("accept", ""):
            return await page(request, "index.html", STRICT_POLICY)
        links = {name: link(request, path) for name, path in LINKS.items()}
        return JSONResponse({"name": "celeriac", "version": version("celeriac"), "links": links}, headers=VARY)

    @app.get("/docs", include_in_schema=False)
    async def docs(request: Request) -> Response:
        return await page(request, "docs.html", DOCS_POLICY)

    @app.get("/openapi.json", include_in_schema=False)
    async def openapi(request: Request) -> Response:
        state = request.app.state
        async with building:  # once; it takes a second, in a thread, so that streams go on
            if state.document is None:
                state.document = await asyncio.to_thread(lambda: orjson.dumps(document_of(request.app)))
        return Response(state.document, media_type="application/json")

    files = PageFiles(directory=STATIC)

    async def page(request: Request, name: str, policy: str) -> Response:
        response = await files.get_response(name, request.scope)
        response.headers.update(security_headers(policy) | VARY)
        return response

    app.mount("/static", files, name="static")
