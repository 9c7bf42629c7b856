"""int8 and int4 weights: what they cost in exactness, when they are chosen, and that all the rest works with them."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Phi3Config

from domain.catalog import ModelEntry
from gpu_worker.engine import quantization
from gpu_worker.engine.cpu.runner import FusedLlama
from gpu_worker.engine.engine import Engine
from gpu_worker.engine.quantization import Kind, QuantisedLinear, quantise
from tests.engine_driver import CPU, make_add, make_engine, make_spec, run, run_alone, tiny_llama_config, tiny_model
from tests.lora_files import write_adapter
from text.model_files import model_revision, refuse_unservable

PROMPTS = [[(7 * start + place) % 250 + 1 for place in range(length)] for start, length in enumerate((3, 20, 40))]


def make_layer(num_in: int, num_out: int, *, bias: bool = False) -> torch.nn.Linear:
    torch.manual_seed(0)
    return torch.nn.Linear(num_in, num_out, bias=bias).requires_grad_(False)


@pytest.mark.parametrize("sizes", [(64, 64), (96, 192), (256, 128)])
@pytest.mark.parametrize(("kind", "tolerance"), [("int8", 0.01), ("int4", 0.12)])
def test_a_quantised_layer_computes_nearly_the_same(sizes: tuple[int, int], kind: Kind, tolerance: float) -> None:
    layer = make_layer(*sizes, bias=True)
    quantised = QuantisedLinear(layer, kind)
    rows = torch.randn(2, 5, sizes[0])
    expected, actual = layer(rows), quantised(rows)
    assert (actual.shape, actual.dtype) == (expected.shape, torch.float32)
    assert (actual - expected).norm() / expected.norm() < tolerance
    assert quantised.packed.num_bytes < layer.weight.nbytes * (0.3 if kind == "int8" else 0.2)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_row_of_a_quantised_layer_is_the_same_in_any_batch(kind: Kind) -> None:
    quantised = QuantisedLinear(make_layer(128, 192), kind)
    rows = torch.randn(21, 128)
    together = quantised(rows)
    for number in range(21):
        assert torch.equal(quantised(rows[number : number + 1])[0], together[number])


def test_weights_that_are_all_alike_are_kept() -> None:
    for value in (0.0, 0.5, -0.25):
        layer = make_layer(64, 64)
        layer.weight.fill_(value)
        for kind in ("int8", "int4"):
            torch.testing.assert_close(QuantisedLinear(layer, kind)(torch.ones(1, 64)), layer(torch.ones(1, 64)))


def quantised_engine(kind: str, model: Any = None, **changes: Any) -> Engine:
    return make_engine(model or tiny_model(tiny_llama_config(num_key_value_heads=4)), quantization=kind, **changes)


def greedy(engine: Engine, **changes: Any) -> list[list[int]]:
    commands = [make_add(str(number), prompt, ignore_eos=True, **changes) for number, prompt in enumerate(PROMPTS)]
    collected = run(engine, commands)
    assert not collected.failures
    return [collected.tokens(command.job_id) for command in commands]


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_quantised_llama_runs_fused_and_continues_its_texts(kind: str) -> None:
    engine: Any = quantised_engine(kind)
    model = engine._runner._model
    assert isinstance(model, FusedLlama)
    texts = greedy(engine)
    assert greedy(engine, attempt=2, cache_salt="another") == texts
    for prompt, text in zip(PROMPTS, texts, strict=True):
        command = make_add("rest", prompt, ignore_eos=True, committed_token_ids=[text[:7]], cache_salt="third")
        assert run_alone(engine, command).token_ids == text[7:]


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_deep_quantised_llama_is_paged_though_its_activations_are_rounded(kind: str) -> None:
    config = tiny_llama_config(hidden_size=128, num_hidden_layers=8, num_key_value_heads=4)
    engine: Any = quantised_engine(kind, tiny_model(config))
    assert isinstance(engine._runner._model, FusedLlama)


@torch.inference_mode()
def test_int8_weights_change_the_logits_by_a_few_percent() -> None:
    model, token_ids = tiny_model(), torch.tensor([PROMPTS[2]])
    floating = model(input_ids=token_ids).logits
    quantise(make_spec(quantization="int8"), model, CPU)
    assert (model(input_ids=token_ids).logits - floating).norm() / floating.norm() < 0.05


def test_layers_that_do_not_fit_stay_as_they_are() -> None:
    model = tiny_model()  # its keys have 32 outputs
    quantise(make_spec(quantization="int8"), model, CPU)
    attention = model.model.layers[0].self_attn
    assert isinstance(attention.q_proj, QuantisedLinear)
    assert isinstance(attention.k_proj, torch.nn.Linear)
    assert isinstance(model.lm_head, QuantisedLinear)
    assert isinstance(model.model.embed_tokens.weight, torch.nn.Parameter)
    assert greedy(make_engine(tiny_model(), quantization="int8"))


def test_the_output_layer_is_int8_beside_int4_layers() -> None:
    model = tiny_model()
    quantise(make_spec(quantization="int4"), model, CPU)
    assert isinstance(model.lm_head.packed, quantization.Int8Weight)
    assert isinstance(model.model.layers[0].mlp.down_proj.packed, quantization.Int4Weight)


def test_a_model_that_is_not_fused_is_quantised_too() -> None:
    config = Phi3Config(hidden_size=64, intermediate_size=96, vocab_size=320, num_hidden_layers=2,
                        num_attention_heads=4, num_key_value_heads=2, eos_token_id=0, bos_token_id=None,
                        pad_token_id=None, max_position_embeddings=256)  # fmt: skip
    engine = quantised_engine("int8", tiny_model(config))
    assert [len(text) for text in greedy(engine)] == [16, 16, 16]


def test_adapters_work_on_quantised_weights(tmp_path: Path) -> None:
    config = tiny_llama_config(num_key_value_heads=4)
    folder = write_adapter(tmp_path, tiny_model(config), seed=1)
    engine = quantised_engine("int8", adapters={"one": str(folder)})
    base, adapted = greedy(engine), greedy(engine, adapter="one", attempt=2)
    assert base == greedy(quantised_engine("int8"))
    assert base != adapted


@pytest.mark.parametrize(("milliseconds", "is_quantised"), [((9.0, 5.0), True), ((5.0, 9.0), False)])
def test_auto_takes_what_is_faster_and_logs_both_figures(
    milliseconds: tuple[float, float],
    is_quantised: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    times = iter(milliseconds * 2)
    monkeypatch.setattr(quantization, "_milliseconds", lambda *_: next(times))
    model = tiny_model()
    with caplog.at_level(logging.INFO):
        quantise(make_spec(quantization="auto"), model, CPU)
    assert isinstance(model.lm_head, QuantisedLinear) == is_quantised
    [line] = [record.getMessage() for record in caplog.records if "weights of" in record.getMessage()]
    first = f"{milliseconds[0]:.1f} ms with 1 rows, quantised {milliseconds[1]:.1f} ms"
    assert first in line


def test_quantization_is_refused_where_there_are_no_operators(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="quantization of model 'tiny' is 'int8', which backend transformers does on"):
        quantise(make_spec(quantization="int8"), tiny_model(), torch.device("cuda"))
    quantise(make_spec(quantization="auto"), tiny_model(), torch.device("cuda"))
    entry = ModelEntry(id="a", path=str(tmp_path), backend="llama_cpp", quantization="int4")
    with pytest.raises(ValueError, match="backend 'llama_cpp' does not quantise"):
        refuse_unservable(entry, tmp_path, {})


def test_the_revision_tells_quantised_weights_apart(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    revisions = [
        model_revision(ModelEntry(id="a", path=str(tmp_path), quantization=kind))
        for kind in ("none", "auto", "int8", "int4")
    ]
    assert [revision.removeprefix(revisions[0]) for revision in revisions] == ["", "+auto", "+int8", "+int4"]
