"""What may be loaded, from where, and what is refused with a remedy."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel, FalconConfig

from domain.catalog import Catalog
from gpu_worker.engine.backends import transformers
from gpu_worker.engine.backends.transformers import TransformersBackend, build_engine
from gpu_worker.engine.cpu.runner import FusedLlama
from gpu_worker.engine.loading import eos_token_ids, load_model
from gpu_worker.engine.probe import NotPageable
from gpu_worker.engine.sequential import SequentialRunner
from settings import ROOT
from tests.engine_driver import (
    CPU,
    EOS_TOKEN_ID,
    VOCAB_SIZE,
    Collected,
    make_add,
    make_engine,
    make_spec,
    tiny_llama_config,
    tiny_model,
)
from tests.engine_parts import TOKENIZER
from text.models import complete


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    """A model as it lies on disk: configuration, safetensors, tokenizer."""
    tiny_model(tiny_llama_config(tie_word_embeddings=True)).save_pretrained(tmp_path)
    TOKENIZER.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return tmp_path


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def collect(backend: TransformersBackend) -> Collected:
    collected = Collected()
    while backend.has_work:
        collected.take(backend.step(lambda members: None))
    return collected


def test_a_folder_is_loaded_and_runs(model_folder: Path) -> None:
    backend = TransformersBackend(make_spec(path=str(model_folder)))
    assert (backend.loaded.device, backend.loaded.num_cache_tokens) == ("cpu", 2048)
    backend.add(make_add("a", TOKENIZER.encode("hello").ids, max_tokens=5, ignore_eos=True))
    finished = collect(backend).sequences["a", 0]
    assert (len(finished.token_ids), finished.finish_reason) == (5, "length")
    assert backend.stats().num_generation_tokens == 5


def test_weights_keep_their_values_in_the_layout_that_is_fast_here(model_folder: Path) -> None:
    spec = make_spec(path=str(model_folder))
    model = load_model(spec, CPU)
    engine = build_engine(spec, model, TOKENIZER, CPU)
    assert isinstance(engine._runner._model, FusedLlama)  # type: ignore[attr-defined]
    stored = load_file(model_folder / "model.safetensors")
    assert torch.equal(model.lm_head.weight, stored["model.embed_tokens.weight"])
    weight = model.model.layers[0].mlp.up_proj.weight
    assert torch.equal(weight, stored["model.layers.0.mlp.up_proj.weight"])
    assert weight.stride(0) == 1
    assert (
        weight.untyped_storage().data_ptr() == model.model.layers[0].mlp.gate_proj.weight.untyped_storage().data_ptr()
    )
    assert model.model.embed_tokens.weight.is_contiguous()


def test_a_model_that_is_not_what_its_type_says_keeps_its_own_code(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model()
    mlp = model.model.layers[1].mlp
    mlp.register_forward_hook(lambda module, inputs, output: output * 2)
    engine = make_engine(model)
    assert engine._runner._model is model  # type: ignore[attr-defined]
    assert "runs unfused" in caplog.text


def test_foreign_code_is_refused_unless_trusted(model_folder: Path) -> None:
    change_config(model_folder, auto_map={"AutoModelForCausalLM": "evil.Evil"})
    with pytest.raises(ValueError, match="trust_remote_code"):
        TransformersBackend(make_spec(path=str(model_folder)))


def test_pickled_weights_are_refused(model_folder: Path) -> None:
    torch.save(load_file(model_folder / "model.safetensors"), model_folder / "pytorch_model.bin")
    (model_folder / "model.safetensors").unlink()
    with pytest.raises(OSError, match="safetensors"):
        TransformersBackend(make_spec(path=str(model_folder)))


def test_weights_that_are_missing_are_not_made_up(model_folder: Path) -> None:
    path = model_folder / "model.safetensors"
    kept = {name: weight for name, weight in load_file(path).items() if "layers.1.mlp" not in name}
    save_file(kept, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"3 weights are missing, including model\.layers\.1\.mlp\."):
        TransformersBackend(make_spec(path=str(model_folder)))


def test_weights_of_another_shape_are_named(model_folder: Path) -> None:
    path = model_folder / "model.safetensors"
    save_file(load_file(path) | {"model.norm.weight": torch.ones(7)}, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"model\.norm\.weight has shape \(7,\), but config.json implies \(64,\)"):
        TransformersBackend(make_spec(path=str(model_folder)))


def test_a_pooler_that_nobody_asks_may_be_missing(tmp_path: Path) -> None:
    config = BertConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    BertModel(config, add_pooling_layer=False).save_pretrained(tmp_path)
    model = load_model(make_spec(path=str(tmp_path), task="embedding"), CPU)
    assert model.encoder.layer[0].output.dense.weight.shape == (16, 16)


def test_a_tokenizer_that_cannot_be_read_is_named(model_folder: Path) -> None:
    (model_folder / "tokenizer.json").write_text('{"model": {"type": "Unheard"}}')
    with pytest.raises(ValueError, match="its tokenizer cannot be read: "):
        TransformersBackend(make_spec(path=str(model_folder)))


def test_a_context_beyond_the_models_own_is_refused(model_folder: Path) -> None:
    with pytest.raises(ValueError, match="is 512, but the model supports 256"):
        TransformersBackend(make_spec(path=str(model_folder), max_model_len=512))


def test_a_cache_smaller_than_one_text_is_refused(model_folder: Path) -> None:
    change_config(model_folder, max_position_embeddings=4096)
    with pytest.raises(ValueError, match="raise kv_cache_tokens"):
        TransformersBackend(make_spec(path=str(model_folder), max_model_len=4096, kv_cache_tokens=1024))


def test_end_tokens_come_from_both_configurations() -> None:
    model = tiny_model(tiny_llama_config(eos_token_id=5))
    model.generation_config.eos_token_id = [7, 9]
    assert eos_token_ids(model) == {5, 7, 9}


def test_the_slow_path_is_reported_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    config = FalconConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        eos_token_id=EOS_TOKEN_ID,
        bos_token_id=None,
        pad_token_id=None,
    )
    with caplog.at_level(logging.WARNING):
        make_engine(tiny_model(config))
    (record,) = (record for record in caplog.records if "slow path" in record.message)
    assert "called 0 times" in record.reason  # type: ignore[attr-defined]


def test_a_model_that_no_kernel_of_its_device_takes_runs_with_its_own_attention(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise NotPageable("no attention kernel computes its layers")

    monkeypatch.setattr(transformers, "_paged", refuse)
    model = tiny_model()
    own_attention = model.config._attn_implementation
    engine = make_engine(model)
    assert isinstance(engine._runner, SequentialRunner)
    assert model.config._attn_implementation == own_attention
    assert "slow path" in caplog.text


def test_the_embedded_model_answers_through_its_template() -> None:
    spec = complete(Catalog.load(ROOT / "models.toml").default)
    backend = TransformersBackend(spec)
    prompt = backend._engine._tokenizer.encode("<|user|>Hello!<|end|><|assistant|>").ids
    backend.add(make_add("a", prompt, max_tokens=60))
    finished = collect(backend).sequences["a", 0]
    assert finished.finish_reason == "stop"
    assert finished.text.strip()
    assert "<|" not in finished.text
