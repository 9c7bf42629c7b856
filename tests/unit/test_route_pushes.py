"""bench/every_route.py floods every operation there is, a new one too."""

import json
from typing import Any

import pytest

from api.app import create_app
from api.openapi import document_of
from bench.flood import Push
from bench.route_pushes import FIXED, THINGS, further_pushes, pushes_of
from domain.catalog import Catalog
from settings import Settings


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    return document_of(create_app(Settings(), Catalog([])))


def test_what_a_path_names_can_be_made(document: dict[str, Any]) -> None:
    known = {*FIXED, *(step.gives for steps in THINGS.values() for step in steps)}
    named = {parts for path in document["paths"] for parts in path.split("/") if parts.startswith("{")}
    assert {name[1:-1] for name in named} <= known, "say in bench/route_pushes.py how this is made"


def test_a_push_survives_its_way_to_another_process(document: dict[str, Any]) -> None:
    pushes = pushes_of(document) | further_pushes()
    assert all(Push.loaded(push.dumped()) == push for push in pushes.values())
    for name, push in pushes_of(document).items():
        steps = [step for step in push.steps if "multipart" not in step.headers.get("content-type", "")]
        assert all(json.loads(step.body) is not None for step in steps if step.body), name


def test_a_new_route_gets_what_its_schema_asks_for() -> None:
    body = {"type": "object", "required": ["prompt", "colour", "size"], "properties": {
        "prompt": {"type": "string"}, "colour": {"enum": ["red"]}, "size": {"type": "integer", "minimum": 3},
        "left_out": {"type": "string"}}}  # fmt: skip
    operation = {"requestBody": {"content": {"application/json": {"schema": body}}}}
    [step] = pushes_of({"paths": {"/new": {"post": operation}}})["POST /new"].steps
    assert json.loads(step.body or "") == {"prompt": "@unique@", "colour": "red", "size": 3}
    head, sent = step.rendered({"key": "k"})
    assert b"authorization: Bearer k\r\n" in head
    assert f"content-length: {len(sent)}\r\n".encode() in head
