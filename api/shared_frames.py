"""Bytes that several readers of one stream are sent, encoded for the first of them and kept for the others."""

from collections.abc import Callable

from domain.requests import TokenChunk

MAX_KEPT = 1_024  # frames, of the newest chunks; a reader that comes later has its own encoded

MAX_FRAME_BYTES = 16_384  # larger ones, as of logprobs, are encoded for each reader


class SharedFrames:
    """A live chunk is one object for all readers of a job, so its identity is the key; it is kept with its frame, so
    that no other object gets its place meanwhile."""

    def __init__(self) -> None:
        self._kept: dict[tuple[int, bool], tuple[TokenChunk, bytes]] = {}

    def of(self, chunk: TokenChunk, encode: Callable[[], bytes], *, with_token_ids: bool) -> bytes:
        key = (id(chunk), with_token_ids)
        found = self._kept.get(key)
        if found is None:
            encoded = encode()
            if len(encoded) > MAX_FRAME_BYTES:
                return encoded
            if len(self._kept) >= MAX_KEPT:
                del self._kept[next(iter(self._kept))]
            found = self._kept[key] = (chunk, encoded)
        return found[1]
