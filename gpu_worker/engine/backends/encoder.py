"""The back end for embedding and scoring models.

An embedding model's last hidden states are pooled for each input as the model's files specify. It serves encoders (BERT
and its family) and decoders that were trained for embeddings. PackedEmbedder shares a model with the paged runner and
uses its attention without a cache. PaddedEmbedder is for models that keep their own attention, which most encoders do.
A scoring model, or cross-encoder, has one output for a query and an input together.
"""

import json
from collections.abc import Callable
from collections.abc import Sequence as Rows
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from domain.catalog import ModelSpec
from domain.errors import UnsupportedParameter
from gpu_worker.engine.backends import LoadedModel, RecordStep
from gpu_worker.engine.cpu.attention import ATTENTION_NAME, AttentionContext, BlockCache, PrefillSpan, group_by_length
from gpu_worker.engine.cuda.attention import ATTENTION_NAME as DEVICE_ATTENTION_NAME
from gpu_worker.engine.embedding_queue import Embed, EmbeddingQueue, encode_score, encode_vector
from gpu_worker.engine.families import FAMILIES, Family
from gpu_worker.engine.loading import (
    check_length,
    choose_device,
    load_model,
    load_tokenizer,
    set_threads,
    vocab_size,
)
from gpu_worker.engine_process.frames import AddJob, EmbedJob, EngineStats, StepDone
from text.model_files import model_folder, read_json_file

Pooling = Literal["mean", "cls", "last"]

#: By the flags in sentence-transformers' 1_Pooling/config.json.
POOLING_BY_FLAG: dict[str, Pooling] = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_lasttoken": "last",
}

KNOWN_MODULES = frozenset({"Transformer", "Pooling", "Normalize"})


def make_embedding_queue(spec: ModelSpec, model: Any, device: torch.device) -> EmbeddingQueue:
    """A queue for the model's embedding jobs. Raises ValueError if its files specify an unsupported pooling."""
    pooling = read_pooling(spec, model.config.get_text_config().model_type)
    embed: Embed
    if model.config._attn_implementation == ATTENTION_NAME:
        embed = PackedEmbedder(model.base_model, pooling, device)
    elif model.config._attn_implementation == DEVICE_ATTENTION_NAME:
        embed = Unhooked(model, PaddedEmbedder(model.base_model, pooling, device, max_group=spec.max_num_seqs))
    else:
        max_group = spec.max_num_seqs if spec.task == "embedding" else 1  # padding could change a recurrent state
        embed = PaddedEmbedder(model.base_model, pooling, device, max_group=max_group)
    return EmbeddingQueue(
        embed,
        vocab_size=vocab_size(model),
        max_input_tokens=spec.max_model_len,
        max_step_tokens=spec.max_num_batched_tokens,
        encode=encode_vector,
        fatal=(torch.AcceleratorError,),
    )


def make_scoring_queue(spec: ModelSpec, model: Any, device: torch.device) -> EmbeddingQueue:
    """A queue for the model's scoring jobs. Raises ValueError if the model does not give one score."""
    if model.config.num_labels != 1:
        raise ValueError(f"model {spec.id!r} has {model.config.num_labels} outputs; a model that scores pairs has one")
    return EmbeddingQueue(
        PairScorer(spec, model, device),
        vocab_size=model.get_input_embeddings().weight.shape[0],
        max_input_tokens=spec.max_model_len,
        max_step_tokens=spec.max_num_batched_tokens,
        encode=encode_score,
        fatal=(torch.AcceleratorError,),
    )


def read_pooling(spec: ModelSpec, model_type: str) -> Pooling:
    """The pooling that the model's sentence-transformers files specify, else that of its family. Vectors are normalised
    in any case. Raises ValueError if it is not supported."""
    folder = Path(spec.path) if Path(spec.path).is_dir() else model_folder(spec)
    modules = folder / "modules.json"
    if modules.is_file():
        kinds = {module["type"].rpartition(".")[2] for module in json.loads(modules.read_text())}
        if unknown := kinds - KNOWN_MODULES:
            raise ValueError(f"model {spec.id!r} has modules of unsupported type: {', '.join(sorted(unknown))}")
    config = folder / "1_Pooling" / "config.json"
    if not config.is_file():
        return FAMILIES.get(model_type, Family()).pooling
    flags = {
        name for name, value in json.loads(config.read_text()).items() if name.startswith("pooling_mode_") and value
    }
    if len(flags) != 1 or not flags <= POOLING_BY_FLAG.keys():
        raise ValueError(
            f"model {spec.id!r} pools by {', '.join(sorted(flags))}; supported is one of mean, cls and lasttoken"
        )
    return POOLING_BY_FLAG[flags.pop()]


class NoCache(BlockCache):
    """Stands in for a layer's cache: an embedding's keys and values are needed only in its own pass."""

    def write(self, rows: Tensor, key: Tensor, value: Tensor) -> None:
        """Does nothing."""


class PackedEmbedder:
    """Runs all inputs in one row, each attending only to itself, like the paged runner's prompts."""

    def __init__(self, base_model: Any, pooling: Pooling, device: torch.device) -> None:
        self._base_model = base_model
        self._pooling = pooling
        self._device = device
        nothing = torch.empty(1, 1, 1, 1, device=device)
        self._layers: list[BlockCache] = [
            NoCache(nothing, nothing)
        ] * base_model.config.get_text_config().num_hidden_layers

    @torch.inference_mode()
    def __call__(self, inputs: Rows[Rows[int]]) -> NDArray[np.float32]:
        no_slots = torch.empty(0, dtype=torch.int64, device=self._device)
        no_blocks = no_slots[None]
        spans: list[PrefillSpan] = []
        for token_ids in inputs:
            start = spans[-1].stop if spans else 0
            spans.append(PrefillSpan(no_blocks, start, start + len(token_ids), 0))
        context = AttentionContext(layers=self._layers, slots=no_slots, decodes=[], prefills=spans)
        output = self._base_model(
            input_ids=torch.tensor([[token_id for ids in inputs for token_id in ids]], device=self._device),
            position_ids=torch.tensor([[at for ids in inputs for at in range(len(ids))]], device=self._device),
            use_cache=False,
            ctx=context,
        )
        states = output.last_hidden_state[0]
        return _stack([pool(states[span.start : span.stop], self._pooling) for span in spans])


class PaddedEmbedder:
    """Runs inputs of similar length side by side, padded on the right."""

    def __init__(self, base_model: Any, pooling: Pooling, device: torch.device, *, max_group: int) -> None:
        self._base_model = base_model
        self._pooling = pooling
        self._device = device
        self._max_group = max_group
        self._padding = getattr(base_model.config.get_text_config(), "pad_token_id", None) or 0

    @torch.inference_mode()
    def __call__(self, inputs: Rows[Rows[int]]) -> NDArray[np.float32]:
        return _stack(in_groups(inputs, self._embed, max_group=self._max_group))

    def _embed(self, inputs: Rows[Rows[int]]) -> list[Tensor]:
        output = self._base_model(**padded(inputs, self._padding, self._device))
        states = output.last_hidden_state
        return [pool(states[row, : len(ids)], self._pooling) for row, ids in enumerate(inputs)]


class PairScorer:
    """Scores pairs of similar length side by side, padded on the right, as sentence-transformers' CrossEncoder does."""

    def __init__(self, spec: ModelSpec, model: Any, device: torch.device) -> None:
        self._model = model
        self._device = device
        self._padding = model.config.pad_token_id
        self._max_group = 1 if self._padding is None else spec.max_num_seqs
        self._separator_id = separator_id(spec, model)
        self._is_sigmoid = read_is_sigmoid(spec)

    @torch.inference_mode()
    def __call__(self, inputs: Rows[Rows[int]]) -> NDArray[np.float32]:
        return _stack(in_groups(inputs, self._score, max_group=self._max_group))

    def _score(self, inputs: Rows[Rows[int]]) -> list[Tensor]:
        arguments = padded(inputs, self._padding or 0, self._device)
        if self._separator_id is not None:
            is_separator = (arguments["input_ids"] == self._separator_id).to(torch.int64)
            num_before = is_separator.cumsum(1) - is_separator
            arguments["token_type_ids"] = (num_before > 0).to(torch.int64) * arguments["attention_mask"]
        logits = self._model(**arguments).logits.float()
        return list(logits.sigmoid() if self._is_sigmoid else logits)


def separator_id(spec: ModelSpec, model: Any) -> int | None:
    """The token that ends a query, if the model tells the two texts of a pair by token types."""
    if (getattr(model.config, "type_vocab_size", None) or 0) < 2:
        return None
    pair = load_tokenizer(spec).encode("a", "b")
    num_first = pair.type_ids.count(0)
    return None if num_first == len(pair.ids) else int(pair.ids[num_first - 1])


def read_is_sigmoid(spec: ModelSpec) -> bool:
    """Whether scores go through a sigmoid, which is sentence-transformers' default. Raises ValueError."""
    config = read_json_file(model_folder(spec) / "config.json")
    chosen = (config.get("sentence_transformers") or {}).get("activation_fn")
    name = str(chosen or config.get("sbert_ce_default_activation_function") or "Sigmoid").rpartition(".")[2]
    if name not in ("Sigmoid", "Identity"):
        raise ValueError(f"model {spec.id!r} has activation {name!r}; supported are Sigmoid and Identity")
    return name == "Sigmoid"


def in_groups(
    inputs: Rows[Rows[int]], run: Callable[[Rows[Rows[int]]], list[Tensor]], *, max_group: int
) -> list[Tensor]:
    """What `run` makes of groups of inputs of similar length, in the order of the inputs."""
    order = sorted(range(len(inputs)), key=lambda place: len(inputs[place]), reverse=True)
    results: dict[int, Tensor] = {}
    for start, stop in group_by_length([len(inputs[place]) for place in order]):
        for first in range(start, stop, max_group):
            places = order[first : min(first + max_group, stop)]
            results |= zip(places, run([inputs[place] for place in places]), strict=True)
    return [results[place] for place in range(len(inputs))]


def padded(inputs: Rows[Rows[int]], padding: int, device: torch.device) -> dict[str, Tensor]:
    """The arguments of a model for inputs side by side, padded on the right: int64 (num_inputs, longest) each."""
    longest = max(map(len, inputs))
    rows = [[*ids, *[padding] * (longest - len(ids))] for ids in inputs]
    lengths = torch.tensor([len(ids) for ids in inputs], device=device)
    mask = torch.arange(longest, device=device) < lengths[:, None]
    return {"input_ids": torch.tensor(rows, device=device), "attention_mask": mask.to(torch.int64)}


class Unhooked:
    """Wraps a model on which the CUDA path's attention is installed, which cannot embed whole inputs: for the duration
    of a pass, the model gets transformers' own attention back."""

    def __init__(self, model: Any, embed: Embed) -> None:
        self._model = model
        self._embed = embed

    def __call__(self, inputs: Rows[Rows[int]]) -> NDArray[np.float32]:
        self._model.set_attn_implementation("sdpa")
        try:
            return self._embed(inputs)
        finally:
            self._model.set_attn_implementation(DEVICE_ATTENTION_NAME)


def pool(states: Tensor, pooling: Pooling) -> Tensor:
    """One vector, float32 (width,), from one input's hidden states, (num_tokens, width), without padding."""
    if pooling == "mean":
        return states.float().mean(0)
    return states[0 if pooling == "cls" else -1].float()


def _stack(vectors: Rows[Tensor]) -> NDArray[np.float32]:
    array: NDArray[np.float32] = torch.stack(list(vectors)).cpu().numpy()
    return array


class EncoderBackend:
    def __init__(self, spec: ModelSpec) -> None:
        device = choose_device(spec)
        model = load_model(spec, device)
        if model.config.is_encoder_decoder:
            raise ValueError(f"model {spec.id!r} is an encoder-decoder; choose a model that is one or the other")
        model.config.use_cache = False
        check_length(spec, model)
        set_threads(model)
        self._spec = spec
        make_queue = make_scoring_queue if spec.task == "scoring" else make_embedding_queue
        self._embeddings = make_queue(spec, model, device)
        self._loaded = LoadedModel(device=str(device), num_cache_tokens=0)
        self._num_steps = 0

    @property
    def loaded(self) -> LoadedModel:
        return self._loaded

    @property
    def has_work(self) -> bool:
        return self._embeddings.has_work

    def add(self, command: AddJob) -> None:
        raise UnsupportedParameter(f"{self._spec.id} does not generate text", param="model")

    def embed(self, command: EmbedJob) -> None:
        self._embeddings.add(command)

    def abort(self, job_id: str, attempt: int, reason: str) -> None:
        self._embeddings.abort(job_id, attempt, reason)

    def step(self, record: RecordStep) -> StepDone:
        self._num_steps += 1
        return self._embeddings.step(record, None, self.stats)

    def stats(self) -> EngineStats:
        return EngineStats(
            num_steps=self._num_steps,
            num_running=self._embeddings.num_jobs,
            num_prompt_tokens=self._embeddings.num_tokens,
            memory_bytes=torch.cuda.memory_allocated() if torch.cuda.is_available() else 0,
        )
