"""The engine on a CUDA device: the tokens of generate() on that device, chunked, preempted and in company."""

from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedConfig

from gpu_worker.engine.backends.transformers import build_engine
from gpu_worker.engine.runner import PagedRunner
from tests.engine_driver import VOCAB_SIZE, make_add, make_spec, run, tiny_model
from tests.engine_parts import byte_tokenizer
from tests.integration.test_engine_parity import CONFIGS, NUM_NEW_TOKENS, generate

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]
CUDA = torch.device("cuda")


@pytest.mark.parametrize("make_config", CONFIGS.values(), ids=CONFIGS)
def test_greedy_tokens_are_those_of_generate(make_config: Callable[[], PreTrainedConfig]) -> None:
    model = tiny_model(make_config()).to(CUDA)
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(1, VOCAB_SIZE, (length,), generator=generator).tolist() for length in (1, 33, 70)]
    expected = [generate(model, prompt) for prompt in prompts]
    engine = build_engine(make_spec(max_num_batched_tokens=24), model, byte_tokenizer(), CUDA)
    assert isinstance(engine._runner, PagedRunner)
    greedy = [make_add(str(number), prompt, max_tokens=NUM_NEW_TOKENS) for number, prompt in enumerate(prompts)]
    hot = [make_add(f"hot {number}", prompt, temperature=1.5, top_p=0.9, n=2) for number, prompt in enumerate(prompts)]
    collected = run(engine, [*hot, *greedy])
    assert collected.failures == {}
    assert [collected.tokens(str(number)) for number in range(len(prompts))] == expected


def test_draws_are_the_same_as_on_a_cpu() -> None:
    commands = [make_add(str(seed), [5, 6, 7], seed=seed, temperature=1.0, top_k=20) for seed in range(8)]
    on_cpu, on_cuda = (
        run(build_engine(make_spec(), tiny_model().to(device), byte_tokenizer(), device), commands)
        for device in (torch.device("cpu"), CUDA)
    )
    same = [on_cpu.tokens(command.job_id)[:4] == on_cuda.tokens(command.job_id)[:4] for command in commands]
    assert sum(same) >= 7  # the devices' last bits differ, the noise does not
