"""Every family, on a tiny random model: the engine's greedy tokens are those of model.generate(), in any batch."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec
import pytest
import torch
from transformers import (
    Cohere2Config,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    GraniteConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    OPTConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
)

from gpu_worker.engine.cpu.runner import PagedRunner
from gpu_worker.engine.engine import Engine
from gpu_worker.engine.sequential import SequentialRunner
from gpu_worker.engine_process.frames import AddJob
from tests.engine_driver import (
    EOS_TOKEN_ID,
    VOCAB_SIZE,
    Collected,
    make_add,
    make_another,
    make_engine,
    run,
    tiny_model,
)

pytestmark = pytest.mark.slow

NUM_NEW_TOKENS = 14
PROMPT_LENGTHS = (1, 5, 33, 70)

SPECIAL_TOKENS = {"eos_token_id": EOS_TOKEN_ID, "bos_token_id": None, "pad_token_id": None}
SHAPE = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    **SPECIAL_TOKENS,
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
SLIDING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 8,
    "long_factor": [4.0] * 8,
    "original_max_position_embeddings": 64,
}

CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**SHAPE),
    "llama with dynamic rope below its limit": lambda: LlamaConfig(
        **SHAPE, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    ),
    "mistral": lambda: MistralConfig(**SHAPE, sliding_window=8),
    "mixtral": lambda: MixtralConfig(**SHAPE, **EXPERTS, sliding_window=None),
    "qwen2": lambda: Qwen2Config(**SHAPE),
    "qwen3": lambda: Qwen3Config(**SHAPE, head_dim=16),
    "qwen3-moe": lambda: Qwen3MoeConfig(
        **SHAPE, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32
    ),
    "gemma2": lambda: Gemma2Config(
        **SHAPE, tie_word_embeddings=False, head_dim=16, query_pre_attn_scalar=16, **SLIDING
    ),
    "gemma3": lambda: Gemma3TextConfig(
        **SHAPE, tie_word_embeddings=False, head_dim=16, query_pre_attn_scalar=16, **SLIDING
    ),
    "phi3": lambda: Phi3Config(**SHAPE),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCAB_SIZE, n_positions=256, n_embd=64, n_layer=2, n_head=4, **SPECIAL_TOKENS
    ),
    "gpt-neox": lambda: GPTNeoXConfig(**{k: v for k, v in SHAPE.items() if k != "num_key_value_heads"}),
    "opt": lambda: OPTConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        ffn_dim=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        word_embed_proj_dim=64,
        **SPECIAL_TOKENS,
    ),
    "olmo2": lambda: Olmo2Config(**SHAPE),
    "granite": lambda: GraniteConfig(**SHAPE),
    "smollm3": lambda: SmolLM3Config(**SHAPE),
    "cohere2": lambda: Cohere2Config(**SHAPE, **SLIDING),
    "gpt-oss": lambda: GptOssConfig(**SHAPE, **EXPERTS, head_dim=16, **SLIDING),
}
SLOWER_CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "falcon": lambda: FalconConfig(
        vocab_size=VOCAB_SIZE, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, **SPECIAL_TOKENS
    ),
    "mamba": lambda: MambaConfig(
        vocab_size=VOCAB_SIZE, hidden_size=64, state_size=8, num_hidden_layers=2, **SPECIAL_TOKENS
    ),
    "phi3 with long rope": lambda: Phi3Config(**SHAPE, original_max_position_embeddings=64, rope_parameters=LONG_ROPE),
}
ALL_CONFIGS = CONFIGS | SLOWER_CONFIGS


@dataclass(frozen=True, slots=True)
class Case:
    """A family's model, some prompts, and what generate() makes of each of them alone."""

    family: str
    first: Engine  # around the family's model, as one that has been loaded is; nothing runs on it
    prompts: list[list[int]]
    expected: list[list[int]]

    def engine(self, **spec_changes: Any) -> Engine:
        return make_another(self.first, **spec_changes)

    def commands(self, **changes: Any) -> list[AddJob]:
        return [
            make_add(str(number), prompt, max_tokens=NUM_NEW_TOKENS, **changes)
            for number, prompt in enumerate(self.prompts)
        ]

    def tokens(self, collected: Collected) -> list[list[int]]:
        return [collected.tokens(str(number)) for number in range(len(self.prompts))]


@pytest.fixture(scope="module", params=ALL_CONFIGS)
def case(request: pytest.FixtureRequest) -> Case:
    model = tiny_model(ALL_CONFIGS[request.param]())
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(1, VOCAB_SIZE, (length,), generator=generator).tolist() for length in PROMPT_LENGTHS]
    expected = [generate(model, prompt) for prompt in prompts]
    return Case(request.param, make_engine(model), prompts, expected)


def generate(model: Any, prompt: list[int]) -> list[int]:
    ids = torch.tensor([prompt], device=model.device)
    with torch.inference_mode():
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NUM_NEW_TOKENS, do_sample=False, pad_token_id=0
        )
    tokens: list[int] = output[0, len(prompt) :].tolist()
    return tokens


def test_the_texts_are_worth_comparing(case: Case) -> None:
    assert len({token for tokens in case.expected for token in tokens}) > 20


def test_the_family_takes_its_path(case: Case) -> None:
    runner = PagedRunner if case.family in CONFIGS else SequentialRunner
    assert isinstance(case.first._runner, runner)


def test_ragged_prompts_in_one_batch(case: Case) -> None:
    engine = case.engine(max_num_batched_tokens=1024)
    assert case.tokens(run(engine, case.commands())) == case.expected


def test_prompts_in_chunks_while_others_decode(case: Case) -> None:
    engine = case.engine(max_num_batched_tokens=16, max_num_seqs=3)
    assert case.tokens(run(engine, case.commands())) == case.expected


def test_prefix_hits(case: Case) -> None:
    engine = case.engine()
    run(engine, case.commands())
    again = run(engine, case.commands())
    assert case.tokens(again) == case.expected
    longest = again.sequences[str(len(case.prompts) - 1), 0]
    assert longest.num_cached_tokens == (64 if case.family in CONFIGS else 0)


def test_preemption(case: Case) -> None:
    engine = case.engine(max_model_len=128, kv_cache_tokens=256)
    neighbours = [
        make_add(f"beside {number}", prompt, max_tokens=55, ignore_eos=True, cache_salt="another tenant")
        for number, prompt in enumerate(case.prompts)
    ]
    assert case.tokens(run(engine, [*neighbours, *case.commands()])) == case.expected
    assert engine.stats().num_preemptions > 0


def test_resume(case: Case) -> None:
    committed = [tokens[:num] for tokens, num in zip(case.expected, (1, 7, 0, 13), strict=True)]
    commands = [
        msgspec.structs.replace(command, committed_token_ids=[tokens])
        for command, tokens in zip(case.commands(), committed, strict=True)
    ]
    rest = case.tokens(run(case.engine(), commands))
    assert [before + after for before, after in zip(committed, rest, strict=True)] == case.expected


def test_beside_sampled_and_forked_neighbours(case: Case) -> None:
    hot = [
        make_add(f"hot {number}", prompt, temperature=2.0, n=2, seed=number, top_k=50, logprobs=3)
        for number, prompt in enumerate(case.prompts)
    ]
    mixed = [command for pair in zip(case.commands(), hot, strict=True) for command in pair]
    assert case.tokens(run(case.engine(), mixed)) == case.expected
