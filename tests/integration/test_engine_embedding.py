"""Vectors: those of plain transformers for each input alone, in any batch, beside texts, from bad neighbours too."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModel,
    BertConfig,
    FalconConfig,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen3Config,
    RobertaConfig,
)

from gpu_worker.engine.backends import StepMember
from gpu_worker.engine.backends.encoder import EncoderBackend, make_embedding_queue, read_pooling
from gpu_worker.engine.backends.transformers import TransformersBackend
from gpu_worker.engine.embedding_queue import EmbeddingQueue, encode_vector
from gpu_worker.engine_process.frames import EmbeddingOutput, EmbedJob, EngineStats, StepDone
from tests.engine_driver import CPU, VOCAB_SIZE, make_add, make_spec, tiny_model
from tests.engine_parts import TOKENIZER
from tests.integration.test_engine_parity import SHAPE, SLIDING

LENGTHS = (1, 40, 3, 17, 17, 60, 2)
GENERATOR = torch.Generator().manual_seed(3)
INPUTS = [torch.randint(2, VOCAB_SIZE, (length,), generator=GENERATOR).tolist() for length in LENGTHS]
ENCODER_SHAPE = {name: value for name, value in SHAPE.items() if name != "num_key_value_heads"} | {"pad_token_id": 1}

DECODERS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SHAPE),
    "qwen3": Qwen3Config(**SHAPE, head_dim=16),
    "mistral": MistralConfig(**SHAPE, sliding_window=8),
    "gpt2": GPT2Config(vocab_size=VOCAB_SIZE, n_positions=256, n_embd=64, n_layer=2, n_head=4, pad_token_id=None),
    "falcon": FalconConfig(vocab_size=VOCAB_SIZE, hidden_size=64, num_hidden_layers=2, num_attention_heads=4),
}
ENCODERS: dict[str, PreTrainedConfig] = {
    "bert": BertConfig(**ENCODER_SHAPE),
    "roberta": RobertaConfig(**ENCODER_SHAPE | {"max_position_embeddings": 258}),
    "qwen3": Qwen3Config(**SHAPE, head_dim=16),
    "gemma3": Gemma3TextConfig(**SHAPE, head_dim=16, query_pre_attn_scalar=16, **SLIDING),
}


def save(model: Any, folder: Path, pooling: str | None) -> None:
    model.save_pretrained(folder)
    TOKENIZER.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    if pooling is not None:
        (folder / "1_Pooling").mkdir()
        modes = {"word_embedding_dimension": 64, "pooling_mode_max_tokens": False, f"pooling_mode_{pooling}": True}
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(modes))


def tiny_encoder(config: PreTrainedConfig) -> Any:
    torch.manual_seed(0)
    model = AutoModel.from_config(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3)
    return model


def reference(base_model: Any, inputs: Sequence[list[int]], pooling: str) -> list[np.ndarray[Any, Any]]:
    """Each input alone, by transformers alone."""
    vectors = []
    for token_ids in inputs:
        with torch.inference_mode():
            states = base_model(input_ids=torch.tensor([token_ids])).last_hidden_state[0].double()
        vector = {"mean": states.mean(0), "cls": states[0], "last": states[-1]}[pooling]
        vectors.append((vector / vector.norm()).numpy())
    return vectors


def make_job(name: str = "job", inputs: Sequence[list[int]] = INPUTS, **fields: Any) -> EmbedJob:
    defaults: dict[str, Any] = {"attempt": 1, "inputs": list(inputs), "dimensions": None, "priority": 0}
    return EmbedJob(job_id=name, **defaults | fields)


def vectors_of(output: EmbeddingOutput) -> list[np.ndarray[Any, Any]]:
    return [np.frombuffer(vector, "<f4") for vector in output.vectors]


def assert_close(actual: Sequence[np.ndarray[Any, Any]], expected: Sequence[np.ndarray[Any, Any]]) -> None:
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected, strict=True):
        assert float(np.abs(one - other).max()) < 1e-4


def run_backend(backend: Any, *jobs: EmbedJob) -> dict[str, EmbeddingOutput]:
    for job in jobs:
        backend.embed(job)
    outputs: dict[str, EmbeddingOutput] = {}
    while backend.has_work:
        done = backend.step(lambda members: None)
        assert not done.failures
        outputs |= {output.job_id: output for output in done.embeddings}
    return outputs


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("max_num_batched_tokens", [16, 50, 1024])
def test_a_model_that_generates_embeds_by_its_last_hidden_state(
    family: str, max_num_batched_tokens: int, tmp_path: Path
) -> None:
    model = tiny_model(DECODERS[family])
    expected = reference(model.base_model, INPUTS, "last")
    save(model, tmp_path, None)
    spec = make_spec(path=str(tmp_path), device="cpu", max_num_batched_tokens=max_num_batched_tokens)
    backend = TransformersBackend(spec)
    backend.add(make_add("text", [5, 6, 7], max_tokens=8))
    outputs = run_backend(backend, make_job("a"), make_job("b", INPUTS[::-1]))
    assert_close(vectors_of(outputs["a"]), expected)
    assert_close(vectors_of(outputs["b"]), expected[::-1])


@pytest.mark.parametrize("family", ENCODERS)
@pytest.mark.parametrize(("flag", "pooling"), [("mean_tokens", "mean"), ("cls_token", "cls"), ("lasttoken", "last")])
def test_an_encoder_pools_as_its_files_say(family: str, flag: str, pooling: str, tmp_path: Path) -> None:
    model = tiny_encoder(ENCODERS[family])
    save(model, tmp_path, flag)
    spec = make_spec(path=str(tmp_path), device="cpu", task="embedding", max_num_batched_tokens=64)
    outputs = run_backend(EncoderBackend(spec), make_job("a"), make_job("b", INPUTS[:3]))
    assert_close(vectors_of(outputs["a"]), reference(model, INPUTS, pooling))
    assert_close(vectors_of(outputs["b"]), reference(model, INPUTS[:3], pooling))


def test_dimensions_keep_the_front_at_unit_length(tmp_path: Path) -> None:
    model = tiny_encoder(ENCODERS["bert"])
    save(model, tmp_path, None)
    spec = make_spec(path=str(tmp_path), device="cpu", task="embedding")
    assert read_pooling(spec, "bert") == "mean"
    [output] = run_backend(EncoderBackend(spec), make_job(dimensions=5)).values()
    whole = reference(model, INPUTS, "mean")
    assert_close(vectors_of(output), [vector[:5] / np.linalg.norm(vector[:5]) for vector in whole])


def test_a_pooling_that_is_not_known_is_refused_at_load(tmp_path: Path) -> None:
    save(tiny_encoder(ENCODERS["bert"]), tmp_path, "max_tokens")
    with pytest.raises(ValueError, match="pooling_mode_max_tokens"):
        read_pooling(make_spec(path=str(tmp_path)), "bert")
    (tmp_path / "modules.json").write_text('[{"type": "sentence_transformers.models.Dense"}]')
    with pytest.raises(ValueError, match="Dense"):
        read_pooling(make_spec(path=str(tmp_path)), "bert")


# The queue, with vectors that show what was asked


def first_numbers(inputs: Sequence[Sequence[int]]) -> Any:
    if any(token_ids[0] == 13 for token_ids in inputs):
        raise RuntimeError("the thirteenth")
    return np.array([[1.0, token_ids[0], np.inf if token_ids[0] == 14 else 0.0] for token_ids in inputs], np.float32)


def make_queue(**fields: Any) -> EmbeddingQueue:
    bounds = {"vocab_size": 100, "max_input_tokens": 10, "max_step_tokens": 12}
    return EmbeddingQueue(first_numbers, **{"encode": encode_vector} | bounds | fields)


def step_queue(
    queue: EmbeddingQueue, records: list[list[StepMember]] | None = None, *, beside: bool = False
) -> StepDone:
    def generate(record: Any) -> StepDone:
        record([StepMember("text", 1, "decode")])
        return StepDone(outputs=[], failures=[], stats=EngineStats())

    seen: list[list[StepMember]] = [] if records is None else records
    return queue.step(lambda members: seen.append(list(members)), generate if beside else None, EngineStats)


def test_a_bad_input_fails_its_job_alone() -> None:
    queue = make_queue(max_step_tokens=100)
    queue.add(make_job("good", [[1], [2], [3]]))
    queue.add(make_job("raises", [[4], [13], [5]]))
    queue.add(make_job("infinite", [[6], [14]]))
    queue.add(make_job("good too", [[7]]))
    done = step_queue(queue)
    assert {failure.job_id for failure in done.failures} == {"raises", "infinite"}
    assert {output.job_id: len(output.vectors) for output in done.embeddings} == {"good": 3, "good too": 1}
    assert not queue.has_work


def test_a_step_takes_what_fits_and_a_quarter_of_it_beside_texts() -> None:
    queue = make_queue()
    queue.add(make_job("a", [[n, n, n] for n in range(20, 30)]))
    step_queue(queue)
    assert queue.num_tokens == 12
    records: list[list[StepMember]] = []
    step_queue(queue, records, beside=True)
    assert queue.num_tokens == 15
    assert [member.job_id for member in records[-1]] == ["text", "a"]
    queue.add(make_job("long", [[31] * 10], priority=1))
    done = step_queue(queue, beside=True)  # longer than its share: it runs alone, and first
    assert [output.job_id for output in done.embeddings] == ["long"]


@pytest.mark.parametrize("beside", [False, True])
def test_tenants_take_turns(beside: bool) -> None:
    """However long another's list is; each tenant's own jobs are done in order."""
    queue = make_queue()
    queue.add(make_job("long", [[n, n, n] for n in range(20, 50)], tenant="a"))
    queue.add(make_job("later", [[50]], tenant="a"))
    step_queue(queue, beside=beside)
    queue.add(make_job("short", [[51, 51, 51]], tenant="b"))
    assert [output.job_id for output in step_queue(queue, beside=beside).embeddings] == ["short"]
    queue.add(make_job("as long", [[n, n, n] for n in range(52, 82)], tenant="b"))
    ends = [output.job_id for _ in range(70) for output in step_queue(queue, beside=beside).embeddings]
    assert ends == ["long", "later", "as long"]


@pytest.mark.parametrize("reason", ["cancelled", ""])
def test_an_aborted_job_says_one_last_word_or_none(reason: str) -> None:
    queue = make_queue(max_step_tokens=3)
    queue.add(make_job("a", [[1] * 3, [2] * 3]))
    step_queue(queue)
    queue.abort("a", 1, reason)
    assert queue.has_work == bool(reason)
    assert [(output.vectors, output.finish_reason) for output in step_queue(queue).embeddings] == (
        [([], "cancelled")] if reason else []
    )


def test_a_model_whose_lane_is_made_beside_an_engine_shares_its_weights(tmp_path: Path) -> None:
    model = tiny_model(DECODERS["llama"])
    save(model, tmp_path, "mean_tokens")
    spec = make_spec(path=str(tmp_path))
    queue = make_embedding_queue(spec, model, CPU)
    queue.add(make_job())
    [output] = [output for _ in range(9) for output in step_queue(queue).embeddings]
    assert_close(vectors_of(output), reference(model.base_model, INPUTS, "mean"))
