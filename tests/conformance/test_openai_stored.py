"""Chat completions with store=true through the unmodified SDK: kept, listed in pages, labelled, deleted."""

from typing import Any

import openai
import pytest

from tests.conformance.harness import MESSAGES, Served

MODEL = "test-model"


def ask(served: Served, **fields: Any) -> Any:
    return served.client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=2, **fields)


def test_only_what_was_stored_is_listed_in_pages_and_by_label(served: Served) -> None:
    stored = [ask(served, store=True, metadata={"number": str(number)}) for number in range(3)]
    ask(served, store=False)
    ids = [completion.id for completion in stored]
    listed = served.client.chat.completions.list(limit=2)
    assert [completion.id for completion in listed] == ids, "the SDK follows the pages by itself"
    newest_first = served.client.chat.completions.list(order="desc", model=MODEL)
    assert [completion.id for completion in newest_first] == ids[::-1]
    labelled = list(served.client.chat.completions.list(metadata={"number": "1"}))
    assert [completion.id for completion in labelled] == [ids[1]]
    assert labelled[0].choices[0].message.content == stored[1].choices[0].message.content


def test_one_is_read_labelled_and_deleted(served: Served) -> None:
    completion = ask(served, store=True)
    chats = served.client.chat.completions
    assert chats.retrieve(completion.id).choices == completion.choices
    assert chats.update(completion.id, metadata={"a": "b"}).metadata == {"a": "b"}
    [message] = chats.messages.list(completion.id)
    assert (message.role, message.content) == ("user", "Hi")
    assert chats.delete(completion.id).deleted
    with pytest.raises(openai.NotFoundError):
        chats.retrieve(completion.id)


def test_messages_come_in_pages(served: Served) -> None:
    conversation: Any = [{"role": "user", "content": str(number)} for number in range(5)]
    completion = served.client.chat.completions.create(model=MODEL, messages=conversation, max_tokens=2, store=True)
    pages = served.client.chat.completions.messages.list(completion.id, limit=2, order="desc")
    assert [message.content for message in pages] == ["4", "3", "2", "1", "0"]


def test_what_was_not_stored_is_not_found(served: Served) -> None:
    completion = ask(served)
    with pytest.raises(openai.NotFoundError) as raised:
        served.client.chat.completions.retrieve(completion.id)
    assert raised.value.code == "job_not_found"
