"""Decode passes captured as CUDA graphs and replayed: one launch per pass instead of hundreds.

There is one graph for each of a series of batch sizes; a batch is padded to the smallest size that holds it. Graphs
read the tensors of PassInputs. Only one graph runs at a time, so they share a memory pool, except for their outputs.
"""

import logging
import time
from collections.abc import Callable

import torch
from torch import Tensor

log = logging.getLogger(__name__)

NUM_WARM_UPS = 2  # runs before the capture, to compile kernels and load libraries

#: Captures a pass. Calling the result replays it on the current content of its inputs and returns its output.
Capture = Callable[[Callable[[], Tensor]], Callable[[], Tensor]]


def batch_sizes(max_num_seqs: int) -> list[int]:
    """1, 2, 4, 8, then in steps of 8 up to 32, of 16 up to 128, and of 32 beyond; `max_num_seqs` is always included."""
    sizes = [1, 2, 4, *range(8, 32, 8), *range(32, 128, 16), *range(128, 1025, 32)]
    return [size for size in sizes if size < max_num_seqs] + [max_num_seqs]


class CudaCapture:
    """Captures passes on a stream of its own, into one memory pool."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def __call__(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for _ in range(NUM_WARM_UPS):
                run()
        torch.cuda.current_stream().wait_stream(self._stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            output = run()

        def replay() -> Tensor:
            graph.replay()
            return output

        return replay


class DecodeGraphs:
    def __init__(self) -> None:
        self._replay_by_size: dict[int, Callable[[], Tensor]] = {}

    @property
    def sizes(self) -> list[int]:
        return sorted(self._replay_by_size)

    def size_for(self, num_rows: int) -> int | None:
        """The smallest captured batch size for this many rows; None if there is none."""
        return next((size for size in self.sizes if size >= num_rows), None)

    def replay(self, size: int) -> Tensor:
        """Run the pass and return its output, which is valid until the next replay of any size."""
        return self._replay_by_size[size]()

    def capture_all(
        self,
        make_pass: Callable[[int], Callable[[], Tensor]],
        sizes: list[int],
        capture: Capture,
        has_room: Callable[[], bool],
    ) -> None:
        """Capture passes of these batch sizes, largest first, since the smaller ones then reuse its memory. Sizes that
        cannot be captured are logged and will run eagerly."""
        started = time.monotonic()
        for size in sorted(sizes, reverse=True):
            if not has_room():
                log.warning("no memory left for more decode graphs", extra={"batch_size": size})
                break
            if not self._capture(make_pass, size, capture):
                break
            log.debug("decode graph captured", extra={"batch_size": size})
        log.info("decode graphs", extra={"batch_sizes": self.sizes, "seconds": time.monotonic() - started})

    def _capture(self, make_pass: Callable[[int], Callable[[], Tensor]], size: int, capture: Capture) -> bool:
        try:
            self._replay_by_size[size] = capture(make_pass(size))
        except torch.AcceleratorError as exc:
            if not _is_capture_error(exc):
                raise
            log.warning("decode passes run eagerly", extra={"batch_size": size, "reason": _first_line(exc)})
            return False
        except Exception as exc:
            # A model may do work on the host that cannot be captured, such as dynamic rotary frequencies or choosing
            # experts in Python.
            log.warning("decode passes run eagerly", extra={"batch_size": size, "reason": _first_line(exc)})
            return False
        return True


def _is_capture_error(exc: Exception) -> bool:
    """Whether the device only refused an operation during capture, so that its context is still usable."""
    return "capturing" in str(exc) or "capture" in str(exc)


def _first_line(exc: Exception) -> str:
    return f"{type(exc).__name__}: {str(exc).partition(chr(10))[0]}"
