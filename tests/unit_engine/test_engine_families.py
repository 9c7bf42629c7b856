"""A chat model stops at the end of its turn even where its configuration names only the end of a text."""

import pytest
from tokenizers import AddedToken

from gpu_worker.engine.families import FAMILIES, turn_end_token_ids
from tests.engine_parts import byte_tokenizer


@pytest.mark.parametrize("model_type", [name for name, family in FAMILIES.items() if family.turn_ends])
def test_the_turn_ends_that_a_tokenizer_has_are_found(model_type: str) -> None:
    tokenizer = byte_tokenizer()
    content = FAMILIES[model_type].turn_ends[-1]
    tokenizer.add_special_tokens([AddedToken(content, special=True)])
    assert turn_end_token_ids(model_type, tokenizer) == {tokenizer.token_to_id(content)}


def test_ordinary_text_that_looks_like_one_ends_nothing() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([AddedToken("<|im_end|>", special=False)])
    assert turn_end_token_ids("qwen2", tokenizer) == frozenset()


def test_an_unknown_family_has_none() -> None:
    assert turn_end_token_ids("falcon", byte_tokenizer()) == frozenset()
