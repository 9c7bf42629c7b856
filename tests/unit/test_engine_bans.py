"""What a job's parameters forbid: tokens, all but some tokens, and words of several tokens."""

from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from domain.requests import SamplingParams
from gpu_worker.engine.bans import NO_BANS, bans_of
from gpu_worker.engine.sampling import GrammarFailed, sample
from tests.engine_parts import TOKENIZER, extend, make_sequence

VOCAB_SIZE = TOKENIZER.get_vocab_size()


def ids(text: str) -> list[int]:
    token_ids: list[int] = TOKENIZER.encode(text).ids
    return token_ids


def drawn_after(output: str, *, prompt: str = "p", **params: Any) -> str:
    """The text of the greedy token where the likeliest are x, y and z, in this order."""
    sequence = make_sequence(ids(prompt), **params)
    extend(sequence, ids(output))
    logits = np.zeros((1, VOCAB_SIZE), np.float32)
    logits[0, ids("xyz")] = [9.0, 8.0, 7.0]
    [drawn] = sample(logits, [sequence])
    assert drawn.token_id is not None
    text: str = TOKENIZER.decode([drawn.token_id])
    return text


@pytest.mark.parametrize(
    ("output", "params", "expected"),
    [
        ("", {}, "x"),
        ("", {"bad_words": ["x"]}, "y"),
        ("", {"bad_words": ["x", " y"]}, "z"),
        ("a", {"bad_words": ["ax"]}, "y"),
        ("b", {"bad_words": ["ax"]}, "x"),
        ("", {"bad_words": ["ax"]}, "x"),
        ("aba", {"bad_words": ["bax", "cax"]}, "y"),
        ("a", {"bad_words": ["ax", "ay"]}, "z"),
        ("a", {"bad_words": ["ax"], "bad_token_ids": ids("y")}, "z"),
        ("", {"allowed_token_ids": ids("zy")}, "y"),
        ("a", {"allowed_token_ids": ids("zy"), "bad_words": ["ay"]}, "z"),
    ],
)
def test_what_is_banned_is_not_drawn(output: str, params: dict[str, Any], expected: str) -> None:
    assert drawn_after(output, **params) == expected


def test_a_word_that_the_prompt_begins_is_none() -> None:
    assert drawn_after("", prompt="a", bad_words=["ax"]) == "x"


def test_a_text_without_a_token_left_fails_alone() -> None:
    with pytest.raises(GrammarFailed, match="ban every token"):
        drawn_after("a", allowed_token_ids=ids("x"), bad_words=["ax"])


def test_a_word_is_banned_with_and_without_a_space_before_it() -> None:
    vocab = {"a": 0, "b": 1, "Ġ": 2, "ab": 3, "Ġab": 4, "Ġa": 5}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[("a", "b"), ("Ġ", "ab")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    for word in ("ab", " ab"):
        bans = bans_of(SamplingParams(bad_words=(word,)), tokenizer, len(vocab))
        assert bans.token_ids == (3, 4)
        assert not bans.needs_mask
    assert bans_of(SamplingParams(bad_words=("ab",)), tokenizer, 4).token_ids == (3,)  # the model has no more
    assert bans_of(SamplingParams(), tokenizer, len(vocab)) is NO_BANS


def test_an_end_token_that_is_not_allowed_is_known() -> None:
    bans = bans_of(SamplingParams(allowed_token_ids=(31, 40, 63)), TOKENIZER, VOCAB_SIZE)
    assert [token_id for token_id in range(80) if bans.allow(token_id)] == [31, 40, 63]
    assert NO_BANS.allow(5)
