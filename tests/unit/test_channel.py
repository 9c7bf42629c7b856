"""Frames over a socket pair: whole, in order, and never a reader who stalls the writer."""

import socket
from collections.abc import Iterator

import pytest

from gpu_worker.engine_process.frames import MAX_FRAME_BYTES, FrameSocket, PeerClosed


@pytest.fixture
def ends() -> Iterator[tuple[FrameSocket, FrameSocket]]:
    left, right = (FrameSocket(sock) for sock in socket.socketpair())
    yield left, right
    left.close()
    right.close()


def receive(receiver: FrameSocket, sender: FrameSocket, num_frames: int) -> list[bytes]:
    frames: list[bytes] = []
    while len(frames) < num_frames:
        sender.flush()
        frames += receiver.receive()
    return frames


def test_frames_of_every_size_arrive_whole_and_in_order(ends: tuple[FrameSocket, FrameSocket]) -> None:
    left, right = ends
    sent = [b"", b"x", b"y" * 70_000, b"z" * 3_000_000, b"end"]
    for frame in sent:
        left.send(frame)
    assert receive(right, left, len(sent)) == sent


def test_sending_to_one_who_does_not_read_returns_at_once(ends: tuple[FrameSocket, FrameSocket]) -> None:
    left, right = ends
    left.send(b"x" * 10_000_000)
    assert left.has_outgoing
    assert receive(right, left, 1) == [b"x" * 10_000_000]
    assert not left.has_outgoing


def test_what_came_before_the_end_is_read_before_the_end_is_told(ends: tuple[FrameSocket, FrameSocket]) -> None:
    left, right = ends
    left.send(b"last words")
    left.close()
    assert right.receive() == [b"last words"]
    with pytest.raises(PeerClosed):
        right.receive()


def test_writing_to_one_who_is_gone_is_told(ends: tuple[FrameSocket, FrameSocket]) -> None:
    left, right = ends
    right.close()
    with pytest.raises(PeerClosed):
        left.send(b"anyone?")


def test_a_frame_beyond_the_limit_is_refused_on_both_sides(ends: tuple[FrameSocket, FrameSocket]) -> None:
    left, right = ends
    with pytest.raises(ValueError, match="exceeds"):
        left.send(bytes(MAX_FRAME_BYTES + 1))
    left._socket.send((MAX_FRAME_BYTES + 1).to_bytes(4))
    with pytest.raises(PeerClosed, match="sent a frame"):
        right.receive()
