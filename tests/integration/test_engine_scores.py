"""Scores of pairs: those of plain transformers for each pair alone, whatever runs beside it."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForSequenceClassification, BertConfig, PreTrainedConfig, RobertaConfig

from domain.catalog import ModelEntry
from domain.requests import EmbeddingRequest
from gpu_worker.engine.backends.encoder import EncoderBackend
from gpu_worker.engine_process.frames import EmbedJob
from tasks.prepare import encode_inputs
from tests.engine_driver import make_spec
from tests.integration.test_engine_embedding import ENCODER_SHAPE, run_backend
from text.models import load_model_view

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "fox", "the", "moon", "rain", "and", "[", "]", "SEP"]
SHAPE = ENCODER_SHAPE | {"vocab_size": len(WORDS), "pad_token_id": 0, "num_labels": 1}
FAMILIES: dict[str, PreTrainedConfig] = {
    "bert": BertConfig(**SHAPE),
    "roberta": RobertaConfig(**SHAPE | {"max_position_embeddings": 258}),
}
QUERY = "a fox"
DOCUMENTS = ["the moon", "a fox and a fox and the moon and rain", "rain", "the [SEP] moon", "moon " * 40]


def make_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(WordPiece({word: place for place, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]"])
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return tokenizer


def save(folder: Path, config: PreTrainedConfig, **fields: Any) -> Any:
    torch.manual_seed(5)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)  # so that the scores differ
    model.save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    make_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    return model


def make_job(folder: Path, name: str, documents: list[str]) -> EmbedJob:
    view = load_model_view(ModelEntry(id="scorer", path=str(folder), task="scoring"))
    request = EmbeddingRequest(model="scorer", queries=(QUERY,), inputs=tuple(documents))
    return EmbedJob(job_id=name, attempt=1, inputs=encode_inputs(request, view), dimensions=None, priority=0)


def scores_of(output: Any) -> list[float]:
    return [struct.unpack("<f", vector)[0] for vector in output.vectors]


def reference(model: Any, document: str) -> float:
    """The logit of transformers' own pass over this pair alone."""
    tokenizer = make_tokenizer()
    tokenizer.encode_special_tokens = True
    pair = tokenizer.encode(QUERY, document)
    types = {"token_type_ids": torch.tensor([pair.type_ids])} if model.config.type_vocab_size > 1 else {}
    with torch.inference_mode():
        return float(model(input_ids=torch.tensor([pair.ids]), **types).logits[0, 0])


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_those_of_each_pair_alone(family: str, tmp_path: Path) -> None:
    model = save(tmp_path, FAMILIES[family])
    spec = make_spec(path=str(tmp_path), device="cpu", task="scoring", max_model_len=128, max_num_batched_tokens=64)
    jobs = make_job(tmp_path, "a", DOCUMENTS), make_job(tmp_path, "b", DOCUMENTS[::-1])
    outputs = run_backend(EncoderBackend(spec), *jobs)
    logits = torch.tensor([reference(model, document) for document in DOCUMENTS])
    assert len({round(float(logit), 3) for logit in logits}) == len(DOCUMENTS), "the scores differ"
    assert scores_of(outputs["a"]) == pytest.approx(logits.sigmoid().tolist(), abs=1e-5)
    assert scores_of(outputs["b"])[::-1] == pytest.approx(logits.sigmoid().tolist(), abs=1e-5)


@pytest.mark.parametrize(
    "fields",
    [
        {"sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity"}},
        {"sbert_ce_default_activation_function": "torch.nn.modules.linear.Identity"},
    ],
)
def test_the_files_say_whether_scores_are_logits(fields: dict[str, Any], tmp_path: Path) -> None:
    model = save(tmp_path, FAMILIES["bert"], **fields)
    spec = make_spec(path=str(tmp_path), device="cpu", task="scoring", max_model_len=128)
    [output] = run_backend(EncoderBackend(spec), make_job(tmp_path, "a", DOCUMENTS)).values()
    assert scores_of(output) == pytest.approx([reference(model, document) for document in DOCUMENTS], abs=1e-4)


def test_what_gives_no_single_score_is_refused_at_load(tmp_path: Path) -> None:
    save(tmp_path / "two", BertConfig(**SHAPE | {"num_labels": 2}))
    with pytest.raises(ValueError, match="2 outputs"):
        EncoderBackend(make_spec(path=str(tmp_path / "two"), device="cpu", task="scoring", max_model_len=128))
    save(tmp_path / "tanh", FAMILIES["bert"], sentence_transformers={"activation_fn": "torch.nn.Tanh"})
    with pytest.raises(ValueError, match="Tanh"):
        EncoderBackend(make_spec(path=str(tmp_path / "tanh"), device="cpu", task="scoring", max_model_len=128))
