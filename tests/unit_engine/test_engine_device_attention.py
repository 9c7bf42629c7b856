"""The index arithmetic of paged attention on a device, held against plain arithmetic on a CPU."""

import importlib.util
import os
from typing import Any

import pytest
import torch

from gpu_worker.engine.cuda.attention import DeviceAttention, TritonAttention, VarlenAttention
from gpu_worker.engine.cuda.backend import WrongResult, check_attention, choose_attention
from gpu_worker.engine.probe import LayerShape, NotPageable
from tests.reference_varlen import varlen_attn

CPU = torch.device("cpu")
HAS_INTERPRETER = importlib.util.find_spec("triton") is not None and os.environ.get("TRITON_INTERPRET") == "1"
needs_interpreter = pytest.mark.skipif(
    not HAS_INTERPRETER, reason="needs triton, a large package of the CUDA builds, and TRITON_INTERPRET=1"
)


def make_shape(**changes: Any) -> LayerShape:
    values: dict[str, Any] = {
        "key_shape": (2, 16),
        "value_shape": (2, 16),
        "dtype": torch.float32,
        "window": None,
        "num_heads": 4,
        "scale": 0.25,
        "softcap": None,
        "has_sinks": False,
    }
    return LayerShape(**values | changes)


PLAIN = {
    "grouped heads": make_shape(),
    "one head each": make_shape(num_heads=2),
    "many heads to one": make_shape(key_shape=(1, 16), value_shape=(1, 16), num_heads=20),
    "odd head size": make_shape(key_shape=(2, 24), value_shape=(2, 24)),
    "values narrower than keys": make_shape(key_shape=(2, 24), value_shape=(2, 16)),
    "window within a block": make_shape(window=5),
    "window over blocks": make_shape(window=40),
    "half precision": make_shape(dtype=torch.bfloat16),
}
CAPPED = {
    "softcap": make_shape(softcap=2.0),
    "sinks": make_shape(has_sinks=True),
    "softcap, sinks and window": make_shape(softcap=2.0, has_sinks=True, window=20),
}


@pytest.mark.parametrize("block_size", [16, 256])
@pytest.mark.parametrize("shape", PLAIN.values(), ids=PLAIN)
def test_varlen_attention_reads_the_right_tokens(shape: LayerShape, block_size: int) -> None:
    check_attention(VarlenAttention(varlen_attn), shape, block_size, CPU)


#: The interpreter multiplies bfloat16 as if it were integers; float16 it knows.
INTERPRETED = PLAIN | CAPPED | {"half precision": make_shape(dtype=torch.float16)}


@needs_interpreter
@pytest.mark.parametrize(("block_size", "num_processors"), [(16, 1), (16, 60), (256, 2)])
@pytest.mark.parametrize("shape", INTERPRETED.values(), ids=INTERPRETED)
def test_the_kernels_read_the_right_tokens(shape: LayerShape, block_size: int, num_processors: int) -> None:
    check_attention(TritonAttention(num_processors), shape, block_size, CPU)


class Shifted(VarlenAttention):
    """Off by one block."""

    def _attend(self, query: Any, layer: Any, group: Any, block_size: int, scoring: Any) -> Any:
        layer.keys.copy_(layer.keys.roll(block_size, 0))
        return super()._attend(query, layer, group, block_size, scoring)


@pytest.mark.parametrize("shape", PLAIN.values(), ids=PLAIN)
def test_a_wrong_kernel_is_found_out(shape: LayerShape) -> None:
    with pytest.raises(WrongResult):
        check_attention(Shifted(varlen_attn), shape, 16, CPU)


def test_a_write_that_went_elsewhere_is_found_out() -> None:
    class Careless(VarlenAttention):
        def write(self, layer: Any, slots: Any, key: Any, value: Any) -> None:
            layer.write(slots.flip(0), key, value)

    with pytest.raises(WrongResult):
        check_attention(Careless(varlen_attn), make_shape(), 16, CPU)


def test_a_device_that_has_none_of_them_is_refused() -> None:
    with pytest.raises(NotPageable, match="no attention kernel supports its layers on cpu"):
        choose_attention([make_shape()], 16, CPU)


def test_varlen_attention_refuses_what_it_does_not_know() -> None:
    attention: DeviceAttention = VarlenAttention(varlen_attn)
    for shape in CAPPED.values():
        with pytest.raises(NotImplementedError):
            check_attention(attention, shape, 16, CPU)
