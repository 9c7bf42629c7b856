"""What tokens are worth in bytes: joined, they are the text, and half characters keep theirs."""

import random

import pytest
from llguidance import LLTokenizer

from domain.requests import TokenChunk, TokenLogprob
from tests.tokenizers_of_all_kinds import TOKENIZERS, random_tokens, sentencepiece_tokenizer
from text.grammars import make_grammar_tokenizer
from text.tokenizers import TokenKind, TokenTable, as_text

#: What one of their tokens adds depends on its neighbours, or not on the byte-level alphabet alone. No language model
#: that we know of has these.
ODD = {"suffixed", "ctc", "byte-level in a sequence"}
READ_BY_LLGUIDANCE = ("byte-level", "llama", "gemma", "celeriac-mini")


@pytest.mark.parametrize("name", sorted(set(TOKENIZERS) - ODD))
@pytest.mark.parametrize("skip_special_tokens", [True, False])
def test_the_bytes_of_all_tokens_joined_are_the_text(name: str, skip_special_tokens: bool) -> None:
    tokenizer = TOKENIZERS[name]
    generator = random.Random(name)
    table = TokenTable(tokenizer)
    if name == "wordpiece" and not skip_special_tokens:
        pytest.skip("it puts spaces around special tokens, too; they belong to no token")
    num_compared = 0
    for _ in range(300):
        token_ids = random_tokens(tokenizer, generator)
        token_ids = [token_id for token_id in token_ids if tokenizer.id_to_token(token_id) is not None]
        text = tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)
        pieces = table.pieces(token_ids, skip_special_tokens=skip_special_tokens)
        joined = b"".join(piece.added for piece in pieces)
        try:
            assert joined.decode() == text
        except UnicodeDecodeError:
            assert "\ufffd" in text
        else:
            num_compared += 1
    assert num_compared > 50


@pytest.mark.parametrize("name", READ_BY_LLGUIDANCE)
def test_the_grammars_library_reads_the_same_bytes(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    size = tokenizer.get_vocab_size()
    table = TokenTable(tokenizer)
    library: LLTokenizer = make_grammar_tokenizer(tokenizer.to_str(), size, [0])
    shown = [token_id for token_id in range(size) if table.shows(token_id)]
    added = tokenizer.get_added_tokens_decoder()
    own = {token_id: table.bytes_of(token_id) for token_id in shown if token_id not in added}
    own = {token_id: spelt for token_id, spelt in own.items() if spelt != b"\xff"}  # which the library keeps for itself
    assert own == {token_id: library.decode_bytes([token_id]) for token_id in own}


def test_byte_tokens_are_one_byte_and_leading_spaces_stay() -> None:
    tokenizer = sentencepiece_tokenizer()
    table = TokenTable(tokenizer)

    def bytes_of(token: str) -> bytes:
        token_id = tokenizer.token_to_id(token)
        assert token_id is not None
        return table.bytes_of(token_id)

    assert bytes_of("<0xF0>") == b"\xf0"
    assert bytes_of("▁the") == b" the"
    assert bytes_of("▁▁") == b"  "
    assert bytes_of("</s>") == b"</s>"
    assert bytes_of("<tool>") == b"<tool>"
    assert table.bytes_of(tokenizer.get_vocab_size()) == b""
    assert table.first_bytes_of(tokenizer.token_to_id("▁the") or 0) == b"the"


def test_bytes_spelt_as_tokens_are_such_only_where_the_decoder_reads_them_so() -> None:
    tokenizer = TOKENIZERS["celeriac-mini"]
    assert all(TokenTable(tokenizer).kind(token_id) is not TokenKind.BYTE for token_id in range(300))


def test_parts_of_characters_are_written_as_the_openai_api_writes_them() -> None:
    assert as_text("é".encode()) == "é"
    assert as_text(b" \xf0\x9f\x92") == " \\xf0\\x9f\\x92"


def test_a_chunk_stored_before_tokens_had_bytes_is_read_with_those_of_its_text() -> None:
    stored = '{"sequence_number":1,"logprobs":[{"token":"é","token_id":5,"logprob":-0.5,"top":[[5,"é",-0.5]]}]}'
    (logprob,) = TokenChunk.model_validate_json(stored).logprobs or ()
    assert logprob.bytes == (0xC3, 0xA9)
    assert logprob.top_bytes == ((0xC3, 0xA9),)
    again = TokenLogprob.model_validate_json(logprob.model_dump_json())
    assert again == logprob
