"""Items of earlier responses that a body names by their ids, in place of which it then has the items themselves.

Vercel's AI SDK sends its second turn like this, unless it is told to store nothing.
"""

from collections.abc import Collection, Iterator
from typing import Any, TypeVar
from uuid import UUID

import orjson
from pydantic import TypeAdapter
from starlette.requests import Request

from api.limits import size_of
from api.openai.response_records import as_it_ended, body_of, find_response
from api.services import Services, caller_of
from dialects.openai_compaction import CompactBody
from dialects.openai_response_items import InputItem, ItemReference, ReferableItem, listed_items
from dialects.openai_response_requests import ResponseBody
from domain.errors import InvalidRequest, JobNotFound
from storage.job_queries import JobRecord

MAX_RESPONSES = 128  # of which one body can name items: each has to be read

_ITEM: TypeAdapter[InputItem] = TypeAdapter(InputItem)

Body = TypeVar("Body", ResponseBody, CompactBody)


async def with_referenced_items(request: Request, body: Body, passing: Collection[UUID] = ()) -> Body:
    """The body, whose input has items in place of references. Items of the jobs `passing` are found although these are
    not stored. Raises JobNotFound and InvalidRequest."""
    if body.input is None or isinstance(body.input, str):
        return body
    places = _places_by_response(body.input)
    if not places:
        return body
    services, tenant_id = caller_of(request)
    items: list[ReferableItem] = list(body.input)
    max_bytes = services.settings.max_body_bytes
    for response_id, place_by_id in places.items():
        try:
            record = await find_response(services, tenant_id, response_id, passing)
        except JobNotFound:
            raise _not_found(*next(iter(place_by_id.items()))) from None
        num_bytes = size_of(record.result) + len(orjson.dumps(record.endpoint_body))
        found = await services.large_work.run(num_bytes, _items_of, services, record, set(place_by_id))
        for id_, place in place_by_id.items():
            if id_ not in found:
                raise _not_found(id_, place)
            items[place], size = found[id_]
            max_bytes -= size
        if max_bytes < 0:
            raise InvalidRequest(
                f"the items that input refers to have more than {services.settings.max_body_bytes} bytes together, "
                "which is the limit for a body; refer to fewer of them",
                param="input",
            )
    return body.model_copy(update={"input": items})


def _places_by_response(items: Collection[ReferableItem]) -> dict[str, dict[str, int]]:
    """For each response, the ids of its items that are referred to, with their places in the input. An id has that of
    its response as its second part. Raises InvalidRequest."""
    places: dict[str, dict[str, int]] = {}
    for place, item in enumerate(items):
        if not isinstance(item, ItemReference):
            continue
        _, _, rest = item.id.partition("_")
        of_response = places.setdefault(f"resp_{rest.partition('_')[0]}", {})
        if item.id in of_response:
            raise InvalidRequest(
                f"input.{place}.id is {item.id!r}, which input.{of_response[item.id]} refers to already; send it once",
                param=f"input.{place}.id",
            )
        of_response[item.id] = place
    if len(places) > MAX_RESPONSES:
        raise InvalidRequest(
            f"input refers to items of {len(places)} responses, but {MAX_RESPONSES} is the limit; send the items "
            "themselves, or previous_response_id",
            param="input",
        )
    return places


def _items_of(services: Services, record: JobRecord, wanted: Collection[str]) -> dict[str, tuple[InputItem, int]]:
    """Those items of a response that are wanted, by their ids, each with its size in bytes."""
    views = (item for item in _views_of(services, record) if item["id"] in wanted)
    return {item["id"]: (_ITEM.validate_python(item), len(orjson.dumps(item))) for item in views}


def _views_of(services: Services, record: JobRecord) -> Iterator[dict[str, Any]]:
    yield from listed_items(record.job.id, body_of(record).input)
    if record.job.status.is_terminal:
        yield from (dict(item) for item in as_it_ended(services, record)["output"])


def _not_found(id_: str, place: int) -> JobNotFound:
    return JobNotFound(
        f"input.{place}.id is {id_!r}, but there is no such item of a stored response; it may have expired, or have "
        "been created with store=false. Send the item itself",
        param=f"input.{place}.id",
    )
