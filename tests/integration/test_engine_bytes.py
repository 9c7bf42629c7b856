"""Byte for byte through the engine: text and logprobs of tokenizers that write characters as single bytes."""

from typing import Any

import pytest
from tokenizers import Tokenizer

from gpu_worker.engine.backends.transformers import build_engine
from gpu_worker.engine.engine import Engine
from tests.engine_driver import CPU, Finished, make_add, make_spec, run, run_alone, tiny_model
from tests.engine_parts import byte_tokenizer
from tests.tokenizers_of_all_kinds import GEMMA_DECODER, sentencepiece_tokenizer

TOKENIZERS = {
    "byte-level": byte_tokenizer(),
    "llama": sentencepiece_tokenizer(),
    "gemma": sentencepiece_tokenizer(GEMMA_DECODER),
}
OUTPUTS: list[tuple[dict[str, Any], str]] = [
    ({"regex": "a𐍈𐍈𐍈!"}, "a𐍈𐍈𐍈!"),
    ({"choices": ["é😀日本👩‍👩‍👧"]}, "é😀日本👩‍👩‍👧"),
    ({"choices": ["the 日本 a"]}, "the 日本 a"),
    ({"json_schema": {"const": "日本𐍈"}}, '"日本𐍈"'),
]


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return TOKENIZERS[request.param]


@pytest.fixture
def engine(tokenizer: Tokenizer) -> Engine:
    return build_engine(make_spec(), tiny_model(), tokenizer, CPU)


def joined(finished: Finished) -> bytes:
    entries: list[Any] = list(finished.logprobs)
    return b"".join(bytes(entry["bytes"]) for entry in entries)


@pytest.mark.parametrize(("output", "text"), OUTPUTS)
def test_structured_output_and_its_logprobs_are_whole(
    engine: Engine, tokenizer: Tokenizer, output: dict[str, Any], text: str
) -> None:
    prompt = tokenizer.encode("a", add_special_tokens=False).ids
    finished = run_alone(engine, make_add("job", prompt, structured_output=output, logprobs=20, max_tokens=100))
    assert finished.text == text
    assert joined(finished) == text.encode()


def test_any_text_has_the_bytes_of_its_tokens(engine: Engine, tokenizer: Tokenizer) -> None:
    """A random model draws halves of characters in plenty."""
    prompt = tokenizer.encode("a", add_special_tokens=False).ids
    jobs = [make_add(str(seed), prompt, seed=seed, temperature=1.0, logprobs=0, max_tokens=40) for seed in range(20)]
    collected = run(engine, jobs)
    for job in jobs:
        finished = collected.sequences[job.job_id, 0]
        token_ids = [token_id for token_id in finished.token_ids if token_id < tokenizer.get_vocab_size()]
        assert tokenizer.decode(prompt) + finished.text == tokenizer.decode([*prompt, *token_ids])
    assert any("\ufffd" in finished.text for finished in collected.sequences.values())


def test_alternatives_and_the_prompt_have_bytes_too(engine: Engine, tokenizer: Tokenizer) -> None:
    prompt = tokenizer.encode("日本", add_special_tokens=False).ids
    finished = run_alone(engine, make_add("job", prompt, prompt_logprobs=20, logprobs=20, max_tokens=3))
    scored: list[Any] = [entry for entry in finished.prompt_logprobs or () if entry is not None]
    assert b"".join(bytes(entry["bytes"]) for entry in scored).endswith("日本".encode()[1:])
    for entry in [*scored, *finished.logprobs]:
        assert len(entry["top_bytes"]) == len(entry["top"]) == 20
        names = {token_id: bytes(utf8) for (token_id, _, _), utf8 in zip(entry["top"], entry["top_bytes"], strict=True)}
        assert all(name for token_id, name in names.items() if tokenizer.id_to_token(token_id) is not None)
        assert len({name for name in names.values() if len(name) == 1}) > 5
