"""The text of /metrics, written beside the event loop, once for all who ask meanwhile.

To write it takes as long as answering thirty requests, so it takes a fifth of the time at most.
"""

import asyncio
import time

from prometheus_client import generate_latest

from api.shared_reads import SharedReads
from metrics import Process, registries

MAX_SHARE = 0.2


class Exposition:
    """Bound to one event loop."""

    def __init__(self) -> None:
        self._reads: SharedReads[bytes] = SharedReads()
        self._not_before = 0.0  # monotonic

    async def text(self) -> bytes:
        """Written after it was asked for."""
        return await self._reads.read("metrics", self._write)

    async def _write(self) -> bytes:
        await asyncio.sleep(max(0.0, self._not_before - time.monotonic()))
        began_at = time.monotonic()
        text = await asyncio.to_thread(generate_latest, registries[Process.API])
        ended_at = time.monotonic()
        self._not_before = ended_at + (ended_at - began_at) * (1 / MAX_SHARE - 1)
        return text
