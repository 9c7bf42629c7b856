"""Linear layers with int8 or int4 weights on a CPU, quantised at load, by torch's own operators.

int8 has one scale per output, int4 a scale and an offset per output and group of inputs. Activations are rounded to
bfloat16 for the product, for which these operators have vector instructions; with float32 they are several times slower
than plain float32. Everything outside of the linear layers stays as it is.
"""

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from domain.catalog import ModelSpec

log = logging.getLogger(__name__)

Kind = Literal["int8", "int4"]

LEAST_OUTPUTS = 64  # fewer are those of a router, whose close calls matter
GROUP_SIZE = 32  # inputs that share a scale in int4: the smallest, hence most exact, that the operator knows
OUTPUT_MULTIPLE = 16  # which the operators' blocks need
NUM_TIMED_PASSES = 3


class PackedWeight(Protocol):
    """A quantised matrix; `num_bytes` is what it takes."""

    num_bytes: int

    def multiply(self, rows: Tensor) -> Tensor:
        """bfloat16 (num_rows, num_in), contiguous, to (num_rows, num_out)."""


class Int8Weight:
    def __init__(self, weight: Tensor) -> None:
        """`weight` is (num_out, num_in)."""
        scales = (weight.abs().amax(1) / 127).clamp(min=torch.finfo(torch.float32).tiny).bfloat16()
        exact = scales.float()[:, None]  # of the rounded scale, so that its rounding adds no error
        self._weight = (weight / exact).round().clamp(-127, 127).to(torch.int8).contiguous()
        self._scales = scales
        self.num_bytes = self._weight.nbytes + scales.nbytes

    def multiply(self, rows: Tensor) -> Tensor:
        product: Tensor = torch.ops.aten._weight_int8pack_mm(rows, self._weight, self._scales)
        return product


class Int4Weight:
    def __init__(self, weight: Tensor) -> None:
        """`weight` is (num_out, num_in); a number is `(code - 8) * scale + offset`."""
        num_out, num_in = weight.shape
        groups = weight.view(num_out, -1, GROUP_SIZE)
        low, high = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)
        scales = ((high - low) / 15).clamp(min=torch.finfo(torch.float32).tiny).bfloat16()
        offsets = (low + 8 * scales.float()).bfloat16()
        codes = ((groups - offsets.float()) / scales.float()).round().add(8).clamp(0, 15).to(torch.int32)
        self._weight = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.view(num_out, num_in), 1)
        self._scales = torch.cat((scales, offsets), 2).transpose(0, 1).contiguous()
        self.num_bytes = self._weight.nbytes + self._scales.nbytes

    def multiply(self, rows: Tensor) -> Tensor:
        multiply = torch.ops.aten._weight_int4pack_mm_for_cpu
        product: Tensor = multiply(rows, self._weight, GROUP_SIZE, self._scales)
        return product


class QuantisedLinear(nn.Module):
    """Takes the place of a linear layer: same inputs, same type and shape of outputs."""

    def __init__(self, layer: nn.Linear, kind: Kind) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.dtype = layer.weight.dtype
        weight = layer.weight.detach().float().contiguous()
        self.packed: PackedWeight = Int4Weight(weight) if kind == "int4" else Int8Weight(weight)
        self.bias = layer.bias

    def forward(self, rows: Tensor) -> Tensor:
        flat = rows.reshape(-1, self.in_features).to(torch.bfloat16)
        outputs = self.packed.multiply(flat).to(rows.dtype).view(*rows.shape[:-1], self.out_features)
        return outputs if self.bias is None else outputs.add_(self.bias)


@torch.inference_mode()
def quantise(spec: ModelSpec, model: Any, device: torch.device) -> None:
    """Replace the model's linear layers as its entry asks for: `auto` is int8 if that is faster here. The float weights
    are freed. Raises ValueError if this device has no operators for it."""
    if spec.quantization == "none":
        return
    if device.type != "cpu":
        if spec.quantization == "auto":
            log.info("weights are not quantised: there are operators for a CPU only", extra={"model": spec.id})
            return
        raise ValueError(
            f"quantization of model {spec.id!r} is {spec.quantization!r}, which backend transformers does on a CPU "
            'only; remove it, or serve a quantised checkpoint with backend = "vllm"'
        )
    kind: Kind = "int4" if spec.quantization == "int4" else "int8"
    layers = _quantised_layers(model, kind)
    figures = _compare(model, layers, spec.max_num_seqs)
    is_faster = all(quantised < floating for floating, quantised in figures.values())
    words = ", ".join(
        f"{floating:.1f} ms with {num_rows} rows, quantised {quantised:.1f} ms"
        for num_rows, (floating, quantised) in figures.items()
    )
    if spec.quantization == "auto" and not is_faster:
        log.info("weights of %s stay as they are, since int8 is not faster: %s", spec.id, words)
        return
    if not is_faster:
        log.warning("weights of %s are %s, which is not faster on this machine: %s", spec.id, kind, words)
    else:
        log.info("weights of %s are %s: %s", spec.id, kind, words)
    for name, layer in layers.items():
        model.set_submodule(name, layer)


def _quantised_layers(model: Any, kind: Kind) -> dict[str, QuantisedLinear]:
    """By name. The output layer is int8 in any case, since the choice among all tokens hangs on it; the embedding that
    it may share its weight with is not changed."""
    output_layer = model.get_output_embeddings()
    return {
        name: QuantisedLinear(layer, "int8" if layer is output_layer else kind)
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and _can_quantise(layer)
    }


def _can_quantise(layer: nn.Linear) -> bool:
    num_out, num_in = layer.weight.shape
    fits = num_out % OUTPUT_MULTIPLE == 0 and num_in % GROUP_SIZE == 0
    return fits and num_out >= LEAST_OUTPUTS and layer.weight.is_floating_point()


def _compare(model: Any, layers: Mapping[str, QuantisedLinear], max_num_seqs: int) -> dict[int, tuple[float, float]]:
    """Milliseconds for all layers one after another, so that no weight is in a cache yet: as they are, and quantised;
    by number of rows: of one sequence, and of a full batch."""
    floating: dict[str, Callable[[Tensor], Tensor]] = {name: model.get_submodule(name).forward for name in layers}
    quantised: dict[str, Callable[[Tensor], Tensor]] = {name: layer.forward for name, layer in layers.items()}
    return {
        num_rows: (_milliseconds(floating, layers, num_rows), _milliseconds(quantised, layers, num_rows))
        for num_rows in sorted({1, max_num_seqs})
    }


def _milliseconds(
    forward_by_name: Mapping[str, Callable[[Tensor], Tensor]], layers: Mapping[str, QuantisedLinear], num_rows: int
) -> float:
    """The fastest of a few passes, since other processes only ever make one slower."""
    inputs = {
        (layer.in_features, layer.dtype): torch.ones(num_rows, layer.in_features, dtype=layer.dtype)
        for layer in layers.values()
    }
    rows_by_name = {name: inputs[layer.in_features, layer.dtype] for name, layer in layers.items()}
    seconds = []
    for _ in range(NUM_TIMED_PASSES):
        started = time.perf_counter()
        for name, forward in forward_by_name.items():
            forward(rows_by_name[name])
        seconds.append(time.perf_counter() - started)
    return min(seconds) * 1000
