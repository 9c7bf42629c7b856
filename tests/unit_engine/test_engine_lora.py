"""LoRA adapters in the engine: each text is that of a model with the adapter merged, whatever else is in the batch."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, MambaConfig, MixtralConfig, Phi3Config

from domain.errors import ModelNotFound
from gpu_worker.engine.cpu.runner import FusedLlama
from gpu_worker.engine.engine import Engine
from gpu_worker.engine.lora import load_adapters
from gpu_worker.engine.sequential import SequentialRunner
from tests.device_engine import make_device_engine
from tests.engine_driver import make_add, make_engine, make_spec, run, step, tiny_llama_config, tiny_model
from tests.lora_files import merged, write_adapter

PROMPTS = [[(7 * start + place) % 250 + 1 for place in range(length)] for start, length in enumerate((3, 20, 70, 33))]


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    model = tiny_model()
    return {
        "warm": write_adapter(tmp_path / "warm", model, seed=1),
        "cold": write_adapter(tmp_path / "cold", model, seed=2, targets=("q_proj", "down_proj"), r=8, use_rslora=True),
    }


def as_entry(folders: dict[str, Path]) -> dict[str, str]:
    return {name: str(folder) for name, folder in folders.items()}


def greedy(engine: Engine, *names: str | None, max_tokens: int = 16) -> list[list[int]]:
    """The tokens of each prompt with each adapter, all in one batch."""
    commands = [
        make_add(f"{name} {number}", prompt, adapter=name, ignore_eos=True, max_tokens=max_tokens)
        for number, prompt in enumerate(PROMPTS)
        for name in names
    ]
    collected = run(engine, commands)
    assert not collected.failures
    return [collected.tokens(command.job_id) for command in commands]


def expected(model: Any, *, max_tokens: int = 16) -> list[list[int]]:
    return greedy(make_engine(model), None, max_tokens=max_tokens)


@pytest.mark.parametrize("make", [make_engine, make_device_engine])
def test_adapters_in_one_batch_each_make_the_text_of_a_merged_model(
    make: Callable[..., Engine], folders: dict[str, Path]
) -> None:
    engine = make(tiny_model(), adapters=as_entry(folders))
    texts = greedy(engine, None, "warm", "cold")
    base, warm, cold = texts[0::3], texts[1::3], texts[2::3]
    assert base == expected(tiny_model())
    assert warm == expected(merged(tiny_model(), folders["warm"]))
    assert cold == expected(merged(tiny_model(), folders["cold"]))
    assert base != warm != cold
    assert [greedy(engine, name) for name in (None, "warm", "cold")] == [base, warm, cold]


def test_a_llama_with_adapters_runs_fused(folders: dict[str, Path]) -> None:
    engine: Any = make_engine(tiny_model(), adapters=as_entry(folders))
    assert isinstance(engine._runner._model, FusedLlama)


@pytest.mark.parametrize(
    ("config", "targets"),
    [
        (Phi3Config(hidden_size=64, intermediate_size=96, vocab_size=320, num_hidden_layers=2, num_attention_heads=4,
                    num_key_value_heads=2, eos_token_id=0, bos_token_id=None, pad_token_id=None,
                    max_position_embeddings=256), ("qkv_proj", "gate_up_proj")),
        (MambaConfig(hidden_size=64, vocab_size=320, num_hidden_layers=2, state_size=8, eos_token_id=0,
                     bos_token_id=None, pad_token_id=0), ("in_proj", "out_proj")),
    ],
)  # fmt: skip
def test_models_that_are_not_fused_run_adapters_too(config: Any, targets: tuple[str, ...], tmp_path: Path) -> None:
    folder = write_adapter(tmp_path, tiny_model(config), seed=3, targets=targets)
    engine: Any = make_engine(tiny_model(config), adapters={"one": str(folder)})
    assert isinstance(engine._runner, SequentialRunner) == (config.model_type == "mamba")
    texts = greedy(engine, None, "one")
    assert texts[0::2] == expected(tiny_model(config))
    assert texts[1::2] == expected(merged(tiny_model(config), folder))


@pytest.mark.parametrize("is_fused", [True, False])
def test_rows_of_the_model_itself_keep_their_bits_beside_adapters(
    is_fused: bool, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpu_worker.engine.probe.can_fuse", lambda _: is_fused)
    engine = make_engine(tiny_model(), adapters=as_entry(folders))
    rng = random.Random(0)
    for _ in range(4):
        prompts = [[rng.randrange(1, 250) for _ in range(rng.randrange(1, 40))] for _ in range(4)]
        logprobs = []
        for others in ((None, None), ("warm", "cold")):
            names = (None, others[0], None, others[1])
            adds = [
                make_add(str(number), prompt, adapter=name, max_tokens=1, logprobs=5, cache_salt=str(rng.random()))
                for number, (prompt, name) in enumerate(zip(prompts, names, strict=True))
            ]
            collected = run(engine, adds)
            logprobs.append([collected.sequences[str(number), 0].logprobs for number in (0, 2)])
        assert logprobs[0] == logprobs[1]


def test_adapters_share_no_cached_prefix(folders: dict[str, Path]) -> None:
    engine = make_engine(tiny_model(), adapters=as_entry(folders))
    cached = {}
    for turn in (1, 2):
        for name in (None, "warm", "cold"):
            collected = run(engine, [make_add("job", PROMPTS[2], adapter=name, attempt=turn)])
            cached[turn, name] = collected.sequences["job", 0].num_cached_tokens
    assert cached == {(1, name): 0 for name in (None, "warm", "cold")} | {
        (2, name): 64 for name in (None, "warm", "cold")
    }


def test_a_preempted_and_a_resumed_text_keep_their_adapter(folders: dict[str, Path]) -> None:
    whole = expected(merged(tiny_model(), folders["warm"]), max_tokens=60)
    engine = make_engine(tiny_model(), adapters=as_entry(folders), kv_cache_tokens=256)
    commands = [
        make_add(
            f"{number} {name}",
            prompt,
            adapter=name,
            ignore_eos=True,
            max_tokens=60,
            committed_token_ids=[whole[number][:5] if name else []],
        )
        for number, prompt in enumerate(PROMPTS)
        for name in ("warm", None)
    ]
    collected = run(engine, commands)
    assert engine.scheduler.num_preemptions > 0
    assert [collected.tokens(f"{number} warm") for number in range(len(PROMPTS))] == [text[5:] for text in whole]


def test_a_job_for_an_adapter_that_is_not_loaded_is_refused_alone(folders: dict[str, Path]) -> None:
    engine = make_engine(tiny_model(), adapters=as_entry(folders))
    engine.add(make_add("good", [1, 2, 3], adapter="warm"))
    with pytest.raises(ModelNotFound, match="has no adapter 'hot'; restart the workers"):
        engine.add(make_add("bad", [1, 2, 3], adapter="hot"))
    assert [output.job_id for output in step(engine).outputs] == ["good"]


def change_shape(model: Any) -> Any:
    return tiny_model(tiny_llama_config(intermediate_size=64))


def shorten(model: Any) -> Any:
    return tiny_model(tiny_llama_config(num_hidden_layers=1))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (change_shape, r"adapter 'one': adapter_model\.safetensors: model\.layers\.0\.mlp\.\w+ is for a layer of"),
        (shorten, r"adapter 'one': adapter_model\.safetensors: the model has no model\.layers\.1\."),
    ],
)
def test_an_adapter_of_another_model_is_refused(change: Callable[[Any], Any], words: str, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path, tiny_model(), seed=1)
    with pytest.raises(ValueError, match=words):
        load_adapters(make_spec(adapters={"one": str(folder)}), change(tiny_model()))


def test_layers_that_adapters_cannot_change_are_refused(tmp_path: Path) -> None:
    for number, (model, target) in enumerate(
        [
            (tiny_model(), "lm_head"),
            (tiny_model(GPT2Config(n_embd=64, n_layer=1, n_head=4, vocab_size=320)), "c_proj"),
        ]
    ):
        folder = write_adapter(tmp_path / str(number), model, seed=1, targets=(target,))
        with pytest.raises(ValueError, match=rf"{target} is a \w+ that adapters cannot change here; merge"):
            load_adapters(make_spec(adapters={"one": str(folder)}), model)


def test_a_layer_that_does_not_run_for_every_token_is_refused(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(
        MixtralConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                      num_key_value_heads=2, vocab_size=320, num_local_experts=2, num_experts_per_tok=1)
    )  # fmt: skip
    mlp = model.model.layers[0].mlp
    mlp.expert = torch.nn.Linear(32, 32)
    mlp.register_forward_hook(lambda module, _, output: output + module.expert(output[:, :1]))
    folder = write_adapter(tmp_path, model, seed=1, targets=("expert",))
    with pytest.raises(ValueError, match=r"mlp\.expert, which does not run for every token"):
        load_adapters(make_spec(adapters={"one": str(folder)}), model)
