"""The path under which a proxy serves the API (CELERIAC_ROOT_PATH), such as /celeriac.

Within the API no path has it: it is taken off what a proxy sends with it, while what comes without it is the same, so
that proxies may cut it off or not, and the machine's own requests go on. Links that clients get begin with it.
"""

from starlette.datastructures import URL
from starlette.requests import Request
from starlette.responses import RedirectResponse
from starlette.types import ASGIApp, Receive, Scope, Send


def link(request: Request, path: str) -> str:
    """`path` as clients must ask for it."""
    return f"{request.app.state.root_path}{path}"


def absolute_link(request: Request, path: str) -> str:
    """With the scheme and host that the client asked, as the proxy tells them. They go back to who sent them only."""
    told = request.headers.get("x-forwarded-proto")
    scheme = told if told in ("http", "https") else request.url.scheme
    return f"{scheme}://{request.url.netloc}{link(request, path)}"


def without_root_path(path: str, root_path: str) -> str:
    return path[len(root_path) :] if path.startswith(f"{root_path}/") else path


class UnderRootPath:
    def __init__(self, app: ASGIApp, root_path: str) -> None:
        self.app = app
        self._root_path = root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        if scope["path"] == self._root_path and scope["type"] == "http" and scope["method"] in ("GET", "HEAD"):
            # The links of the dashboard are relative, so its address must end with a slash.
            url = URL(scope=scope)
            await RedirectResponse(f"{self._root_path}/{url.query and f'?{url.query}'}", 308)(scope, receive, send)
            return
        await self.app({**scope, "path": without_root_path(scope["path"], self._root_path)}, receive, send)
