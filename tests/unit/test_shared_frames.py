"""Readers of one stream share the bytes of a chunk."""

from api.shared_frames import MAX_KEPT, SharedFrames
from domain.requests import TokenChunk


def test_a_chunk_is_encoded_once_for_all_who_want_the_same_of_it() -> None:
    frames, encoded = SharedFrames(), []

    def encode() -> bytes:
        encoded.append(1)
        return b"frame %d" % len(encoded)

    chunk = TokenChunk(sequence_number=1, text="a", token_ids=(1,))
    assert {frames.of(chunk, encode, with_token_ids=False) for _ in range(3)} == {b"frame 1"}
    assert frames.of(chunk, encode, with_token_ids=True) == b"frame 2"


def test_only_frames_of_the_newest_chunks_are_kept() -> None:
    frames = SharedFrames()
    chunks = [TokenChunk(sequence_number=number, text="a", token_ids=(1,)) for number in range(1, MAX_KEPT + 2)]
    for chunk in chunks:
        frames.of(chunk, lambda: b"first", with_token_ids=False)
    assert frames.of(chunks[0], lambda: b"second", with_token_ids=False) == b"second"
    assert frames.of(chunks[-1], lambda: b"second", with_token_ids=False) == b"first"
