"""Checks at load whether our paged attention can replace a model's own, by running both and comparing their logits."""

import inspect
import logging
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from gpu_worker.engine.cpu.attention import (
    ATTENTION_NAME,
    AttentionContext,
    BlockCache,
    DecodeGroup,
    PrefillSpan,
    paged_attention,
    register,
)
from gpu_worker.engine.cpu.runner import FusedLlama, can_fuse
from gpu_worker.engine.cuda.attention import LayerCache
from gpu_worker.engine.host_memory import lazy_zeros
from gpu_worker.engine.lora import Adapters
from gpu_worker.engine.quantization import QuantisedLinear

log = logging.getLogger(__name__)

PROBE_NAME = "celeriac_probe"
BLOCK_SIZE = 4
NUM_TOKENS = 22  # enough for two prompt chunks and two decodes that span several blocks
CHUNKS = (9, 11, 1, 1)

KNOWN_LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})
#: Keyword arguments that modules pass and attention may ignore. Any other argument, if set, could change the result.
IGNORED_ARGUMENTS = frozenset({"ctx", "use_cache", "position_ids", "cache_position", "position_embeddings"})
HONOURED_ARGUMENTS = frozenset(inspect.signature(paged_attention).parameters)
LONG_ROPE = "longrope"  # its frequencies depend on the longest sequence in the pass, which would affect all others


class NotPageable(Exception):
    """The model cannot use paged attention; the message says why."""


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What one attention layer passes to its attention function, as recorded by the probe."""

    key_shape: tuple[int, int]  # (num_kv_heads, dim)
    value_shape: tuple[int, int]
    dtype: torch.dtype
    window: int | None
    num_heads: int
    scale: float
    softcap: float | None
    has_sinks: bool

    @property
    def bytes_per_token(self) -> int:
        key_heads, key_dim = self.key_shape
        value_heads, value_dim = self.value_shape
        return (key_heads * key_dim + value_heads * value_dim) * self.dtype.itemsize

    def allocate(self, num_slots: int, device: torch.device) -> LayerCache:
        """Slots for a device. They are zeroed, since padding rows read them and must get finite numbers."""
        keys = torch.zeros(num_slots, *self.key_shape, dtype=self.dtype, device=device)
        return LayerCache(keys, torch.zeros(num_slots, *self.value_shape, dtype=self.dtype, device=device))

    def allocate_blocks(self, num_blocks: int, block_size: int, device: torch.device) -> BlockCache:
        """Blocks for a CPU, zeroed as well: by the kernel, page by page, as blocks come into use."""
        key_heads, key_dim = self.key_shape
        value_heads, value_dim = self.value_shape
        keys = _zeros((num_blocks, key_heads, block_size, key_dim), self.dtype, device)
        return BlockCache(keys, _zeros((num_blocks, value_heads, block_size, value_dim), self.dtype, device))


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.frombuffer(lazy_zeros(math.prod(shape) * dtype.itemsize), dtype=dtype).view(shape)


@dataclass(slots=True)
class Recording:
    shape_by_layer: dict[int, LayerShape] = field(default_factory=dict)
    num_calls: int = 0
    unknown_arguments: set[str] = field(default_factory=set)


def probe_layers(model: Any, max_model_len: int, device: torch.device) -> list[LayerShape]:
    """Return the shape of each layer's keys and values, and leave the model with our attention installed.

    Raises NotPageable if the model cannot use it. The model may then have any attention installed; the caller must
    restore its own.
    """
    register()
    AttentionInterface.register(PROBE_NAME, _record)
    try:
        return _probe(model, max_model_len, device)
    except NotPageable:
        raise
    except Exception as exc:
        # Third-party modules may raise anything when their attention is replaced; the model still runs unmodified.
        raise NotPageable(f"the probe failed with {type(exc).__name__}: {exc}") from exc


@torch.inference_mode()
def _probe(model: Any, max_model_len: int, device: torch.device) -> list[LayerShape]:
    config = model.config.get_text_config()
    _check_config(config, max_model_len)
    token_ids = _token_ids(model, device)
    model.set_attn_implementation("eager")
    expected = model(input_ids=token_ids, use_cache=False).logits[0].float()
    model.set_attn_implementation(PROBE_NAME)
    recording = Recording()
    model(input_ids=token_ids, use_cache=False, ctx=recording)
    shapes = _check_recording(recording, config, max_model_len)
    model.set_attn_implementation(ATTENTION_NAME)
    _compare(_run_paged(model, shapes, token_ids, device), expected, _coarsest_type(model, shapes))
    return shapes


@torch.inference_mode()
def fuse(model: Any, shapes: list[LayerShape], max_model_len: int, device: torch.device, adapters: Adapters) -> Any:
    """Return a fused version of the model if there is one and its logits agree, else the model. Call after
    `probe_layers`, whose result is `shapes`."""
    if not can_fuse(model):
        return model
    token_ids = _token_ids(model, device)
    expected = _run_paged(model, shapes, token_ids, device)
    try:
        fused = FusedLlama(model, [shape.window for shape in shapes], max_model_len, adapters)
        _compare(_run_paged(fused, shapes, token_ids, device), expected, _coarsest_type(model, shapes))
    except Exception as exc:
        # Some part of the model is not what the fused version expects; the model's own code can run it.
        log.warning("model runs unfused", extra={"error": repr(exc)})
        return model
    return fused


def _token_ids(model: Any, device: torch.device) -> Tensor:
    vocab_size = model.get_input_embeddings().weight.shape[0]
    return torch.randint(vocab_size, (1, NUM_TOKENS), generator=torch.Generator().manual_seed(0)).to(device)


def _check_config(config: Any, max_model_len: int) -> None:
    unknown = set(getattr(config, "layer_types", None) or ()) - KNOWN_LAYER_TYPES
    if unknown:
        raise NotPageable(f"it has layers of type {', '.join(sorted(unknown))}")
    for rope in _rope_parameters(config):
        if rope.get("rope_type") != LONG_ROPE:
            continue
        original: int = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        if max_model_len > original:
            raise NotPageable(
                f"its LongRoPE frequencies change for the whole batch once any text exceeds {original} tokens"
            )


def _rope_parameters(config: Any) -> list[dict[str, Any]]:
    """The model's rotary settings: one dict, or one per layer type."""
    rope = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in rope.values() if isinstance(value, dict)]
    return nested or [rope]


def _record(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    ctx: Recording | None = None,
    **arguments: Any,
) -> tuple[Tensor, None]:
    """An attention function that records its arguments and returns zeros of the right shape."""
    if ctx is None or attention_mask is not None:
        raise NotPageable("its layers do not pass our context to attention, or build their own attention mask")
    index = int(module.layer_idx)  # type: ignore[arg-type]
    ctx.num_calls += 1
    ctx.shape_by_layer[index] = LayerShape(
        key_shape=(key.shape[1], key.shape[3]),
        value_shape=(value.shape[1], value.shape[3]),
        dtype=key.dtype,
        window=arguments.get("sliding_window"),
        num_heads=query.shape[1],
        scale=arguments.get("scaling") or query.shape[3] ** -0.5,
        softcap=arguments.get("softcap"),
        has_sinks=arguments.get("s_aux") is not None,
    )
    known = HONOURED_ARGUMENTS | IGNORED_ARGUMENTS
    ctx.unknown_arguments |= {
        name for name, given in arguments.items() if name not in known and given is not None and given is not False
    }
    num_heads, num_tokens = query.shape[1:3]
    return query.new_zeros(1, num_tokens, num_heads, value.shape[3]), None


def _check_recording(recording: Recording, config: Any, max_model_len: int) -> list[LayerShape]:
    num_layers = config.num_hidden_layers
    if sorted(recording.shape_by_layer) != list(range(num_layers)) or recording.num_calls != num_layers:
        raise NotPageable(f"attention was called {recording.num_calls} times for {num_layers} layers")
    if recording.unknown_arguments:
        raise NotPageable(f"its attention takes {', '.join(sorted(recording.unknown_arguments))}")
    shapes = [recording.shape_by_layer[index] for index in range(num_layers)]
    window = getattr(config, "sliding_window", None)
    if window is not None and max_model_len > window:
        layer_types = getattr(config, "layer_types", None) or ["sliding_attention"] * num_layers
        for shape, layer_type in zip(shapes, layer_types, strict=True):
            if layer_type == "sliding_attention" and shape.window != window:
                raise NotPageable("its sliding-window layers do not pass their window to attention")
    return shapes


def _run_paged(model: Any, shapes: list[LayerShape], token_ids: Tensor, device: torch.device) -> Tensor:
    """Compute the sequence's logits chunk by chunk, then token by token, over blocks in reverse order.

    The result is float32 (NUM_TOKENS, vocab_size).
    """
    num_blocks = -(-NUM_TOKENS // BLOCK_SIZE) + 1
    layers = [shape.allocate_blocks(num_blocks, BLOCK_SIZE, device) for shape in shapes]
    blocks = torch.arange(num_blocks - 1, 0, -1, device=device)
    slots = (blocks[:, None] * BLOCK_SIZE + torch.arange(BLOCK_SIZE, device=device)).view(-1)
    logits: list[Tensor] = []
    start = 0
    for size in CHUNKS:
        stop = start + size
        is_decode = size == 1
        table = blocks[None, : -(-stop // BLOCK_SIZE)]
        ctx = AttentionContext(
            layers=layers,
            slots=slots[start:stop],
            decodes=[DecodeGroup(table, 0, 1, [stop])] if is_decode else [],
            prefills=[] if is_decode else [PrefillSpan(table, 0, size, start)],
        )
        output = model(
            input_ids=token_ids[:, start:stop],
            position_ids=torch.arange(start, stop, device=device)[None],
            use_cache=False,
            logits_to_keep=torch.arange(size, device=device),
            ctx=ctx,
        )
        logits.append(output.logits[0].float())
        start = stop
    return torch.cat(logits)


def _coarsest_type(model: Any, shapes: list[LayerShape]) -> torch.dtype:
    """To which activations are rounded on their way through the model."""
    is_quantised = any(isinstance(module, QuantisedLinear) for module in model.modules())
    return torch.bfloat16 if is_quantised else shapes[0].dtype


def _compare(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    tolerance = (1e-3 if dtype == torch.float32 else 5e-2) * max(1.0, expected.abs().max().item())
    difference = (actual - expected).abs().max().item() if actual.shape == expected.shape else float("inf")
    if not difference <= tolerance:
        raise NotPageable(f"its logits differ by {difference:.2g} from those of its own attention")
