"""/v1/conversations: conversations whose items are kept here, and continued by responses that name them."""

from typing import Any, Literal

from starlette.requests import Request
from starlette.responses import Response

from api.errors import json_response
from api.inputs import PageQuery, QueryModel, listing, off_loop, query_parameters, read_model, read_query
from api.openai.conversation_turns import find_as_it_is, find_conversation
from api.openai.responses import opened_items
from api.openapi import request_body
from api.services import caller_of, private_router
from dialects.openai_conversations import (
    CONVERSATION_HINTS,
    ConversationMetadataBody,
    ConversationView,
    DeletedConversationView,
    NewConversationBody,
    NewItemsBody,
    conversation_view,
    whole_list,
)
from dialects.openai_response_items import InputItem, listed_items
from dialects.openai_response_objects import InputItemListView, InputItemView
from dialects.openai_response_requests import Includable
from dialects.openai_views import page
from domain.errors import InvalidCursor, NotFound
from domain.jobs import external_id, new_id
from storage import conversations

router = private_router("OpenAI")

Included = list[Includable]


class ItemQuery(QueryModel):
    include: Included | None = None  # ignored: whatever there is of an item is always shown


class ConversationItemsQuery(PageQuery):
    order: Literal["asc", "desc"] = "desc"
    include: Included | None = None


IN_QUERY = {"parameters": query_parameters(ItemQuery)}


@router.post(
    "/v1/conversations",
    responses={200: {"model": ConversationView}},
    openapi_extra=request_body(NewConversationBody),
)
async def create_conversation(request: Request) -> Response:
    """Begin a conversation, with up to 20 items."""
    services, tenant_id = caller_of(request)
    body = await read_model(request, NewConversationBody, CONVERSATION_HINTS)
    items = await _items_to_keep(request, body.items or [])
    created = await services.write(
        conversations.create,
        tenant_id,
        metadata=body.metadata or {},
        items=items,
        ttl_seconds=services.settings.conversation_ttl_seconds,
        max_bytes=services.settings.max_conversation_bytes_per_tenant,
    )
    return json_response(conversation_view(created))


@router.get("/v1/conversations/{conversation_id}", responses={200: {"model": ConversationView}})
async def read_conversation(conversation_id: str, request: Request) -> Response:
    services, tenant_id = caller_of(request)
    record = await find_conversation(services, tenant_id, conversation_id)
    return json_response(conversation_view(record.conversation))


@router.post(
    "/v1/conversations/{conversation_id}",
    responses={200: {"model": ConversationView}},
    openapi_extra=request_body(ConversationMetadataBody),
)
async def update_conversation(conversation_id: str, request: Request) -> Response:
    """Replace the conversation's metadata."""
    services, tenant_id = caller_of(request)
    body = await read_model(request, ConversationMetadataBody)
    record = await find_conversation(services, tenant_id, conversation_id)
    changed = await services.write(
        conversations.set_metadata,
        record.conversation.id,
        tenant_id,
        body.metadata or {},
        ttl_seconds=services.settings.conversation_ttl_seconds,
    )
    return json_response(conversation_view(changed))


@router.delete("/v1/conversations/{conversation_id}", responses={200: {"model": DeletedConversationView}})
async def delete_conversation(conversation_id: str, request: Request) -> Response:
    """Erase the conversation with its items. Its responses stay until they are deleted or expire."""
    services, tenant_id = caller_of(request)
    record = await find_as_it_is(services, tenant_id, conversation_id)
    id_ = record.conversation.id
    if not await services.write(conversations.delete_conversation, id_, tenant_id):
        raise conversations.not_found(conversation_id)
    if record.job_id is not None:
        await services.write(conversations.set_result_ttl, record.job_id, services.settings.result_ttl_seconds)
    return json_response({"id": external_id(id_, "conv"), "object": "conversation.deleted", "deleted": True})


@router.post(
    "/v1/conversations/{conversation_id}/items",
    responses={200: {"model": InputItemListView}},
    openapi_extra=request_body(NewItemsBody) | IN_QUERY,
)
async def add_items(conversation_id: str, request: Request) -> Response:
    """Add up to 20 items at the end."""
    services, tenant_id = caller_of(request)
    read_query(request, ItemQuery)
    body = await read_model(request, NewItemsBody, CONVERSATION_HINTS)
    items = await _items_to_keep(request, body.items)
    record = await find_conversation(services, tenant_id, conversation_id)
    added = await services.write(
        conversations.add_items,
        record.conversation.id,
        tenant_id,
        items,
        ttl_seconds=services.settings.conversation_ttl_seconds,
        max_bytes=services.settings.max_conversation_bytes_per_tenant,
    )
    return json_response(whole_list(added))


@router.get("/v1/conversations/{conversation_id}/items", **listing(InputItemListView, ConversationItemsQuery))
async def list_items(conversation_id: str, request: Request) -> Response:
    """The items, newest first unless `order` is asc. Those of a response are there as soon as it has ended."""
    services, tenant_id = caller_of(request)
    query = read_query(request, ConversationItemsQuery)
    record = await find_conversation(services, tenant_id, conversation_id)
    items = await services.read(
        conversations.list_items, record.conversation.id, after=query.after, limit=query.limit + 1, order=query.order
    )
    if items is None:
        raise InvalidCursor(
            f"after is {(query.after or '')[:64]!r}, which is not in this conversation; send the last_id of a page",
            param="after",
        )
    listed = page(items, query.limit)
    # The SDKs expect strings here, even for an empty list.
    return json_response(listed | {"first_id": listed["first_id"] or "", "last_id": listed["last_id"] or ""})


@router.get(
    "/v1/conversations/{conversation_id}/items/{item_id}",
    responses={200: {"model": InputItemView}},
    openapi_extra=IN_QUERY,
)
async def read_item(conversation_id: str, item_id: str, request: Request) -> Response:
    services, tenant_id = caller_of(request)
    read_query(request, ItemQuery)
    record = await find_conversation(services, tenant_id, conversation_id)
    item = await services.read(conversations.get_item, record.conversation.id, item_id)
    if item is None:
        raise _no_item(item_id)
    return json_response(item)


@router.delete("/v1/conversations/{conversation_id}/items/{item_id}", responses={200: {"model": ConversationView}})
async def delete_item(conversation_id: str, item_id: str, request: Request) -> Response:
    """Erase one item."""
    services, tenant_id = caller_of(request)
    record = await find_conversation(services, tenant_id, conversation_id)
    changed = await services.write(conversations.delete_item, record.conversation.id, tenant_id, item_id)
    if changed is None:
        raise _no_item(item_id)
    return json_response(conversation_view(changed))


async def _items_to_keep(request: Request, items: list[InputItem]) -> list[dict[str, Any]]:
    """The items as they are stored, of which a prompt can be made. Raises InvalidRequest for a compaction that is not
    ours."""
    await opened_items(request, items, place="items")
    return await off_loop(request, listed_items, new_id(), items)


def _no_item(item_id: str) -> NotFound:
    return NotFound(
        f"there is no item {item_id[:64]!r} in this conversation; its items are listed at /items", param="item_id"
    )
