"""The requests of lm-evaluation-harness's local-completions: prompts of token ids, scored by their echo."""

from typing import Any

import httpx
import pytest

from tests.conformance.harness import Served

CONTEXT, CONTINUATION = [72, 105, 32], [116, 104, 101, 114, 101]


def ask(served: Served, **fields: Any) -> dict[str, Any]:
    body = {"model": "test-model", "temperature": 0, "seed": 1234} | fields
    answer = httpx.post(f"{served.server.url}/v1/completions", json=body, timeout=30)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


@pytest.mark.parametrize("max_tokens", [0, 1])
@pytest.mark.parametrize("num_prompts", [1, 3])
def test_loglikelihood(served: Served, max_tokens: int, num_prompts: int) -> None:
    """As TemplateAPI sends it and LocalCompletionsAPI.parse_logprobs reads it."""
    prompts = [CONTEXT + CONTINUATION] * num_prompts
    answer = ask(served, prompt=prompts, max_tokens=max_tokens, logprobs=1, echo=True)
    assert [choice["index"] for choice in answer["choices"]] == list(range(num_prompts))
    for choice in answer["choices"]:
        logprobs = choice["logprobs"]
        end = len(logprobs["token_logprobs"]) - max_tokens
        assert end == len(CONTEXT + CONTINUATION)
        assert logprobs["token_logprobs"][0] is None
        scored = logprobs["token_logprobs"][len(CONTEXT) : end]
        tops = logprobs["top_logprobs"][len(CONTEXT) : end]
        assert len(scored) == len(CONTINUATION)
        assert all(value <= 0 for value in scored)
        assert all(max(top.values()) >= value for top, value in zip(tops, scored, strict=True))
        assert len(logprobs["tokens"]) == len(logprobs["text_offset"]) == len(logprobs["token_logprobs"])
        assert choice["text"].startswith(bytes(CONTEXT + CONTINUATION).decode())
    assert answer["usage"]["prompt_tokens"] == num_prompts * len(CONTEXT + CONTINUATION)


def test_one_list_of_token_ids_is_one_prompt(served: Served) -> None:
    answer = ask(served, prompt=CONTEXT + CONTINUATION, max_tokens=1, logprobs=5, echo=True)
    assert len(answer["choices"]) == 1
    assert len(answer["choices"][0]["logprobs"]["tokens"]) == len(CONTEXT + CONTINUATION) + 1


def test_generate_until(served: Served) -> None:
    answer = ask(served, prompt=[CONTEXT, CONTINUATION], max_tokens=12, stop=["\n\n", "</s>"])
    assert [choice["finish_reason"] for choice in answer["choices"]] == ["length", "length"]
    assert all(choice["text"] and choice["logprobs"] is None for choice in answer["choices"])


def test_the_echo_is_what_was_asked_for_in_text(served: Served) -> None:
    [choice] = ask(served, prompt="Hi there", max_tokens=0, logprobs=1, echo=True)["choices"]
    assert choice["text"] == "Hi there"
    assert choice["logprobs"]["token_logprobs"][0] is None
    assert len(choice["logprobs"]["tokens"]) == len("Hi there")
