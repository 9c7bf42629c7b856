"""Text leaves the engine in whole characters, in constant time per token, and never with a part of a stop string."""

import time
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from gpu_worker.engine.detokenizer import MAX_INCOMPLETE, REPLACEMENT, Detokenizer, StopMatcher, TextStream
from tests.engine_parts import byte_tokenizer

TOKENIZER = byte_tokenizer()
BYTE_TOKENS = st.lists(st.integers(1, 256), max_size=80)


def pieces_of(token_ids: list[int], prompt: list[int] | None = None) -> list[str]:
    detokenizer = Detokenizer(TOKENIZER, prompt or [])
    return [detokenizer.push(token_id) for token_id in token_ids]


def without_incomplete_end(text: str) -> str:
    kept = text.rstrip(REPLACEMENT)
    return text[: max(len(kept), len(text) - MAX_INCOMPLETE)]


@given(text=st.text(max_size=60))
def test_every_character_comes_out_whole_and_with_its_last_byte(text: str) -> None:
    token_ids = TOKENIZER.encode(text).ids
    pieces = pieces_of(token_ids)
    sent = ""
    for number, piece in enumerate(pieces, start=1):
        sent += piece
        assert sent == TOKENIZER.decode(token_ids[:number]).rstrip(REPLACEMENT) or REPLACEMENT in text
    assert sent == without_incomplete_end(text)


@given(token_ids=BYTE_TOKENS)
def test_broken_utf8_gives_the_text_of_decoding_all_at_once(token_ids: list[int]) -> None:
    assert "".join(pieces_of(token_ids)) == without_incomplete_end(TOKENIZER.decode(token_ids))


@given(prompt=BYTE_TOKENS, token_ids=BYTE_TOKENS)
def test_no_token_makes_it_raise_whatever_the_prompt_ends_with(prompt: list[int], token_ids: list[int]) -> None:
    pieces_of([*token_ids, 0, 319, 5], prompt)  # the end token, and an id that no text has


def test_half_a_character_waits() -> None:
    token_ids = TOKENIZER.encode("é€🙂").ids
    assert pieces_of(token_ids) == ["", "é", "", "", "€", "", "", "", "🙂"]


def test_special_tokens_have_no_text() -> None:
    assert pieces_of([0, *TOKENIZER.encode("a").ids, 0]) == ["", "a", ""]


def test_the_space_before_the_first_word_survives() -> None:
    """A decoder of sentencepiece drops it at the start of a text; a continued prompt is no start."""
    tokenizer = Tokenizer(models.BPE(vocab={"▁one": 0, "▁two": 1}, merges=[]))
    tokenizer.decoder = decoders.Metaspace()
    detokenizer = Detokenizer(tokenizer, [0])
    assert [detokenizer.push(1), detokenizer.push(0)] == [" two", " one"]


def test_a_long_run_of_half_characters_costs_no_more_per_token() -> None:
    """Decoding all that waits again for every token would let one job slow its neighbours more and more."""
    detokenizer = Detokenizer(TOKENIZER)
    lead_byte = TOKENIZER.encode("€").ids[0]
    seconds = []
    for _ in range(4):
        started = time.process_time()
        for _ in range(2000):
            detokenizer.push(lead_byte)
        seconds.append(time.process_time() - started)
    assert seconds[-1] < 3 * seconds[0]


STOPS = st.lists(st.text(alphabet="ab", min_size=1, max_size=4), min_size=1, max_size=3)


def cut_at_first_stop(text: str, stops: list[str]) -> tuple[str, bool]:
    for end in range(1, len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)], True
    return text, False


@given(text=st.text(alphabet="abc", max_size=40), stops=STOPS, cuts=st.lists(st.integers(0, 40)))
def test_a_stop_string_is_found_across_any_pieces_and_never_sent(text: str, stops: list[str], cuts: list[int]) -> None:
    matcher = StopMatcher(stops)
    bounds = [0, *sorted(cut for cut in cuts if cut <= len(text)), len(text)]
    sent, is_stopped = "", False
    for start, stop in pairwise(bounds):
        if not is_stopped:
            piece, is_stopped = matcher.push(text[start:stop])
            sent += piece
            assert cut_at_first_stop(text, stops)[0].startswith(sent)
    if not is_stopped:
        sent += matcher.flush()
    assert (sent, is_stopped) == cut_at_first_stop(text, stops)


def test_only_what_may_become_a_stop_string_is_held_back() -> None:
    matcher = StopMatcher(["END"])
    assert matcher.push("the E") == ("the ", False)
    assert matcher.push("N") == ("", False)
    assert matcher.push("d") == ("ENd", False)
    assert matcher.flush() == ""


def test_text_held_back_is_sent_at_the_end() -> None:
    matcher = StopMatcher(["###"])
    assert matcher.push("so ##") == ("so ", False)
    assert matcher.flush() == "##"


def test_stop_strings_are_passed_over_while_the_text_must_go_on() -> None:
    stream = TextStream(TOKENIZER, [], ["b"])
    a, b = TOKENIZER.encode("ab").ids
    assert [stream.push(token, may_stop=False) for token in (a, b, a)] == [("a", False), ("b", False), ("a", False)]
    assert stream.push(b, may_stop=True) == ("", True)


@pytest.mark.parametrize("stop", ["€", "x€y"])
def test_a_stop_string_is_found_whose_characters_come_byte_by_byte(stop: str) -> None:
    stream = TextStream(TOKENIZER, [], [stop])
    pushed = [stream.push(token, may_stop=True) for token in TOKENIZER.encode("ax€yb").ids]
    sent = ""
    for text, is_stopped in pushed:
        sent += text
        if is_stopped:
            break
    assert sent == "ax€yb".split(stop)[0]
