"""Whole frames over one end of a socket pair: a 4-byte big-endian length, then that many bytes."""

import fcntl
import select
import socket
import struct
import termios

MAX_FRAME_BYTES = 64 * 1024 * 1024
READ_BYTES = 256 * 1024

_LENGTH = struct.Struct(">I")


class ChannelClosed(Exception):
    """The other end is gone, or speaks something else."""


class Channel:
    """Reads never block; writes are kept until the other end takes them, so that a stalled reader stalls nobody."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._socket = sock
        self._incoming = bytearray()
        self._outgoing = bytearray()

    def fileno(self) -> int:
        return self._socket.fileno()

    @property
    def has_outgoing(self) -> bool:
        """Whether `flush` has something left: then wait for the socket to be writable too."""
        return bool(self._outgoing)

    def send(self, frame: bytes) -> None:
        """Queue one frame and write what the socket takes. Raises ChannelClosed, and ValueError for one too long."""
        if len(frame) > MAX_FRAME_BYTES:
            raise ValueError(f"a frame of {len(frame)} bytes exceeds {MAX_FRAME_BYTES}; send less in one step")
        self._outgoing += _LENGTH.pack(len(frame))
        self._outgoing += frame
        self.flush()

    def flush(self) -> None:
        """Write what the socket takes now."""
        try:
            while self._outgoing:
                num_sent = self._socket.send(self._outgoing)
                del self._outgoing[:num_sent]
        except BlockingIOError:
            return
        except OSError as exc:
            raise ChannelClosed(f"cannot write: {exc}") from exc

    def flush_all(self) -> None:
        """Write everything, however long the other end takes."""
        while self._outgoing:
            select.select([], [self._socket], [])
            self.flush()

    @property
    def num_unread(self) -> int:
        """Bytes that the other end has not read, with what the kernel needs to keep them; 0 where it has read all."""
        (num_bytes,) = struct.unpack("i", fcntl.ioctl(self._socket, termios.TIOCOUTQ, b"\0\0\0\0"))
        return int(num_bytes)

    def receive(self) -> list[bytes]:
        """Every whole frame that has arrived. Raises ChannelClosed at the end, after what came before it."""
        is_open = self._read_available()
        frames = list(self._split_frames())
        if not is_open and not frames:
            raise ChannelClosed("the other end closed the channel")
        return frames

    def wait_readable(self, timeout_seconds: float) -> bool:
        """Whether bytes (or the end) arrived in time."""
        return bool(select.select([self._socket], [], [], timeout_seconds)[0])

    def close(self) -> None:
        self._socket.close()

    def _read_available(self) -> bool:
        """Returns False at the end of the stream."""
        try:
            while received := self._socket.recv(READ_BYTES):
                self._incoming += received
                if len(self._incoming) > MAX_FRAME_BYTES:
                    return True  # enough for now; the rest stays in the socket and holds the sender back
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False

    def _split_frames(self) -> list[bytes]:
        frames, start = [], 0
        while len(self._incoming) - start >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._incoming, start)
            if length > MAX_FRAME_BYTES:
                raise ChannelClosed(f"the other end announces a frame of {length} bytes")
            end = start + _LENGTH.size + length
            if len(self._incoming) < end:
                break
            frames.append(bytes(self._incoming[start + _LENGTH.size : end]))
            start = end
        del self._incoming[:start]
        return frames
