"""The engine on a CUDA device: the tokens of generate() there, captured or not, chunked, preempted and in company."""

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, PreTrainedConfig

from gpu_worker.engine.backends.transformers import build_engine
from gpu_worker.engine.cuda.attention import DeviceAttention, TritonAttention, VarlenAttention
from gpu_worker.engine.cuda.backend import check_attention
from gpu_worker.engine.cuda.runner import DeviceRunner
from gpu_worker.engine.engine import Engine
from gpu_worker.engine.probe import LayerShape
from tests.engine_driver import VOCAB_SIZE, make_add, make_spec, run, tiny_llama_config, tiny_model
from tests.engine_parts import byte_tokenizer
from tests.engine_traces import run_traces
from tests.integration.test_engine_parity import CONFIGS, NUM_NEW_TOKENS, generate
from tests.unit_engine.test_engine_device_attention import CAPPED, PLAIN, make_shape

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]
CUDA = torch.device("cuda")
PROMPTS = [[5, 6, 7], list(range(20, 60)), [9] * 17]


def cuda_engine(model: Any = None, **spec_changes: Any) -> Engine:
    return build_engine(make_spec(**spec_changes), (model or tiny_model()).to(CUDA), byte_tokenizer(), CUDA)


def wide_config(**changes: Any) -> LlamaConfig:
    """Head size 64, which every kernel knows."""
    return tiny_llama_config(hidden_size=256, intermediate_size=256, **changes)


def varlen() -> DeviceAttention:
    from torch.nn.attention.varlen import varlen_attn

    return VarlenAttention(varlen_attn)


def triton() -> DeviceAttention:
    pytest.importorskip("triton")
    return TritonAttention(torch.cuda.get_device_properties(CUDA).multi_processor_count)


LARGE = {
    "llama 8b": make_shape(key_shape=(8, 128), value_shape=(8, 128), num_heads=32, scale=128**-0.5),
    "window": make_shape(key_shape=(8, 64), value_shape=(8, 64), num_heads=64, scale=0.125, window=128),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", (PLAIN | CAPPED | LARGE).values(), ids=PLAIN | CAPPED | LARGE)
def test_the_triton_kernels_compute_attention(shape: LayerShape, dtype: torch.dtype) -> None:
    values = {name: getattr(shape, name) for name in LayerShape.__slots__}
    check_attention(triton(), LayerShape(**values | {"dtype": dtype}), 256, CUDA)


@pytest.mark.parametrize("shape", LARGE.values(), ids=LARGE)
def test_varlen_attention_takes_block_tables(shape: LayerShape) -> None:
    """The open question of the ladder: where this fails, the Triton kernels serve."""
    values = {name: getattr(shape, name) for name in LayerShape.__slots__}
    check_attention(varlen(), LayerShape(**values | {"dtype": torch.bfloat16}), 256, CUDA)


@pytest.mark.parametrize("make_config", CONFIGS.values(), ids=CONFIGS)
def test_greedy_tokens_are_those_of_generate(make_config: Callable[[], PreTrainedConfig]) -> None:
    model = tiny_model(make_config()).to(CUDA)
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(1, VOCAB_SIZE, (length,), generator=generator).tolist() for length in (1, 33, 70)]
    expected = [generate(model, prompt) for prompt in prompts]
    engine = cuda_engine(model, max_num_batched_tokens=24)
    assert isinstance(engine._runner, DeviceRunner)
    greedy = [make_add(str(number), prompt, max_tokens=NUM_NEW_TOKENS) for number, prompt in enumerate(prompts)]
    hot = [make_add(f"hot {number}", prompt, temperature=1.5, top_p=0.9, n=2) for number, prompt in enumerate(prompts)]
    collected = run(engine, [*hot, *greedy])
    assert collected.failures == {}
    assert [collected.tokens(str(number)) for number in range(len(prompts))] == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_captured_passes_give_the_tokens_of_eager_ones(dtype: torch.dtype) -> None:
    commands = [make_add(str(n), prompt, max_tokens=40, ignore_eos=True) for n, prompt in enumerate(PROMPTS * 2)]
    captured, eager = (
        cuda_engine(tiny_model(wide_config()).to(dtype), decode_graphs=decode_graphs) for decode_graphs in (True, False)
    )
    assert captured._runner.graphs.sizes == [1, 2, 4, 8]  # type: ignore[attr-defined]
    assert eager._runner.graphs.sizes == []  # type: ignore[attr-defined]
    first, second = run(captured, commands), run(eager, commands)
    same = [first.tokens(c.job_id)[:8] == second.tokens(c.job_id)[:8] for c in commands]
    assert all(same) if dtype == torch.float32 else sum(same) >= len(commands) - 1  # a close call may go either way


def test_half_precision_logprobs_are_near_those_of_float32() -> None:
    command = make_add("a", PROMPTS[1], max_tokens=1, logprobs=5)
    exact, rounded = (
        run(cuda_engine(tiny_model(wide_config()).to(dtype)), [command]).sequences["a", 0].logprobs[0]
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert float(str(rounded["logprob"])) == pytest.approx(float(str(exact["logprob"])), abs=0.5)


@pytest.mark.parametrize("seed", range(2))
def test_every_request_gets_the_tokens_of_its_solo_run(seed: int, caplog: pytest.LogCaptureFixture) -> None:
    """Judged by the plain engine on the CPU. Blocks of 256 tokens leave no room for small caches."""
    caplog.set_level(logging.CRITICAL, "gpu_worker")

    def make(model: Any, **changes: Any) -> Engine:
        return cuda_engine(model, **changes | {"kv_cache_tokens": 2560})

    *_, report = run_traces(seed, 25, make)
    assert len(report.contaminated) <= report.num_sequences // 50, report.contaminated  # devices differ in last bits


def test_draws_are_the_same_as_on_a_cpu() -> None:
    commands = [make_add(str(seed), [5, 6, 7], seed=seed, temperature=1.0, top_k=20) for seed in range(8)]
    on_cpu = run(build_engine(make_spec(), tiny_model(), byte_tokenizer(), torch.device("cpu")), commands)
    on_cuda = run(cuda_engine(), commands)
    same = [on_cpu.tokens(command.job_id)[:4] == on_cuda.tokens(command.job_id)[:4] for command in commands]
    assert sum(same) >= 7  # the devices' last bits differ, the noise does not


def test_structured_output_is_followed() -> None:
    output = {"regex": "[ab]{8}"}
    commands = [make_add("a", PROMPTS[0], temperature=1.0, structured_output=output), make_add("b", PROMPTS[1])]
    collected = run(cuda_engine(), commands)
    assert collected.failures == {}
    text = collected.sequences["a", 0].text
    assert set(text) <= {"a", "b"}
    assert len(text) == 8


def test_preempted_texts_go_on() -> None:
    commands = [make_add(str(n), [n + 1] * 250, max_tokens=200, ignore_eos=True) for n in range(6)]
    spec = {"max_model_len": 512, "kv_cache_tokens": 1536, "max_num_batched_tokens": 256}
    model = tiny_llama_config(max_position_embeddings=512)
    engine = cuda_engine(tiny_model(model), **spec)
    collected = run(engine, commands)
    assert engine.stats().num_preemptions > 0
    roomy = run(cuda_engine(tiny_model(model), **spec | {"kv_cache_tokens": 6144}), commands)
    same = [collected.tokens(c.job_id)[:50] == roomy.tokens(c.job_id)[:50] for c in commands]
    assert sum(same) >= 5


def test_a_long_context() -> None:
    config = wide_config(max_position_embeddings=10_000)
    model = tiny_model(config).to(CUDA)
    prompt = torch.randint(1, VOCAB_SIZE, (8_000,), generator=torch.Generator().manual_seed(3)).tolist()
    expected = generate(model, prompt)
    engine = cuda_engine(model, max_model_len=9_000, kv_cache_tokens=20_000, max_num_batched_tokens=2048)
    beside = make_add("beside", PROMPTS[0], max_tokens=100, ignore_eos=True)
    collected = run(engine, [beside, make_add("long", prompt, max_tokens=NUM_NEW_TOKENS)])
    assert collected.tokens("long") == expected


def test_running_out_of_memory_fails_nobody() -> None:
    model = tiny_model().to(CUDA)
    engine = cuda_engine(model, max_num_batched_tokens=64)
    forward = model.forward

    def greedy_for_memory(input_ids: torch.Tensor, **arguments: Any) -> Any:
        if input_ids.shape[1] > 20:
            torch.empty(2**50, dtype=torch.uint8, device=CUDA)
        return forward(input_ids=input_ids, **arguments)

    model.forward = greedy_for_memory
    collected = run(engine, [make_add(str(n), prompt, max_tokens=6) for n, prompt in enumerate(PROMPTS)])
    assert collected.failures == {}
    assert engine.scheduler.budget.tokens < 64
