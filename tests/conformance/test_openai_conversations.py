"""Conversations with the unmodified SDK: what belongs to them, in which order, whose they are, how large they get."""

from typing import Any

import openai
import pytest
from openai.types.conversations import ConversationItem as SdkItem
from sqlalchemy import text
from sqlalchemy.orm import Session, sessionmaker

from api.openai import conversation_turns
from dialects.openai_conversations import items_of_turn
from domain.jobs import JobStatus, parse_id, parse_id_of_other
from storage import conversations, tenants
from storage.tables import DEFAULT_TENANT_ID
from tests.integration.api_harness import ApiServer, HandWorker

MODEL = "fake"


@pytest.fixture
def keys(api: ApiServer, session_factory: sessionmaker[Session]) -> tuple[str, str]:
    """Of the default tenant and of another one; from now on both need theirs."""
    with session_factory.begin() as session:
        other = tenants.create_tenant(session, "stranger").id
        keys = tuple(tenants.create_key(session, id_, name="") for id_ in (DEFAULT_TENANT_ID, other))
    api.services.authenticator._is_open = False
    return keys[0], keys[1]


def said(items: Any) -> list[str]:
    """What each item says: the text of a message, the arguments of a call or the output of one."""
    dumped = [item.to_dict() for item in items]
    return [
        item["content"][0]["text"] if item["type"] == "message" else item.get("arguments") or item["output"]
        for item in dumped
    ]


def all_of(client: openai.OpenAI, conversation_id: str) -> list[SdkItem]:
    return list(client.conversations.items.list(conversation_id, order="asc", limit=2))


def ask(client: openai.OpenAI, conversation_id: str, input_: Any, **fields: Any) -> Any:
    return client.responses.create(
        model=MODEL, input=input_, conversation=conversation_id, background=True, max_output_tokens=8, **fields
    )


def test_a_conversation_is_kept_as_it_was_given(client: openai.OpenAI) -> None:
    items: Any = [
        {"role": "developer", "content": "Be kind."},
        {"type": "function_call", "call_id": "c1", "name": "add", "arguments": "{}", "id": "fc_mine"},
        {"type": "function_call_output", "call_id": "c1", "output": "3"},
    ]
    conversation = client.conversations.create(items=items, metadata={"topic": "sums"})
    assert conversation.id.startswith("conv_")
    assert client.conversations.retrieve(conversation.id) == conversation
    assert said(all_of(client, conversation.id)) == ["Be kind.", "{}", "3"]
    more: Any = [{"role": "user", "content": f"{number}"} for number in range(3)]
    added = client.conversations.items.create(conversation.id, items=[*more, items[1]], include=[])
    assert [item.id for item in added.data][0::3] == [added.first_id, added.last_id]
    assert added.last_id != "fc_mine", "each id is of one item"
    newest = client.conversations.items.list(conversation.id, limit=2)
    assert (said(newest.data), newest.has_more) == (["{}", "2"], True)
    assert said(client.conversations.items.list(conversation.id)) == ["{}", "2", "1", "0", "3", "{}", "Be kind."]
    one = client.conversations.items.retrieve("fc_mine", conversation_id=conversation.id)
    assert one.to_dict()["name"] == "add"
    assert client.conversations.items.delete("fc_mine", conversation_id=conversation.id).id == conversation.id
    assert len(all_of(client, conversation.id)) == 6
    changed = client.conversations.update(conversation.id, metadata={"topic": "others"})
    assert (changed.metadata, changed.created_at) == ({"topic": "others"}, conversation.created_at)
    deleted = client.conversations.delete(conversation.id)
    assert (deleted.deleted, deleted.object) == (True, "conversation.deleted")
    for call in (
        lambda: client.conversations.retrieve(conversation.id),
        lambda: client.conversations.delete(conversation.id),
        lambda: client.conversations.items.list(conversation.id),
        lambda: client.conversations.items.retrieve(one.id or "", conversation_id=conversation.id),
        lambda: client.conversations.retrieve("conv_\0"),
    ):
        with pytest.raises(openai.NotFoundError):
            call()


def test_responses_continue_it_and_add_to_it_once(client: openai.OpenAI, hand_worker: HandWorker) -> None:
    conversation = client.conversations.create()
    first = ask(client, conversation.id, "Hi")
    assert first.conversation.id == conversation.id
    job = hand_worker.claim(first.id)
    assert all_of(client, conversation.id) == [], "it has not ended"
    hand_worker.say(job, "Hello")
    hand_worker.finish(job, "Hello")
    second = ask(client, conversation.id, [{"role": "user", "content": "More"}])
    job = hand_worker.claim(second.id)
    assert bytes(job.prompt_token_ids) == b"user: Hi\nassistant: Hello\nuser: More\nassistant: "
    hand_worker.say(job, "Yes")
    hand_worker.finish(job, "Yes")
    for _ in range(2):
        assert said(all_of(client, conversation.id)) == ["Hi", "Hello", "More", "Yes"]
    assert client.responses.retrieve(second.id).status == "completed"
    counted = client.responses.input_tokens.count(model=MODEL, input="So", conversation=conversation.id)
    assert counted.input_tokens == len(b"user: Hi\nassistant: Hello\nuser: More\nassistant: Yes\nuser: So\nassistant: ")


def test_a_response_that_fails_or_is_cancelled_adds_nothing(client: openai.OpenAI, hand_worker: HandWorker) -> None:
    conversation = client.conversations.create()
    cancelled = ask(client, conversation.id, "Hi")
    client.responses.cancel(cancelled.id)
    failed = ask(client, conversation.id, "Hi again")
    hand_worker.finish(hand_worker.claim(failed.id), status=JobStatus.FAILED)
    deleted = ask(client, conversation.id, "And again")
    client.responses.delete(deleted.id)
    assert all_of(client, conversation.id) == []
    kept = ask(client, conversation.id, "Once more")
    hand_worker.run(kept.id, "Here")
    client.responses.delete(kept.id)
    assert said(all_of(client, conversation.id)) == ["Once more", "Here"], "they are the conversation's by now"


def test_one_response_at_a_time(
    client: openai.OpenAI, hand_worker: HandWorker, session_factory: sessionmaker[Session], api: ApiServer
) -> None:
    conversation = client.conversations.create()
    first = ask(client, conversation.id, "Hi")
    for call in (
        lambda: ask(client, conversation.id, "Hi"),
        lambda: client.conversations.items.create(conversation.id, items=[{"role": "user", "content": "x"}]),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            call()
        assert (caught.value.code, caught.value.param) == ("conversation_locked", "conversation")
    retried = ask(client, conversation.id, "Hi", extra_headers={"x-stainless-retry-count": "1"})
    assert retried.id == first.id, "the retry of a request whose answer was lost is not another turn"
    hand_worker.run(first.id, "Hello")
    assert said(all_of(client, conversation.id)) == ["Hi", "Hello"]
    retried = ask(client, conversation.id, "Hi", extra_headers={"x-stainless-retry-count": "1"})
    assert retried.id == first.id
    keyed = [ask(client, conversation.id, "Key", extra_headers={"idempotency-key": "k"}) for _ in range(2)]
    assert keyed[0].id == keyed[1].id
    hand_worker.run(keyed[0].id, "Lock")
    assert said(all_of(client, conversation.id)) == ["Hi", "Hello", "Key", "Lock"]
    with session_factory.begin() as session:
        queued = session.scalar(text("SELECT count(*) FROM jobs WHERE status = 'queued'"))
        loads = session.scalar(text("SELECT sum(num_queued) FROM tenant_load"))
    assert (queued, loads) == (0, 0), "what was refused has left nothing"


def test_nobody_else_sees_or_continues_it(client: openai.OpenAI, keys: tuple[str, str]) -> None:
    owner, stranger = (client.with_options(api_key=key) for key in keys)
    item: Any = {"role": "user", "content": "secret", "id": "msg_1"}
    conversation = owner.conversations.create(items=[item])
    for call in (
        lambda: stranger.conversations.retrieve(conversation.id),
        lambda: stranger.conversations.update(conversation.id, metadata={}),
        lambda: stranger.conversations.delete(conversation.id),
        lambda: stranger.conversations.items.list(conversation.id),
        lambda: stranger.conversations.items.retrieve("msg_1", conversation_id=conversation.id),
        lambda: stranger.conversations.items.delete("msg_1", conversation_id=conversation.id),
        lambda: stranger.conversations.items.create(conversation.id, items=[{"role": "user", "content": "x"}]),
        lambda: ask(stranger, conversation.id, "Hi"),
    ):
        with pytest.raises(openai.NotFoundError):
            call()
    assert said(all_of(owner, conversation.id)) == ["secret"]


def test_what_is_wrong_is_refused_with_its_field(client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    item: Any = {"role": "user", "content": "x"}
    conversation = client.conversations.create(items=[item | {"id": "a\0b"}])
    assert "\0" not in all_of(client, conversation.id)[0].id  # type: ignore[operator]
    for body, param in (
        ({"items": [item] * 21}, "items"),
        ({"items": [{"type": "odd"}]}, "items.0.type"),
        ({"metadata": {"k": 1}}, "metadata.k"),
        ({"metadata": {"k": "v" * 513}}, "metadata.k"),
        ({"odd": 1}, "odd"),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            client.post("/conversations", body=body, cast_to=object)
        assert caught.value.param == param, body
    refused: Any = {"previous_response_id": "resp_" + "0" * 26}
    with pytest.raises(openai.BadRequestError, match="only one"):
        ask(client, conversation.id, "Hi", **refused)
    with pytest.raises(openai.BadRequestError, match="after is"):
        client.conversations.items.list(conversation.id, after="nowhere\0")
    monkeypatch.setattr(conversations, "MAX_ITEMS", 2)
    with pytest.raises(openai.BadRequestError, match="more than 2"):
        client.conversations.items.create(conversation.id, items=[item, item])
    with pytest.raises(openai.BadRequestError, match="more than 2"):
        ask(client, conversation.id, [item, item])
    monkeypatch.setattr(conversations, "MAX_BYTES", 20)
    with pytest.raises(openai.BadRequestError, match="bytes"):
        ask(client, conversation.id, "x")


def test_conversations_take_a_limited_room_and_go_when_they_are_not_used(
    client: openai.OpenAI, api: ApiServer, session_factory: sessionmaker[Session]
) -> None:
    settings = api.services.settings
    api.services.settings = settings.model_copy(
        update={"max_conversation_bytes_per_tenant": 2 * conversations.FLOOR_BYTES}
    )
    first, second = client.conversations.create(), client.conversations.create()
    with pytest.raises(openai.RateLimitError, match="your conversations"):
        client.conversations.create()
    with pytest.raises(openai.RateLimitError, match="your conversations"):
        client.conversations.items.create(first.id, items=[{"role": "user", "content": "x"}])
    client.conversations.delete(second.id)
    client.conversations.items.create(first.id, items=[{"role": "user", "content": "x"}])
    with session_factory.begin() as session:
        assert conversations.prune(session) == 0
        session.execute(text("UPDATE conversations SET expires_at = now() - interval '1 second'"))
    with pytest.raises(openai.NotFoundError):
        client.conversations.retrieve(first.id)
    with session_factory.begin() as session:
        assert conversations.prune(session) == 1
        assert session.scalar(text("SELECT count(*) FROM conversation_items")) == 0


def test_a_turn_is_kept_until_its_items_are_added(
    client: openai.OpenAI, hand_worker: HandWorker, session_factory: sessionmaker[Session]
) -> None:
    conversation = client.conversations.create()
    response = ask(client, conversation.id, "Hi")
    hand_worker.run(response.id, "Hello")
    seconds_kept = text("SELECT extract(epoch FROM prune_at - finished_at)::int FROM jobs")
    with session_factory.begin() as session:
        assert session.scalar(seconds_kept) == 2_592_000
    assert said(all_of(client, conversation.id)) == ["Hi", "Hello"]
    with session_factory.begin() as session:
        assert session.scalar(seconds_kept) == 86_400
        id_, job_id = parse_id_of_other(conversation.id, "conv"), parse_id(response.id)
        record = conversations.get(session, id_, DEFAULT_TENANT_ID)
        assert record is not None
        conversations.end_turn(session, id_, record.conversation.tenant_id, job_id, [{"id": "x", "type": "message"}])
    assert said(all_of(client, conversation.id)) == ["Hi", "Hello"], "whoever comes late adds nothing"


def test_a_turn_whose_job_cannot_be_read_is_closed_and_stops_nobody(
    client: openai.OpenAI, hand_worker: HandWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    created = [client.conversations.create().id for _ in range(2)]
    asked = [ask(client, id_, "Hi").id for id_ in created]
    for id_ in asked:
        hand_worker.run(id_, "Hello")

    def broken(*_: Any) -> int:
        raise KeyError("odd")

    monkeypatch.setattr(conversation_turns, "size_of", broken)
    client.responses.delete(asked[0])
    for id_ in created:
        assert client.conversations.retrieve(id_).id == id_
        assert said(all_of(client, id_)) == []
        hand_worker.run(ask(client, id_, "More").id, "Yes")


@pytest.mark.parametrize("is_raised", [True, False])
def test_a_turn_whose_items_are_unusable_is_closed_without_them(
    client: openai.OpenAI, hand_worker: HandWorker, monkeypatch: pytest.MonkeyPatch, *, is_raised: bool
) -> None:
    def broken(*args: Any) -> list[dict[str, Any]]:
        if is_raised:
            raise ValueError("odd")
        return [*items_of_turn(*args), {"id": "x", "type": "odd"}, {"id": "y", "type": "message", "role": 10**30}]

    monkeypatch.setattr(conversation_turns, "items_of_turn", broken)
    conversation = client.conversations.create()
    hand_worker.run(ask(client, conversation.id, "Hi").id, "Hello")
    assert client.conversations.retrieve(conversation.id) == conversation
    assert said(all_of(client, conversation.id)) == ([] if is_raised else ["Hi", "Hello"])
    hand_worker.run(ask(client, conversation.id, "More").id, "Yes")


def test_a_conversation_can_be_deleted_though_its_turn_cannot_be_closed(
    client: openai.OpenAI, hand_worker: HandWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conversation_turns, "_end_turn", None)
    conversation = client.conversations.create()
    hand_worker.run(ask(client, conversation.id, "Hi").id, "Hello")
    assert client.conversations.delete(conversation.id).deleted


def test_an_item_that_cannot_be_read_is_named(client: openai.OpenAI, session_factory: sessionmaker[Session]) -> None:
    conversation = client.conversations.create(
        items=[{"role": "user", "content": "Hi"}, {"role": "user", "content": "Yo"}]
    )
    id_ = all_of(client, conversation.id)[1].id
    with session_factory.begin() as session:
        spoil = text(
            "UPDATE conversation_items SET item = json_build_object('id', item_id, 'type', 'odd') WHERE item_id = :id"
        )
        session.execute(spoil, {"id": id_})
    with pytest.raises(openai.BadRequestError, match=f"item '{id_}' of the conversation cannot be read; delete it"):
        ask(client, conversation.id, "So")
    client.conversations.items.delete(id_ or "", conversation_id=conversation.id)
    ask(client, conversation.id, "So")
