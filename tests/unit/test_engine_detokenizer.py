"""Text leaves the engine as `decode` of the whole has it, in constant time per token, and never with a part of a stop
string."""

import random
import time
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from tokenizers.decoders import DecodeStream

from domain.jobs import FinishReason
from domain.requests import SamplingParams
from gpu_worker.engine.detokenizer import REPLACEMENT, Detokenizer, StopMatcher, TextStream
from gpu_worker.engine.scheduler import ModelLimits, make_engine_job
from gpu_worker.engine.sequence import Grammars
from gpu_worker.engine_process.frames import AddJob
from tests.engine_parts import byte_tokenizer
from tests.tokenizers_of_all_kinds import TOKENIZERS, random_tokens, sentencepiece_tokenizer

TOKENIZER = byte_tokenizer()
BYTE_FALLBACK = sentencepiece_tokenizer()
BYTE_TOKENS = st.lists(st.integers(1, 256), max_size=80)
NUM_FUZZED = 1000  # sequences per tokenizer; more than 10,000 in all


def pieces_of(token_ids: list[int], prompt: list[int] | None = None) -> list[str]:
    detokenizer = Detokenizer(TOKENIZER, prompt or [])
    return [detokenizer.push(token_id) for token_id in token_ids]


def id_of(token: str) -> int:
    """Of the tokenizer with byte fallback."""
    token_id = BYTE_FALLBACK.token_to_id(token)
    assert token_id is not None
    return token_id


def byte_tokens(text: str) -> list[int]:
    return [id_of(f"<0x{byte:02X}>") for byte in text.encode()]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_text_is_that_of_decoding_all_at_once_wherever_it_is_cut_or_resumed(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    generator = random.Random(name)
    for _ in range(NUM_FUZZED):
        token_ids = random_tokens(tokenizer, generator)
        going = Detokenizer(tokenizer)
        sent = ""
        for number in range(len(token_ids) + 1):
            successor = Detokenizer(tokenizer)
            assert "".join(map(successor.push, token_ids[:number])) == sent
            assert sent + successor.flush() == tokenizer.decode(token_ids[:number]), token_ids[:number]
            sent += going.push(token_ids[number]) if number < len(token_ids) else ""


@pytest.mark.parametrize("name", TOKENIZERS)
def test_behind_a_prompt_the_text_is_what_it_adds_to_the_prompts(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    generator = random.Random(name)
    end = tokenizer.encode("a", add_special_tokens=False).ids
    for _ in range(NUM_FUZZED // 10):
        prompt = random_tokens(tokenizer, generator) + end
        token_ids = random_tokens(tokenizer, generator)
        detokenizer = Detokenizer(tokenizer, prompt)
        text = "".join(map(detokenizer.push, token_ids)) + detokenizer.flush()
        assert tokenizer.decode(prompt) + text == tokenizer.decode(prompt + token_ids), (prompt, token_ids)


@given(text=st.text(max_size=60))
def test_every_character_comes_out_whole_and_with_its_last_byte(text: str) -> None:
    token_ids = TOKENIZER.encode(text).ids
    sent = ""
    for number, piece in enumerate(pieces_of(token_ids), start=1):
        sent += piece
        assert sent == TOKENIZER.decode(token_ids[:number]).rstrip(REPLACEMENT) or REPLACEMENT in text
    assert sent == text


@pytest.mark.parametrize("text", ["the cat a", "é", "𐍈 𐍈", "𐍈𐍈 a", "😀😀 日本 the", "�a"])
def test_the_pieces_of_real_text_join_to_those_of_the_tokenizers_own_stream(text: str) -> None:
    token_ids = [*BYTE_FALLBACK.encode(text).ids, id_of("▁the")]
    stream = DecodeStream(skip_special_tokens=True)
    detokenizer = Detokenizer(BYTE_FALLBACK)
    expected = "".join(stream.step(BYTE_FALLBACK, token_id) or "" for token_id in token_ids)
    assert "".join(map(detokenizer.push, token_ids)) == expected == f"{text} the"


def test_a_run_of_byte_tokens_waits_for_its_end_and_is_judged_as_a_whole() -> None:
    the = id_of("▁the")
    detokenizer = Detokenizer(BYTE_FALLBACK)
    assert [detokenizer.push(token_id) for token_id in [*byte_tokens("𐍈𐍈"), the]] == [""] * 8 + ["𐍈𐍈 the"]
    broken = [*byte_tokens("𐍈𐍈")[:-1], the]
    assert [detokenizer.push(token_id) for token_id in broken] == [""] * 7 + [REPLACEMENT * 7 + " the"]


def test_half_a_character_at_the_end_is_shown_as_decode_shows_it() -> None:
    whole = TOKENIZER.encode("a€").ids
    stream = TextStream(TOKENIZER, [], SamplingParams(stop=("x",)))
    assert "".join(stream.push(token_id, may_stop=True)[0] for token_id in whole[:-1]) == "a"
    assert stream.flush() == REPLACEMENT == TOKENIZER.decode(whole[:-1])[1:]


def test_a_prompt_that_ends_in_half_a_character_is_completed() -> None:
    for tokenizer, ids in ((TOKENIZER, TOKENIZER.encode("a€").ids), (BYTE_FALLBACK, byte_tokens("a€"))):
        detokenizer = Detokenizer(tokenizer, ids[:-1])
        assert detokenizer.flush() == ""
        assert detokenizer.push(ids[-1]) + detokenizer.flush() == "€"


def test_whole_characters_at_the_end_of_a_prompt_stay_whole() -> None:
    detokenizer = Detokenizer(BYTE_FALLBACK, byte_tokens("€€"))
    assert detokenizer.push(byte_tokens("€")[0]) + detokenizer.flush() == REPLACEMENT


def test_a_job_resumed_at_any_place_goes_on_with_the_text_that_was_not_sent() -> None:
    token_ids = [*BYTE_FALLBACK.encode("the cat").ids, *byte_tokens("𐍈😀"), id_of("▁the")]
    limits = ModelLimits(vocab_size=BYTE_FALLBACK.get_vocab_size(), max_model_len=100, eos_token_ids=frozenset({2}))
    for num_committed in range(len(token_ids)):
        committed = token_ids[:num_committed]
        sent = "".join(map(Detokenizer(BYTE_FALLBACK).push, committed))
        command = AddJob(
            job_id="job",
            attempt=2,
            prompt_token_ids=[1],
            params={},
            max_tokens=50,
            seed=0,
            priority=0,
            cache_salt="",
            committed_token_ids=[committed],
            num_emitted_chars=[len(sent)],
            finished_indexes=[],
        )
        grammars = Grammars(BYTE_FALLBACK, limits.vocab_size, limits.eos_token_ids)
        (sequence,) = make_engine_job(command, limits, BYTE_FALLBACK, grammars, arrival=0).sequences
        for token_id in token_ids[num_committed:]:
            sequence.append(token_id)
        sequence.finish(FinishReason.CANCELLED)
        assert sent + sequence.take_text() == BYTE_FALLBACK.decode(token_ids)


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
    for tokenizer, token_ids in ((TOKENIZER, TOKENIZER.encode("€").ids[:1]), (BYTE_FALLBACK, byte_tokens("😀"))):
        stream = TextStream(tokenizer, [], SamplingParams(stop=("a stop string",)))
        seconds = []
        for _ in range(4):
            started = time.process_time()
            for _ in range(1000):
                for token_id in token_ids:
                    stream.push(token_id, may_stop=True)
            seconds.append(time.process_time() - started)
        assert min(seconds[2:]) < 3 * min(seconds[:2])


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
    stream = TextStream(TOKENIZER, [], SamplingParams(stop=("b",)))
    a, b = TOKENIZER.encode("ab").ids
    assert [stream.push(token, may_stop=False) for token in (a, b, a)] == [("a", False), ("b", False), ("a", False)]
    assert stream.stop_string is None
    assert stream.push(b, may_stop=True) == ("", True)
    assert stream.stop_string == "b"


def test_a_stop_string_is_kept_where_it_is_asked_for() -> None:
    stream = TextStream(TOKENIZER, [], SamplingParams(stop=("bc", "c"), include_stop_str_in_output=True))
    assert [stream.push(token, may_stop=True) for token in TOKENIZER.encode("abc").ids] == [
        ("a", False),
        ("", False),
        ("bc", True),
    ]


@pytest.mark.parametrize(("skips", "expected"), [(True, "ab"), (False, "a<eos>b")])
def test_special_tokens_are_shown_where_they_are_asked_for(skips: bool, expected: str) -> None:
    stream = TextStream(TOKENIZER, [], SamplingParams(skip_special_tokens=skips))
    a, b = TOKENIZER.encode("ab").ids
    pushed = [stream.push(token_id, may_stop=True)[0] for token_id in (a, 0, b)]
    assert "".join(pushed) + stream.flush() == expected


@pytest.mark.parametrize("stop", ["€", "x€y", "€y", "y"])
@pytest.mark.parametrize("tokenizer", [TOKENIZER, BYTE_FALLBACK])
def test_a_stop_string_is_found_at_its_last_byte(stop: str, tokenizer: Tokenizer) -> None:
    text = "ax€yb"
    token_ids = TOKENIZER.encode(text).ids if tokenizer is TOKENIZER else byte_tokens(text)
    num_needed = len(text[: text.index(stop)].encode() + stop.encode())
    stream = TextStream(tokenizer, [], SamplingParams(stop=(stop,)))
    pushed = [stream.push(token_id, may_stop=True) for token_id in token_ids[:num_needed]]
    assert [is_stopped for _, is_stopped in pushed] == [False] * (num_needed - 1) + [True]
    assert "".join(text for text, _ in pushed) == text.split(stop)[0]


def test_a_stop_string_may_begin_before_a_run_of_byte_tokens() -> None:
    stream = TextStream(BYTE_FALLBACK, [], SamplingParams(stop=(" cat€",)))
    token_ids = [*BYTE_FALLBACK.encode("the cat").ids, *byte_tokens("€")]
    pushed = [stream.push(token_id, may_stop=True) for token_id in token_ids]
    assert "".join(text for text, _ in pushed) == "the"
    assert pushed[-1][1]
