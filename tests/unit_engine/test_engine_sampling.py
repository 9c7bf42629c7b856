"""Every parameter per row, in any mix; randomness that depends on nothing but seed, index and position."""

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import MinPLogitsWarper, RepetitionPenaltyLogitsProcessor, TopKLogitsWarper, TopPLogitsWarper

from gpu_worker.engine import torch_runner
from gpu_worker.engine.cpu.draws import noise_key
from gpu_worker.engine.cpu.draws import noise_of as noise_of_single_tokens
from gpu_worker.engine.cuda.noise import keyed_noise
from gpu_worker.engine.sampling import sample, score_tokens
from gpu_worker.engine.sequence import Sequence
from tests.engine_driver import gumbel_noise
from tests.engine_parts import extend, make_sequence
from tests.thorough import IS_THOROUGH

pytestmark = pytest.mark.slow

VOCAB_SIZE = 24
NUM_DRAWS = 4000


def random_logits(num_rows: int = 1, *, seed: int = 0, vocab_size: int = VOCAB_SIZE) -> Tensor:
    return torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * 2


def at_position(position: int, **changes: Any) -> Sequence:
    """A sequence that has drawn `position` tokens."""
    sequence = make_sequence([1], **changes)
    extend(sequence, [1] * position)
    return sequence


def draw(logits: Tensor, *sequences: Sequence) -> list[int]:
    return [drawn.token_id for drawn in sample(logits.clone().numpy(), sequences) if drawn.token_id is not None]


def frequencies(logits: Tensor, **params: Any) -> Counter[int]:
    """Of NUM_DRAWS draws from the same row, each at a position of its own."""
    sequences = [at_position(position, **params) for position in range(NUM_DRAWS)]
    return Counter(draw(logits.expand(NUM_DRAWS, -1), *sequences))


def filtered_by_transformers(logits: Tensor, *, temperature: float, top_k: int, top_p: float, min_p: float) -> Tensor:
    scores = logits / temperature
    ids = torch.tensor([[1]])
    if top_k:
        scores = TopKLogitsWarper(top_k)(ids, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(ids, scores)
    if min_p:
        scores = MinPLogitsWarper(min_p)(ids, scores)
    return scores.softmax(-1)[0]


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "min_p"),
    [
        (1.0, 0, 1.0, 0.0),
        (0.5, 0, 1.0, 0.0),
        (1.7, 5, 1.0, 0.0),
        (1.0, 0, 0.6, 0.0),
        (1.0, 0, 1.0, 0.2),
        (1.3, 10, 0.8, 0.05),
        (2.0, 100, 0.999, 0.0),
    ],
)
def test_draws_follow_the_distribution_that_transformers_defines(
    temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    logits = random_logits()
    expected = filtered_by_transformers(logits, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    drawn = frequencies(logits, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    for token_id, probability in enumerate(expected.tolist()):
        # Five standard deviations; a token that is filtered out is never drawn.
        tolerance = 5 * math.sqrt(NUM_DRAWS * probability * (1 - probability))
        assert abs(drawn[token_id] - NUM_DRAWS * probability) <= tolerance


ROWS = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.3, 1.0, 2.0]),
        "top_k": st.sampled_from([0, 1, 3, 1000]),
        "top_p": st.sampled_from([1.0, 0.9, 0.1]),
        "min_p": st.sampled_from([0.0, 0.1]),
        "seed": st.integers(-(2**63), 2**63 - 1),
        "presence_penalty": st.sampled_from([0.0, 1.5]),
        "repetition_penalty": st.sampled_from([1.0, 1.3]),
    }
)


@given(rows=st.lists(ROWS, min_size=2, max_size=6), positions=st.lists(st.integers(0, 9), min_size=6, max_size=6))
def test_a_row_draws_the_same_alone_and_in_any_company(rows: list[dict[str, Any]], positions: list[int]) -> None:
    logits = random_logits(len(rows), vocab_size=1000)
    sequences = [at_position(position, **row) for row, position in zip(rows, positions, strict=False)]
    together = draw(logits, *sequences)
    assert together == [draw(logits[number : number + 1], sequence)[0] for number, sequence in enumerate(sequences)]


def defined_scores(logits: Tensor, sequence: Sequence) -> Tensor:
    """What a draw from adjusted logits maximises, by a full sort and noise for every token; float32 (vocab_size,)."""
    params = sequence.job.params
    temperature = params.temperature or 1.0
    values = (logits[0] / temperature).sort(descending=True).values
    last = min(params.top_k or len(values), len(values)) - 1
    cumulative = values.double().softmax(-1).cumsum(-1)
    reached = int(torch.searchsorted(cumulative, (params.top_p or 1.0) * cumulative[last]))
    floor = torch.maximum(values[min(reached, last)], values[0] + torch.tensor(params.min_p).log())
    noise = gumbel_noise(torch.arange(len(values), dtype=torch.int32)[None], [sequence])[0]
    scaled = logits[0] / temperature
    return (scaled + noise).masked_fill(scaled < floor, -math.inf)


@settings(max_examples=300 if IS_THOROUGH else 100)
@given(
    row=ROWS.filter(lambda row: row["temperature"] > 0),
    vocab_size=st.sampled_from([1, 2, 60, 1000, 32_000]),
    spread=st.sampled_from([0.0, 0.05, 1.0, 8.0]),
    is_coarse=st.booleans(),
    num_banned=st.integers(0, 3),
    logits_seed=st.integers(0, 1000),
)
def test_noise_for_few_tokens_draws_what_noise_for_all_would(
    row: dict[str, Any], vocab_size: int, spread: float, is_coarse: bool, num_banned: int, logits_seed: int
) -> None:
    """Coarse logits have many ties, as those of a model in bfloat16 do."""
    logits = random_logits(seed=logits_seed, vocab_size=vocab_size) * spread
    logits = logits.round() if is_coarse else logits
    logits[0, 1 : 1 + num_banned] = -math.inf
    row = row if vocab_size > 1 else row | {"repetition_penalty": 1.0}  # the prompt's token 1 must exist
    sequence = make_sequence([1], **row)
    (drawn,) = sample(logits.numpy(), [sequence])
    scores = defined_scores(logits, sequence)
    assert drawn.token_id == scores.argmax()


def test_draws_from_a_large_vocabulary_pass_a_chi_square_test() -> None:
    """30,000 tokens in classes of about equal probability, whichever way they are found: by noise, logit or filter."""
    logits = random_logits(seed=3, vocab_size=30_000)
    logits[0, :40] += 8
    filters: list[dict[str, Any]] = [{"temperature": 1.0}, {"temperature": 0.8, "top_p": 0.7}, {"top_k": 5000}]
    for params in filters:
        defaults: dict[str, Any] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
        params = defaults | params
        expected = filtered_by_transformers(logits, **params).double()
        order = expected.argsort(descending=True)
        classes = torch.empty_like(order)
        classes[order] = (expected[order].cumsum(0) * 100).long().clamp(max=99)
        shares = torch.zeros(100, dtype=torch.float64).index_add_(0, classes, expected)
        drawn = torch.zeros(100, dtype=torch.float64)
        for start in range(0, NUM_DRAWS, 100):
            sequences = [at_position(position, **params) for position in range(start, start + 100)]
            ids = draw(logits.expand(100, -1), *sequences)
            drawn.index_add_(0, classes[ids], torch.ones(100, dtype=torch.float64))
        counts = shares * NUM_DRAWS
        is_used = counts > 0
        assert drawn[~is_used].sum() == 0
        chi_square = ((drawn - counts)[is_used] ** 2 / counts[is_used]).sum().item()
        freedom = int(is_used.sum()) - 1
        assert abs(chi_square - freedom) < 5 * math.sqrt(2 * freedom)


def test_noise_is_fixed_for_ever() -> None:
    """A resumed job may run on another version or machine: what a position draws must not change."""
    noise = gumbel_noise(torch.tensor([[0, 1, 50_000]], dtype=torch.int32), [at_position(3, seed=-5)])
    assert noise[0].tolist() == pytest.approx([-0.6594464, -0.6831284, -1.2699214], abs=1e-6)


def noise_of(**changes: Any) -> Tensor:
    """Rows are positions, columns token ids."""
    token_ids = torch.arange(2000, dtype=torch.int32)[None]
    return gumbel_noise(token_ids, [at_position(position, **changes) for position in range(200)])


def test_noise_has_the_gumbel_distribution() -> None:
    noise = noise_of().flatten().double()
    for quantile in (0.001, 0.01, 0.1, 0.5, 0.9, 0.99, 0.999):
        expected = -math.log(-math.log(quantile))
        share = (noise < expected).double().mean().item()
        assert share == pytest.approx(quantile, abs=6 * math.sqrt(quantile * (1 - quantile) / noise.numel()))


def test_noise_of_tokens_positions_seeds_and_siblings_is_unrelated() -> None:
    noise = noise_of(seed=1)
    sibling = make_sequence([1], seed=1)
    sibling.index = 1
    sibling_noise = gumbel_noise(torch.arange(2000, dtype=torch.int32)[None], [sibling])
    pairs = [
        (noise[:, 1:], noise[:, :-1]),
        (noise[1:], noise[:-1]),
        (noise, noise_of(seed=2)),
        (noise[:1], sibling_noise),
    ]
    for one, other in pairs:
        correlation = torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1].item()
        assert abs(correlation) < 5 / math.sqrt(one.numel())


def test_temperature_zero_beside_temperature_two() -> None:
    logits = random_logits(2)
    token_ids = draw(logits, make_sequence([1], temperature=0.0), make_sequence([1], temperature=2.0))
    assert token_ids[0] == logits[0].argmax().item()


def test_a_row_of_equal_logits_has_no_favourite() -> None:
    drawn = frequencies(torch.zeros(1, 4), temperature=1.0, top_p=0.9)
    assert min(drawn.values()) > NUM_DRAWS / 5


def test_repetition_penalty_is_that_of_transformers_over_prompt_and_output() -> None:
    logits = random_logits()
    seen = [3, 5, 7, 7]
    expected = RepetitionPenaltyLogitsProcessor(1.5)(torch.tensor([seen]), logits.clone())
    sequence = make_sequence(seen[:2], repetition_penalty=1.5)
    extend(sequence, seen[2:])
    adjusted = logits.clone()
    sample(adjusted.numpy(), [sequence])
    assert torch.allclose(adjusted, expected)


def test_presence_and_frequency_penalties_count_the_output_alone() -> None:
    logits = torch.zeros(1, 8)
    sequence = make_sequence([1, 1, 2], presence_penalty=0.5, frequency_penalty=0.25)
    extend(sequence, [2, 3, 3])
    sample(logits.numpy(), [sequence])
    assert logits[0].tolist() == [0, 0, -0.75, -1.0, 0, 0, 0, 0]


def test_logit_bias_can_force_and_forbid() -> None:
    logits = random_logits()
    best = int(logits.argmax())
    other = (best + 1) % VOCAB_SIZE
    assert draw(logits, make_sequence([1], logit_bias={other: 100.0})) == [other]
    assert draw(logits, make_sequence([1], logit_bias={best: -100.0})) != [best]
    everything = dict.fromkeys(range(VOCAB_SIZE), -100.0)
    assert draw(logits, make_sequence([1], logit_bias=everything)) == [best]


def test_end_tokens_are_off_until_min_tokens() -> None:
    logits = torch.zeros(1, 4)
    logits[0, 0] = 50.0
    params = {"min_tokens": 2, "end_token_ids": frozenset({0, 2})}
    assert 0 not in draw(logits.expand(2, -1), at_position(0, **params), at_position(1, **params))
    assert draw(logits, at_position(2, **params)) == [0]


def test_logprobs_are_of_the_raw_distribution() -> None:
    logits = random_logits(2)
    expected = logits[0].log_softmax(-1)
    params = {"temperature": 0.7, "top_k": 2, "logit_bias": {4: 30.0}, "logprobs": 3}
    drawn, plain = sample(logits.clone().numpy(), [make_sequence([1], **params), make_sequence([1])])
    assert drawn.token_id == 4
    assert drawn.logprob == pytest.approx(expected[4].item())
    assert [token_id for token_id, _ in drawn.top] == expected.topk(3).indices.tolist()
    assert [logprob for _, logprob in drawn.top] == pytest.approx(expected.topk(3).values.tolist())
    assert plain.logprob is None


def test_zero_alternatives_still_give_the_tokens_own_logprob() -> None:
    (drawn,) = sample(random_logits().numpy(), [make_sequence([1], logprobs=0)])
    assert drawn.logprob is not None
    assert drawn.top == ()


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_logits_that_are_no_distribution_are_refused(poison: float) -> None:
    logits = random_logits(2)
    logits[1, 3] = poison
    with pytest.raises(ValueError, match="not finite"):
        sample(logits.numpy(), [make_sequence([1]), make_sequence([1])])


def test_the_noise_of_single_tokens_is_that_of_all() -> None:
    keys = [noise_key(seed, 1, 2) for seed in range(20)]
    ids = np.arange(5000, dtype=np.int64)
    for first, second in keys:
        halves = (np.full(len(ids), half, np.int32).view(np.uint32) for half in (first, second))
        on_device = keyed_noise(torch.from_numpy(ids.astype(np.int32))[None], torch.tensor([[first, second]]).int())[0]
        np.testing.assert_allclose(noise_of_single_tokens(ids, *halves), on_device.numpy(), rtol=1e-6, atol=1e-6)


@given(seed=st.integers(0, 1000), num_top=st.integers(0, 30))
def test_prompts_are_scored_the_same_with_and_without_torch(seed: int, num_top: int) -> None:
    logits = random_logits(6, seed=seed)
    token_ids = list(range(6))
    plain = score_tokens(logits.numpy(), token_ids, min(num_top, VOCAB_SIZE))
    for ours, theirs in zip(plain, torch_runner.score_tokens(logits, token_ids, num_top), strict=True):
        assert ours.token_id == theirs.token_id
        assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-5)
        assert [token_id for token_id, _ in ours.top] == [token_id for token_id, _ in theirs.top]
