"""Query strings in: typed, bounded, and refused like bodies where a name is unknown or a value cannot be."""

from collections.abc import Mapping
from typing import Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError
from starlette.requests import Request

from api.bodies import invalid_request
from domain.errors import InvalidRequest
from domain.first_error import FirstErrorModel

Query = TypeVar("Query", bound="QueryModel")

MAX_PARAMETERS = 64  # no route has half as many, those of a mapping counted one by one


class QueryModel(FirstErrorModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    @classmethod
    def lists(cls) -> set[str]:
        """The parameters that may come more than once."""
        return {
            name
            for name, field in cls.model_fields.items()
            if any(map(_is_list, (field.annotation, *get_args(field.annotation))))
        }


def _is_list(annotation: object) -> bool:
    return get_origin(annotation) is list


def read_query(request: Request, model: type[Query]) -> Query:
    """`a[k]=v` becomes the entry k of the mapping a, and `a`, `a[]` or `a[0]` an item of the list a. Raises
    InvalidRequest, also for an unknown or repeated name."""
    parameters = request.query_params.multi_items()
    if len(parameters) > MAX_PARAMETERS:
        raise InvalidRequest(
            f"the query has {len(parameters)} parameters; at most {MAX_PARAMETERS} are read, send fewer"
        )
    given: dict[str, Any] = {}
    for name, value in parameters:
        outer, bracket, key = name.partition("[")
        if outer in model.lists():
            given.setdefault(outer, []).append(value)
            continue
        is_entry = bool(bracket) and key.endswith("]")
        target: dict[str, Any] = given.setdefault(outer, {}) if is_entry else given
        label = key[:-1] if is_entry else name
        if not isinstance(target, dict) or label in target:
            raise InvalidRequest(f"{name[:64]} appears more than once; send it once", param=name[:64])
        target[label] = value
    try:
        return model.model_validate(given)
    except ValidationError as exc:
        raise invalid_request(exc, model) from None


def query_parameters(model: type[BaseModel]) -> list[Mapping[str, object]]:
    """The parameters of `model` as OpenAPI lists them."""
    whole = model.model_json_schema()
    defs = {"$defs": whole["$defs"]} if "$defs" in whole else {}
    return [
        {"name": name, "in": "query", "required": False, "schema": schema | defs, **_style(schema)}
        for name, schema in whole["properties"].items()
    ]


def _style(schema: Mapping[str, object]) -> dict[str, object]:
    return {"style": "deepObject", "explode": True} if schema.get("type") == "object" else {}
