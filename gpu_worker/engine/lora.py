"""LoRA adapters of one model, several in one batch (Hu et al. 2021; the files and the scaling are PEFT's).

The rows of a pass are the tokens of many sequences. Each adapter of the pass adds its share to the output of the layers
that it changes, in its own rows only, so that other rows keep their bits.
"""

import logging
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Rows
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from domain.catalog import ModelSpec
from gpu_worker.engine.quantization import QuantisedLinear
from gpu_worker.engine.scheduler import ScheduledRow
from text.adapters import AdapterFiles, LayerSize, read_adapters

log = logging.getLogger(__name__)

NUM_CHECKED_TOKENS = 3


@dataclass(frozen=True, slots=True)
class LowRank:
    """What one adapter adds to one layer: `rows @ down @ up`."""

    down: Tensor  # (num_in, rank): A, transposed
    up: Tensor  # (rank, num_out): B, transposed and scaled


@dataclass(frozen=True, slots=True)
class AdapterRows:
    name: str
    rows: Tensor | None  # int64: which rows of the pass; None for all


class Adapters:
    """The adapters of one model; of a model without any by default. Their share is added only within `applied`."""

    def __init__(self, by_module: Mapping[nn.Module, Mapping[str, LowRank]] | None = None) -> None:
        self._by_module = by_module or {}
        self._applied: list[AdapterRows] = []
        self._num_rows = 0
        names = {name for pairs in self._by_module.values() for name in pairs}
        self.names: frozenset[str] = frozenset(names)

    def parts(self, *modules: nn.Module) -> "tuple[LoraPart, ...]":
        """What to add to the outputs of `modules`, which lie side by side in one matrix. Empty if no adapter changes
        any of them."""
        parts: list[LoraPart] = []
        start = 0
        for module in modules:
            stop = start + int(module.out_features)  # type: ignore[arg-type]
            if module in self._by_module:
                parts.append(LoraPart(self, self._by_module[module], start, stop))
            start = stop
        return tuple(parts)

    @contextmanager
    def applied(self, rows: Rows[ScheduledRow], device: torch.device) -> Iterator[None]:
        """Within this context, the model runs a pass over the new tokens of `rows`, in this order."""
        names = [row.sequence.job.adapter for row in rows for _ in range(row.num_new_tokens)] if self.names else []
        self._num_rows = len(names)
        self._applied = [
            AdapterRows(name, None if set(names) == {name} else _places(names, name, device))
            for name in dict.fromkeys(names)
            if name is not None
        ]
        try:
            yield
        finally:
            self._applied = []

    @contextmanager
    def applied_alone(self, name: str | None) -> Iterator[None]:
        """Within this context, all rows are those of one adapter, or of none."""
        self._applied = [] if name is None else [AdapterRows(name, None)]
        try:
            yield
        finally:
            self._applied = []

    def add(self, pairs: Mapping[str, LowRank], inputs: Tensor, outputs: Tensor) -> None:
        """Add to `outputs`, (num_rows, num_out), what the adapters of the pass make of `inputs`, (num_rows, num_in)."""
        for adapter in self._applied:
            pair = pairs.get(adapter.name)
            if pair is None:
                continue
            if adapter.rows is None:
                outputs.addmm_(inputs @ pair.down, pair.up)
                continue
            if inputs.shape[0] != self._num_rows:
                raise RuntimeError(f"a layer with adapters ran {inputs.shape[0]} of {self._num_rows} rows")
            outputs.index_add_(0, adapter.rows, inputs.index_select(0, adapter.rows) @ pair.down @ pair.up)


def _places(names: list[str | None], name: str, device: torch.device) -> Tensor:
    return torch.tensor([place for place, other in enumerate(names) if other == name], device=device)


@dataclass(frozen=True, slots=True)
class LoraPart:
    """The columns of a matrix product that belong to one layer with adapters."""

    adapters: Adapters
    pairs: Mapping[str, LowRank]
    start: int
    stop: int

    def add_to(self, outputs: Tensor, inputs: Tensor) -> None:
        self.adapters.add(self.pairs, inputs, outputs[:, self.start : self.stop])

    def hook(self, module: nn.Module, inputs: tuple[Tensor, ...], outputs: Tensor) -> None:
        """A forward hook for a layer that runs by itself."""
        self.add_to(outputs.view(-1, outputs.shape[-1]), inputs[0].reshape(-1, inputs[0].shape[-1]))


@torch.inference_mode()
def load_adapters(spec: ModelSpec, model: Any) -> Adapters:
    """Load the adapters of the model's entry and hook them into its layers. Raises ValueError, which names the adapter,
    the file and the layer."""
    by_module: dict[nn.Module, dict[str, LowRank]] = {}
    for name, files in read_adapters(spec).items():
        try:
            for module, pair in _load(model, files).items():
                by_module.setdefault(module, {})[name] = pair
        except (ValueError, SafetensorError) as exc:
            raise ValueError(f"adapter {name!r}: {exc}") from exc
        log.info("adapter loaded", extra={"model": spec.id, "adapter": name, "num_layers": len(files.size_by_module)})
    adapters = Adapters(by_module)
    for module in by_module:
        [part] = adapters.parts(module)
        module.register_forward_hook(part.hook)
    if by_module:
        _refuse_partial(model, adapters, by_module)
    return adapters


def _load(model: Any, files: AdapterFiles) -> dict[nn.Module, LowRank]:
    modules = find_layers(model, files)
    pairs: dict[nn.Module, LowRank] = {}
    device = model.get_input_embeddings().weight.device
    with safe_open(files.weights, framework="pt") as tensors:
        for name, module in modules.items():
            down, up = (tensors.get_tensor(files.tensor_name(name, half)) for half in "AB")
            if not (torch.isfinite(down).all() and torch.isfinite(up).all()):
                raise ValueError(f"{files.weights.name}: {name} has numbers that are not finite; train it again")
            dtype = module.dtype if isinstance(module, QuantisedLinear) else module.weight.dtype
            pairs[module] = LowRank(
                down.t().to(device, dtype).contiguous(), (up.t().float() * files.scaling).to(device, dtype).contiguous()
            )
    return pairs


def find_layers(model: Any, files: AdapterFiles) -> dict[str, nn.Linear | QuantisedLinear]:
    """The layers that the adapter changes, by name. Raises ValueError for one that the model does not have so."""
    return {name: _find(model, files, name, size) for name, size in files.size_by_module.items()}


def _find(model: Any, files: AdapterFiles, name: str, size: LayerSize) -> nn.Linear | QuantisedLinear:
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise ValueError(f"{files.weights.name}: the model has no {name}; use the model that it was made for") from None
    if not isinstance(module, nn.Linear | QuantisedLinear) or module is model.get_output_embeddings():
        raise ValueError(
            f"{files.weights.name}: {name} is a {type(module).__name__} that adapters cannot change here; merge the "
            "adapter into its model"
        )
    if (module.in_features, module.out_features) != (size.num_in, size.num_out):
        raise ValueError(
            f"{files.weights.name}: {name} is for a layer of {size.num_in} x {size.num_out}, but the model's has "
            f"{module.in_features} x {module.out_features}; use the model that it was made for"
        )
    return module


def _refuse_partial(model: Any, adapters: Adapters, by_module: Mapping[nn.Module, object]) -> None:
    """Raise ValueError for layers that do not see each token of a pass once, such as those of experts."""
    num_rows = dict.fromkeys(by_module, 0)

    def count(module: nn.Module, inputs: tuple[Tensor, ...], _: Tensor) -> None:
        num_rows[module] += inputs[0].numel() // inputs[0].shape[-1]

    handles = [module.register_forward_hook(count) for module in by_module]
    try:
        device = model.get_input_embeddings().weight.device
        model(input_ids=torch.zeros(1, NUM_CHECKED_TOKENS, dtype=torch.int64, device=device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    names = {module: name for name, module in model.named_modules()}
    for module, count_of in num_rows.items():
        if count_of != NUM_CHECKED_TOKENS:
            raise ValueError(f"adapters change {names[module]}, which does not run for every token; merge them")
