"""How many of a sequence's tokens were reasoning: exact, however its text and tokens are cut, held back or resumed."""

from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models

from dialects.openai_views import count_reasoning_tokens
from domain.jobs import FinishReason
from domain.requests import GenerationResult, ResultChoice, SamplingParams, TokenChunk
from gpu_worker.engine.detokenizer import Detokenizer, TextStream, with_visible_reasoning
from gpu_worker.job import RunningJob
from storage.partial_results import partial_result
from tests.engine_parts import TOKENIZER, make_sequence
from tests.runner_parts import make_output, make_running
from text.outputs import OutputFormat, OutputParser, ReasoningFormat

END = "</think>"
PLAIN = OutputFormat()
TAGGED, OPENED = (OutputFormat(None, one) for one in (ReasoningFormat.TAGGED, ReasoningFormat.OPENED))
OUTPUTS = st.lists(st.sampled_from([END, "</", "think", ">", "é", "<think>", "a"]), max_size=12).map("".join)


def first_end(token_ids: Sequence[int], tokenizer: Tokenizer = TOKENIZER) -> int | None:
    """By decoding every beginning: the definition."""
    numbers = range(1, len(token_ids) + 1)
    return next((n for n in numbers if END in tokenizer.decode(token_ids[:n], skip_special_tokens=False)), None)


def run(job: RunningJob, prompt: list[int], token_ids: Sequence[int], **params: object) -> None:
    """Let the engine's own sequence say these tokens, behind those committed."""
    progress = job.sequences[0]
    sequence = make_sequence(prompt, **params)
    for token_id in progress.token_ids:
        sequence.append(token_id)
    sequence.unsent_text = sequence.unsent_text[sum(map(len, progress.text)) :]
    for token_id in token_ids:
        sequence.append(token_id)
        number = sequence.num_reasoning_tokens
        reason = sequence.finish_reason
        output = make_output(job, sequence.take_text(), (token_id,), finish_reason=reason, num_reasoning_tokens=number)
        job.absorb(output)
        if sequence.is_finished:
            return


@given(text=OUTPUTS, stop=st.sampled_from(["", ">b", "think>b", END + "b"]), cuts=st.sets(st.integers(1, 60)))
def test_chunks_and_attempts_may_end_anywhere(text: str, stop: str, cuts: set[int]) -> None:
    """Behind each cut another worker goes on. Stop strings hold text back, and never come about."""
    token_ids = TOKENIZER.encode(text).ids
    chunks: list[TokenChunk] = []
    bounds = [0, *sorted(cut for cut in cuts if cut < len(token_ids)), len(token_ids)]
    for attempt, (begin, end) in enumerate(pairwise(bounds), start=1):
        job = make_running(attempt=attempt, committed_chunks=list(chunks))
        run(job, [1, 2], token_ids[begin:end], stop=[stop] if stop else [])
        chunks += job.take_chunks()
    told = [(chunk, number) for chunk in chunks if (number := chunk.num_reasoning_tokens) is not None]
    assert [number for _, number in told] == [n for n in [first_end(token_ids)] if n is not None]
    for chunk, number in told:
        num_before = sum(len(one.token_ids) for one in chunks[: chunks.index(chunk)])
        assert num_before < number <= num_before + len(chunk.token_ids), "it comes with its own tokens"


@pytest.mark.parametrize("prompt", ["<think>", "a</thin", END])
def test_what_the_prompt_ends_with_is_no_output(prompt: str) -> None:
    job = make_running()
    run(job, TOKENIZER.encode(prompt).ids, TOKENIZER.encode("k>ab" + END).ids, max_tokens=12)
    assert job.sequences[0].pending_num_reasoning_tokens == 4 + len(END)


@pytest.mark.parametrize("is_special", [True, False])
def test_a_tag_may_be_one_token_and_has_a_text_also_where_it_is_special(is_special: bool) -> None:
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    add = tokenizer.add_special_tokens if is_special else tokenizer.add_tokens
    add([AddedToken(END, special=is_special)])
    tokenizer.add_special_tokens([AddedToken("<end>", special=True)])
    detokenizer = Detokenizer(with_visible_reasoning(tokenizer))
    assert "".join(detokenizer.push(token_id) for token_id in (1, 2, 1, 3)).split() == ["b", END, "b"]


PIECES = ["a</", "</", "think", "thi", "nk>b", ">b", ">", END, f"{END}c", "<"]


@given(token_ids=st.lists(st.integers(0, len(PIECES) - 1), max_size=12), stop=st.sampled_from([[], [">bx"], ["<x"]]))
def test_the_token_that_brings_the_last_character_of_the_tag_counts_whatever_else_it_brings(
    token_ids: list[int], stop: list[str]
) -> None:
    tokenizer = Tokenizer(models.WordLevel({piece: place for place, piece in enumerate(PIECES)}, unk_token="<"))
    tokenizer.decoder = decoders.Fuse()
    stream = TextStream(tokenizer, [], SamplingParams(stop=tuple(stop)))
    number = None
    for place, token_id in enumerate(token_ids, start=1):
        stream.push(token_id, may_stop=False)
        if stream.has_reasoned and number is None:
            number = place
    assert number == first_end(token_ids, tokenizer)


def chunks_of(n: int) -> list[TokenChunk]:
    """The first choice has ended, the second has left its reasoning, the others are in the midst of it."""
    first = TokenChunk(
        sequence_number=1, text=f"a{END}", token_ids=(1, 2), finish_reason=FinishReason.STOP, num_reasoning_tokens=2
    )
    second = TokenChunk(
        sequence_number=2, index=1, text=f"abc{END}d", token_ids=(1, 2, 3, 4, 5), num_reasoning_tokens=4
    )
    others = [TokenChunk(sequence_number=1 + i, index=i, text="ab", token_ids=(1, 2)) for i in range(2, n)]
    return [first, second, *others]


def test_the_choices_of_a_resumed_job_keep_their_numbers() -> None:
    job = make_running(n=3, attempt=2, committed_chunks=chunks_of(3))
    job.absorb(make_output(job, "!", (9,), index=1, finish_reason="stop", num_reasoning_tokens=4))
    job.absorb(make_output(job, f"{END}.", (8, 7), index=2, finish_reason="length", num_reasoning_tokens=3))
    chunks = job.take_chunks()
    result = job.finalisation().result
    assert isinstance(result, GenerationResult)
    assert [choice.num_reasoning_tokens for choice in result.choices] == [2, 4, 3]
    assert [chunk.num_reasoning_tokens for chunk in chunks] == [None, 3], "once for each"
    assert result == partial_result([*chunks_of(3), *chunks], num_prompt_tokens=3, cut_off_by=FinishReason.CANCELLED)


def choice(text: str, *, num_tokens: int = 9, index: int = 0, counted: int | None = None) -> ResultChoice:
    return ResultChoice(
        index=index, text=text, finish_reason=FinishReason.LENGTH, num_tokens=num_tokens, num_reasoning_tokens=counted
    )


def count(format: OutputFormat, *choices: ResultChoice) -> int:
    parsers = [OutputParser(format, tool_names=frozenset()) for _ in choices]
    for one, parser in zip(choices, parsers, strict=True):
        parser.push(one.text)
        parser.finish(is_cut=False)
    return count_reasoning_tokens(choices, parsers)


@pytest.mark.parametrize(
    ("format", "text", "counted", "number"),
    [
        (PLAIN, f"<think>a{END}b", 4, 0),
        (TAGGED, f"<think>a{END}b", 4, 4),
        (TAGGED, f"\n<think>\n\n{END}b", 4, 4),
        (TAGGED, f"b{END}", 4, 0),
        (TAGGED, f"b<think>a{END}", 4, 0),
        (TAGGED, "<think>a", None, 9),
        (TAGGED, "<thi", None, 0),
        (TAGGED, "b", None, 0),
        (OPENED, f"a{END}b", 4, 4),
        (OPENED, "a", None, 9),
        (OPENED, "", None, 9),
        (OPENED, "a</think", 4, 4),
        (OPENED, f"a{END}b", None, 0),
    ],
)
def test_the_format_of_the_model_says_what_was_reasoning(
    format: OutputFormat, text: str, counted: int | None, number: int
) -> None:
    """To its end where it had one, also where a stop string cut off the text of that; to the end of the output else."""
    assert count(format, choice(text, counted=counted)) == number


def test_the_choices_are_added_up() -> None:
    choices = [choice(f"a{END}b", counted=2), choice("a", index=1, num_tokens=5), choice(f"{END}", index=2, counted=1)]
    assert count(OPENED, *choices) == 8
