"""What vLLM's logits processor keeps of its rows, without vLLM: copies that draw as the sequences themselves would."""

from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from gpu_worker.engine.families import read_end_token_ids, read_tokenizer
from gpu_worker.engine.sampling import GrammarFailed, sample
from gpu_worker.engine.scheduler import ModelLimits, make_engine_job
from gpu_worker.engine.sequence import Grammars, Sequence
from gpu_worker.engine.vllm.rows import FollowedRow, draw_rows, drawn_of, make_row, plan_of, refuse_wrong_end
from gpu_worker.engine_process.frames import AddJob
from settings import ROOT

FOLDER = ROOT / "models" / "celeriac-mini"
PROMPT = [40, 41, 42]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return read_tokenizer(FOLDER)


@pytest.fixture(scope="module")
def limits(tokenizer: Tokenizer) -> ModelLimits:
    return ModelLimits(tokenizer.get_vocab_size(), 128, read_end_token_ids(FOLDER, tokenizer))


@pytest.fixture(scope="module")
def grammars(tokenizer: Tokenizer, limits: ModelLimits) -> Grammars:
    return Grammars(tokenizer, limits.vocab_size, limits.eos_token_ids)


class Maker:
    """Sequences of a job, as the back end has them, and their copies, as the processor makes them."""

    def __init__(self, tokenizer: Tokenizer, limits: ModelLimits, grammars: Grammars) -> None:
        self._tokenizer = tokenizer
        self._limits = limits
        self._grammars = grammars

    def sequence(self, committed: list[int], **params: Any) -> Sequence:
        defaults: dict[str, object] = {"temperature": 1.0, "top_p": 1.0, "top_k": 0}
        job = AddJob("job", 1, PROMPT, defaults | params, 50, 7, 0, "", [committed], [0], [])
        return make_engine_job(job, self._limits, self._tokenizer, self._grammars, arrival=0).sequences[0]

    def copy(self, sequence: Sequence, output: list[int]) -> FollowedRow:
        """`output` is what vLLM has drawn since the request was added."""
        prompt, vocab_size = list(sequence.token_ids), self._limits.vocab_size
        return make_row(plan_of(sequence), prompt, output, self._tokenizer, self._grammars, vocab_size)


@pytest.fixture(scope="module")
def maker(tokenizer: Tokenizer, limits: ModelLimits, grammars: Grammars) -> Maker:
    return Maker(tokenizer, limits, grammars)


@pytest.mark.parametrize("committed", [[], [60, 61, 60]])
@pytest.mark.parametrize(
    "params",
    [
        {},
        {"top_k": 20, "min_p": 0.01},
        {"presence_penalty": 1.5, "frequency_penalty": 0.5, "repetition_penalty": 1.3},
        {"logit_bias": {"60": 20.0}, "bad_token_ids": [61]},
        {"allowed_token_ids": [*range(60, 90), 200], "bad_words": ["ab", "q"]},
        {"min_tokens": 20, "temperature": 0.0},
        {"structured_output": {"regex": "[a-z ]+[0-9]"}},
    ],
)
def test_a_copy_draws_what_the_sequence_itself_would(
    maker: Maker, limits: ModelLimits, params: dict[str, Any], committed: list[int]
) -> None:
    """Whether it has followed the tokens one by one or was made anew, as after a preemption."""
    if "structured_output" in params:
        committed = []  # they would have to match
    sequence = maker.sequence(committed, **params)
    first_request = maker.sequence(committed, **params)
    output: list[int] = []
    following = maker.copy(first_request, output)
    random = np.random.default_rng(3)
    for _ in range(12):
        logits = random.normal(size=(1, limits.vocab_size)).astype(np.float32) * 3
        following.follow()
        anew = maker.copy(first_request, list(output))
        drawn = [sample(logits.copy(), [one])[0].token_id for one in (sequence, following.sequence, anew.sequence)]
        assert drawn[0] is not None
        assert drawn == [drawn[0]] * 3
        sequence.append(drawn[0])
        output.append(drawn[0])
        if sequence.is_finished:
            break


def test_a_row_says_whether_anything_new_was_drawn(maker: Maker) -> None:
    output: list[int] = []
    row = maker.copy(maker.sequence([60]), output)
    assert not row.follow()
    output.append(61)
    assert row.follow()
    assert row.sequence.token_ids == [*PROMPT, 60, 61]
    assert row.sequence.num_output_tokens == 2


@pytest.mark.parametrize(
    ("params", "is_drawn"),
    [
        ({"temperature": 0.0}, False),
        ({"temperature": 0.0, "frequency_penalty": 1.0}, True),
        ({"temperature": 0.0, "min_tokens": 1}, True),
        ({"temperature": 0.0, "bad_words": ["ab"]}, True),
        ({"temperature": 0.0, "allowed_token_ids": [60]}, True),
        ({"temperature": 0.0, "structured_output": {"regex": "a"}}, True),
        ({}, True),
    ],
)
def test_plain_greedy_rows_are_left_to_vllm(maker: Maker, params: dict[str, Any], is_drawn: bool) -> None:
    assert maker.copy(maker.sequence([], **params), []).is_drawn_by_us == is_drawn


def test_a_row_whose_grammar_fails_gets_the_sign_and_its_neighbours_their_tokens(maker: Maker) -> None:
    good, bad = maker.sequence([]), maker.sequence([])

    def draw(rows: list[int], sequences: list[Sequence]) -> list[int]:
        if bad in sequences:
            raise GrammarFailed(bad.job, "it cannot go on")
        return [100 + row for row in rows]

    assert draw_rows({2: good, 5: bad}, draw, failed_token_id=1) == {2: 102, 5: 1}
    assert draw_rows({5: bad}, draw, failed_token_id=1) == {5: 1}


def test_an_end_that_the_grammar_does_not_accept_is_the_sign_of_a_failure(maker: Maker, limits: ModelLimits) -> None:
    end = min(limits.eos_token_ids)
    with pytest.raises(GrammarFailed, match="cannot be continued"):
        refuse_wrong_end(maker.sequence([], structured_output={"regex": "[a-z]+"}), end, limits.eos_token_ids)
    sequence = maker.sequence([], structured_output={"regex": "[a-z]*"}, min_tokens=5)
    with pytest.raises(GrammarFailed, match="other parameters"):
        refuse_wrong_end(sequence, end, limits.eos_token_ids)


def test_an_end_in_its_place_is_none(maker: Maker, limits: ModelLimits) -> None:
    end = min(limits.eos_token_ids)
    refuse_wrong_end(maker.sequence([]), end, limits.eos_token_ids)
    refuse_wrong_end(maker.sequence([], structured_output={"regex": "[a-z]*"}), end, limits.eos_token_ids)
    chosen = maker.sequence([], structured_output={"regex": "[a-z]+"}, stop_token_ids=[end])
    refuse_wrong_end(chosen, end, limits.eos_token_ids)


class Score:
    def __init__(self, logprob: float) -> None:
        self.logprob = logprob


def test_the_most_likely_tokens_come_first_and_the_drawn_one_is_not_one_of_them() -> None:
    scores = {7: Score(-5.0), 3: Score(-0.5), 9: Score(-0.5)}
    assert drawn_of(7, scores, 2).top == ((3, -0.5), (9, -0.5))
    assert drawn_of(7, scores, 2).logprob == -5.0
    assert drawn_of(7, {7: Score(float("-inf"))}, 0).logprob == -9999.0
    assert drawn_of(7, {}, 0).logprob is None
