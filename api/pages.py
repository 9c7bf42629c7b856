"""What a browser is shown: a page of links at `/`, and the whole API at `/docs`, without anything from the internet."""

import asyncio
from importlib.metadata import version
from pathlib import Path

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.staticfiles import StaticFiles

from api.openapi import document_of

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
    not send a key with them."""
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
    async def openapi() -> Response:
        async with making:  # the first time takes a second, in which streams go on
            return JSONResponse(await asyncio.to_thread(document_of, app))

    app.mount("/static", StaticFiles(directory=STATIC), name="static")


VARY = {"vary": "accept"}


def _page(name: str) -> Response:
    return FileResponse(STATIC / name, media_type="text/html", headers=SECURITY | VARY)
