"""/tokenize, /detokenize, /ping and /version."""

from typing import Any

import httpx
import pytest

from tests.integration.api_harness import ApiServer

TEXT = "Once upon a time, a fox said: é😀"
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": TEXT}]


def post(http: httpx.Client, path: str, **body: Any) -> dict[str, Any]:
    response = http.post(path, json=body)
    assert response.status_code == 200, response.text
    return dict(response.json())


def test_a_text_becomes_tokens_and_tokens_become_the_text(http: httpx.Client) -> None:
    for name in ("prompt", "content"):
        answer = post(http, "/tokenize", **{name: TEXT}, add_special_tokens=False)
        assert answer["count"] == len(answer["tokens"]) > 0
        assert answer["token_strs"] is None
        assert post(http, "/detokenize", tokens=answer["tokens"]) == {"prompt": TEXT}
    names = post(http, "/tokenize", prompt="Once upon", return_token_strs=True)["token_strs"]
    assert "".join(names).endswith("Once upon")


def test_a_chat_has_the_tokens_that_a_completion_counts(http: httpx.Client) -> None:
    answer = post(http, "/tokenize", messages=CHAT)
    counted = post(http, "/v1/responses/input_tokens", model="fake", input=CHAT)
    assert answer["count"] == counted["input_tokens"]
    assert TEXT in post(http, "/detokenize", tokens=answer["tokens"])["prompt"]


def test_nothing_is_no_tokens(http: httpx.Client) -> None:
    assert post(http, "/tokenize", prompt="")["tokens"] == []
    assert post(http, "/detokenize", tokens=[])["prompt"] == ""


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        ("/tokenize", {}, "exactly one of prompt and messages"),
        ("/tokenize", {"prompt": "a", "messages": CHAT}, "exactly one of prompt and messages"),
        ("/tokenize", {"messages": CHAT, "add_special_tokens": True}, "add_special_tokens"),
        ("/tokenize", {"prompt": "a", "model": "nope"}, "nope"),
        ("/tokenize", {"prompt": "a" * 100_000}, "shorten"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": [2**31 - 1]}, "has ids 0 to"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
    ],
)
def test_what_cannot_be_is_named(http: httpx.Client, path: str, body: dict[str, Any], words: str) -> None:
    response = http.post(path, json=body)
    assert response.status_code in (400, 404), response.text
    assert words in response.json()["error"]["message"]


def test_ping_and_version_need_no_key(api: ApiServer) -> None:
    with api.client() as http:
        assert http.get("/ping").json() == http.post("/ping").json() == {"status": "ok"}
        assert http.get("/version").json()["version"]
