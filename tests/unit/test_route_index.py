"""Requests find the route that comparing them with one route after another would find, and its function is called."""

from collections.abc import Sequence
from typing import Annotated

import pytest
from fastapi import Depends
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import BaseRoute, Match
from starlette.testclient import TestClient

from api.app import ROUTERS
from api.routes import Application, DirectRoute, FixedRoutes


async def answer_path(request: Request) -> Response:
    return PlainTextResponse(f"{request.scope['route'].path} {request.path_params}")


async def answer_id(item_id: str, request: Request) -> Response:
    return PlainTextResponse(f"{request.scope['route'].path} {item_id}")


def first_match(routes: Sequence[BaseRoute], method: str, path: str) -> BaseRoute:
    scope = {"type": "http", "method": method, "path": path}
    return next(route for route in routes if route.matches(scope)[0] is Match.FULL)


def test_every_path_without_parameters_is_in_the_index_with_the_route_that_comes_first() -> None:
    routes = [route for router in ROUTERS for route in router.routes]
    index = FixedRoutes(answer_nothing, routes)._route_by_target
    assert len(index) > 50
    for (method, path), route in index.items():
        assert route is first_match(routes, method, path), (method, path)
    for path in ("/v1/jobs", "/v1/chat/completions", "/api/v1/infer"):
        assert ("POST", path) in index


async def answer_nothing(scope: object, receive: object, send: object) -> None:
    """Only looked at, never called."""


def application(*routes: DirectRoute) -> TestClient:
    app = Application()
    app.router.routes.extend(routes)
    return TestClient(app)


def test_a_route_that_comes_first_and_takes_the_path_for_an_id_still_answers() -> None:
    first = DirectRoute("/items/{item_id}", answer_id, methods=["GET"])
    client = application(first, DirectRoute("/items/all", answer_path, methods=["GET"]))
    assert client.get("/items/all").text == "/items/{item_id} all"


def test_other_methods_and_paths_go_on_to_the_router() -> None:
    client = application(
        DirectRoute("/items", answer_path, methods=["GET"]), DirectRoute("/items/{item_id}", answer_id, methods=["GET"])
    )
    assert client.get("/items").text == "/items {}"
    assert client.get("/items/7").text == "/items/{item_id} 7"
    assert client.post("/items").status_code == 405
    assert client.get("/other").status_code == 404


def test_a_function_that_asks_for_what_only_fastapi_can_give_is_refused() -> None:
    async def wants_a_query(request: Request, limit: int) -> Response:
        raise AssertionError(limit)

    async def wants_a_dependency(request: Request, key: Annotated[Response, Depends(answer_path)]) -> Response:
        raise AssertionError(key)

    for function in (wants_a_query, wants_a_dependency):
        with pytest.raises(ValueError, match="/items: its function may take the request"):
            DirectRoute("/items", function, methods=["GET"])
