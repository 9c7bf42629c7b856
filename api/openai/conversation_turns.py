"""A conversation as responses need it: its turns are closed, its items read for a prompt, a new turn begun."""

import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from typing import Any
from uuid import UUID

import orjson
from sqlalchemy.orm import Session

from api.limits import size_of
from api.openai.response_records import as_it_ended, body_of
from api.services import Services
from dialects.openai_conversations import context_of, items_of_turn, readable
from dialects.openai_response_requests import ResponseBody
from domain.errors import CeleriacError, ConversationNotFound
from domain.job_options import ConversationTurn
from domain.jobs import parse_id_of_other
from storage import conversations, job_queries, tenants
from storage.conversations import ConversationRecord
from storage.job_accept import Accepted, NewJob
from storage.job_queries import JobRecord

log = logging.getLogger(__name__)


async def find_conversation(services: Services, tenant_id: UUID, name: str) -> ConversationRecord:
    """The conversation with all items of the responses that have ended. Raises ConversationNotFound, with the same
    message for a malformed id and for one of another tenant."""
    while True:
        record = await find_as_it_is(services, tenant_id, name)
        if not record.has_ended_turn:
            return record
        assert record.job_id is not None
        await _end_turn(services, tenant_id, record.conversation.id, record.job_id)


async def find_as_it_is(services: Services, tenant_id: UUID, name: str) -> ConversationRecord:
    """The conversation, perhaps without the items of a response that has ended. Raises ConversationNotFound."""
    try:
        conversation_id = parse_id_of_other(name, "conv")
    except ValueError:
        raise conversations.not_found(name) from None
    record = await services.read(conversations.get, conversation_id, tenant_id)
    if record is None:
        raise conversations.not_found(name)
    return record


async def end_turn_of(services: Services, tenant_id: UUID, job_id: UUID) -> None:
    """To be called before a job is deleted: what it has added to a conversation stays there."""
    conversation_id = await services.read(conversations.turn_of, job_id)
    if conversation_id is None:
        return
    record = await services.read(conversations.get, conversation_id, tenant_id)
    if record is not None and record.job_id == job_id and record.has_ended_turn:
        with suppress(ConversationNotFound):  # deleted since
            await _end_turn(services, tenant_id, conversation_id, job_id)


async def _end_turn(services: Services, tenant_id: UUID, conversation_id: UUID, job_id: UUID) -> None:
    """Closes the turn without its items if anything is wrong with them: an open one would lock the conversation for
    good. Raises ConversationNotFound and StorageUnavailable."""
    close = partial(_close, result_ttl_seconds=services.settings.result_ttl_seconds)
    try:
        items = await _items_of_job(services, tenant_id, job_id)
        await services.write(close, conversation_id, tenant_id, job_id, items)
    except CeleriacError:
        raise
    except Exception as exc:
        _note_lost(job_id, exc)
        await services.write(close, conversation_id, tenant_id, job_id, [])


def _close(
    session: Session,
    conversation_id: UUID,
    tenant_id: UUID,
    job_id: UUID,
    items: list[dict[str, Any]],
    *,
    result_ttl_seconds: int,
) -> None:
    conversations.end_turn(session, conversation_id, tenant_id, job_id, items)
    conversations.set_result_ttl(session, job_id, result_ttl_seconds)


async def _items_of_job(services: Services, tenant_id: UUID, job_id: UUID) -> list[dict[str, Any]]:
    job = await services.read(job_queries.get, job_id, tenant_id, with_request=True)
    if job is None:
        return []
    num_bytes = size_of(job.result) + len(orjson.dumps(job.endpoint_body))
    return await services.large_work.run(num_bytes, _items_of, services, job)


def _items_of(services: Services, job: JobRecord) -> list[dict[str, Any]]:
    """Those that can be read back: without the others, the conversation goes on."""
    items = items_of_turn(job.job.id, body_of(job), as_it_ended(services, job))
    kept = readable(items)
    if len(kept) < len(items):
        log.error("items of a turn cannot be read back", extra={"job_id": str(job.job.id)})
    return kept


def _note_lost(job_id: UUID, exc: Exception) -> None:
    """Logs no message of the exception, as it may quote what was said."""
    log.error("a turn was closed without its items", extra={"job_id": str(job_id), "reason": type(exc).__name__})


async def context_in(services: Services, tenant_id: UUID, name: str) -> tuple[list[dict[str, Any]], ConversationTurn]:
    """The messages of a conversation, and the turn that would follow them. Raises ConversationNotFound."""
    record = await find_conversation(services, tenant_id, name)
    conversation = record.conversation
    items = await services.read(conversations.all_items, conversation.id)
    has_summary = any(item["type"] == "compaction" for item in items)
    key = await services.read(tenants.seal_key, tenant_id) if has_summary else b""
    messages = await services.large_work.run(conversation.num_bytes, context_of, items, key)
    return messages, ConversationTurn(conversation.id, conversation.version)


def accept_in(
    services: Services, turn: ConversationTurn, body: ResponseBody
) -> Callable[[NewJob], Awaitable[Accepted]]:
    """How a response in a conversation is accepted: together with its turn, or not at all."""
    settings = services.settings

    async def accept(new_job: NewJob) -> Accepted:
        return await services.system_write(  # the new job's turn depends on other tenants
            conversations.begin_turn,
            turn,
            new_job,
            num_items=1 if isinstance(body.input, str) else len(body.input),
            ttl_seconds=settings.conversation_ttl_seconds,
            max_bytes=settings.max_conversation_bytes_per_tenant,
            max_queued_jobs=settings.max_queued_jobs,
            max_poison_jobs_per_hour=settings.max_poison_jobs_per_hour,
        )

    return accept
