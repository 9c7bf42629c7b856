"""Compaction with the unmodified SDK: what it gives goes on in place of the conversation, and nobody can make it up."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import openai
import pytest
from sqlalchemy import select
from sqlalchemy.orm import Session, sessionmaker

from dialects.openai_compaction import TASK
from dialects.openai_response_items import SUMMARISED
from domain.jobs import external_id
from domain.seals import opened, seal
from storage import tenants
from storage.tables import DEFAULT_TENANT_ID, Job
from tests.integration.api_harness import ApiServer, HandWorker
from tests.waiting import wait_until

MODEL = "large"  # its context has room for the task


def compact(client: openai.OpenAI, worker: HandWorker, summary: str, **fields: Any) -> tuple[Any, str]:
    """The answer, and the prompt that the model has got."""
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(client.responses.compact, model=MODEL, **fields)

        def queued() -> list[Any]:
            with worker.sessions() as session:
                return list(session.scalars(select(Job.id).where(Job.status == "queued")))

        wait_until(lambda: queued() or asked.done())
        if asked.done():
            return asked.result(), ""
        job = worker.claim(external_id(queued()[0]))
        worker.say(job, summary)
        worker.finish(job, summary)
        return asked.result(), bytes(job.prompt_token_ids).decode()


def test_a_compacted_conversation_goes_on(client: openai.OpenAI, hand_worker: HandWorker) -> None:
    items: Any = [
        {"role": "user", "content": "Add 1 and 2"},
        {"type": "function_call", "call_id": "c", "name": "add", "arguments": '{"a": 1, "b": 2}'},
        {"type": "function_call_output", "call_id": "c", "output": "3"},
        {"role": "assistant", "content": "It is 3."},
    ]
    answer, prompt = compact(client, hand_worker, " It was 3. ", input=items, instructions="Be exact.")
    assert prompt.startswith(f"user: {TASK}")
    assert "system: Be exact.\nuser: Add 1 and 2\nassistant: \n[calls add: {" in prompt
    assert (answer.object, answer.usage.input_tokens) == ("response.compaction", len(prompt))
    kept = [item.to_dict(warnings=False) for item in answer.output]
    assert [item["type"] for item in kept] == ["message", "compaction"]
    assert kept[0]["content"] == [{"type": "input_text", "text": "Add 1 and 2"}]
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(answer.id)
    ask: Any = {"model": MODEL, "background": True, "max_output_tokens": 8}
    expected = f"user: Add 1 and 2\nuser: {SUMMARISED}It was 3.\nuser: Twice?\nassistant: "
    twice: Any = {"role": "user", "content": "Twice?"}
    second = client.responses.create(input=[*kept, twice], **ask)
    assert bytes(hand_worker.claim(second.id).prompt_token_ids).decode() == expected
    shown = client.responses.input_items.list(second.id, order="asc").data
    assert [item.to_dict()["type"] for item in shown] == ["message", "compaction", "message"]
    conversation = client.conversations.create(items=kept)
    third = client.responses.create(input="Twice?", conversation=conversation.id, **ask)
    assert bytes(hand_worker.claim(third.id).prompt_token_ids).decode() == expected
    _, prompt = compact(client, hand_worker, "Again.", input=[*kept, twice])
    assert f"user: {SUMMARISED}It was 3.\nuser: Twice?" in prompt


def test_what_was_not_sealed_here_is_refused(
    client: openai.OpenAI, api: ApiServer, session_factory: sessionmaker[Session]
) -> None:
    with session_factory.begin() as session:
        other = tenants.create_tenant(session, "other").id
        keys = [tenants.seal_key(session, id_) for id_ in (DEFAULT_TENANT_ID, other)]
        assert tenants.seal_key(session, other) == keys[1]
    assert opened(seal("a\0é", keys[0]), keys[0]) == "a\0é"
    good = seal("Hi", keys[0])
    kept = client.conversations.create()
    for content in (seal("Hi", keys[1]), good[:-4], good + "AAAA", good[:12] + "AAAA" + good[16:], "gAAAAA", "", "é"):
        for item in ({"encrypted_content": content}, {}):
            asked: Any = [{"type": "compaction"} | item]
            with pytest.raises(openai.BadRequestError) as caught:
                client.responses.create(model=MODEL, input=asked)
            assert caught.value.param == "input.0.encrypted_content"
            for keep in (client.conversations.create, partial(client.conversations.items.create, kept.id)):
                with pytest.raises(openai.BadRequestError, match="unchanged") as caught:
                    keep(items=asked)
                assert caught.value.param == "items.0.encrypted_content"
    assert client.conversations.create(items=[{"type": "compaction", "encrypted_content": good}]).id
    assert not list(client.conversations.items.list(kept.id))
    with pytest.raises(openai.BadRequestError, match="nothing to compact"):
        client.responses.compact(model=MODEL)


def test_a_model_that_writes_nothing_has_not_compacted(client: openai.OpenAI, hand_worker: HandWorker) -> None:
    with pytest.raises(openai.BadRequestError, match="no summary"):
        compact(client, hand_worker, " ", input="Hi")
