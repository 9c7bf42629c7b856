"""What worker and engine say to each other: msgpack frames over one end of a socket pair.

What the worker's main process and its engine process say to each other: msgpack frames over a socket pair.

A frame is a 4-byte big-endian length and one msgspec-encoded struct. Never pickle. Torch-free.

Whole frames over one end of a socket pair: a 4-byte big-endian length, then that many bytes.
"""

import fcntl
import select
import socket
import struct
import termios

import msgspec


class AddJob(msgspec.Struct, tag="add", frozen=True):
    """Run this job; the answer is Output frames until one of them is final for every index.

    `params` is a dumped `SamplingParams` with every default resolved. `committed_token_ids[i]` are the tokens of
    sequence i that are already committed: the engine continues after them. `num_emitted_chars[i]` is how much of
    sequence i's text was committed with them: the rest of the text of those tokens is emitted again.
    """

    job_id: str
    attempt: int
    prompt_token_ids: list[int]
    params: dict[str, object]
    max_tokens: int
    seed: int
    priority: int
    cache_salt: str  # prefix-cache entries are shared only under the same salt (one per tenant)
    committed_token_ids: list[list[int]]  # one list per sequence, n of them; empty lists on a first attempt
    num_emitted_chars: list[int]
    finished_indexes: list[int]  # sequences whose last chunk is committed already
    has_prompt_logprobs: bool = False  # the prompt's, where asked for, are committed already


class EmbedJob(msgspec.Struct, tag="embed", frozen=True):
    """Make a vector of each input; the answer is one EmbeddingOutput. `dimensions` None keeps them all."""

    job_id: str
    attempt: int
    inputs: list[list[int]]
    dimensions: int | None
    priority: int


class AbortJob(msgspec.Struct, tag="abort", frozen=True):
    """Take the job out of the running batch at the next step. Every running sequence gets a final Output with `reason`;
    silent where `reason` is empty (the job was fenced off)."""

    job_id: str
    attempt: int
    reason: str  # a FinishReason: cancelled or deadline


class Shutdown(msgspec.Struct, tag="shutdown", frozen=True):
    """End the process after the running step."""


Command = AddJob | EmbedJob | AbortJob | Shutdown


class Ready(msgspec.Struct, tag="ready", frozen=True):
    """The model is loaded. Sent once."""

    model: str
    backend: str
    device: str
    max_num_seqs: int
    max_model_len: int
    num_cache_tokens: int
    pid: int


class CannotLoad(msgspec.Struct, tag="cannot_load", frozen=True):
    """The model cannot be loaded, and another try would end the same. The engine ends after it."""

    reason: str  # one line, bounded


class SequenceOutput(msgspec.Struct, frozen=True):
    """What one sequence gained in a step."""

    job_id: str
    attempt: int
    index: int
    token_ids: list[int]
    text: str
    finish_reason: str | None = None  # a FinishReason; set on the last output of the sequence
    logprobs: list[dict[str, object]] | None = None  # dumped TokenLogprob, one per token id
    num_cached_tokens: int = 0
    sum_logprobs: float | None = None  # of token_ids, under best_of
    prompt_logprobs: list[dict[str, object] | None] | None = (
        None  # dumped TokenLogprobs; once per job, before any token
    )
    num_reasoning_tokens: int | None = None  # of all its output, up to the first </think>; from where it is complete on


class EmbeddingOutput(msgspec.Struct, frozen=True):
    """All vectors of a job, little-endian float32, at unit length; none where the job was cut off."""

    job_id: str
    attempt: int
    vectors: list[bytes]
    finish_reason: str  # a FinishReason


class JobFailed(msgspec.Struct, frozen=True):
    """The engine cannot run this job and took it out; its neighbours run on."""

    job_id: str
    attempt: int
    code: str
    message: str


class EngineStats(msgspec.Struct, frozen=True):
    """Figures of the engine, for Flower, /health and the credit rule."""

    num_steps: int = 0
    num_running: int = 0
    num_waiting: int = 0
    num_preemptions: int = 0
    num_generation_tokens: int = 0
    num_prompt_tokens: int = 0
    num_prefix_cache_queries: int = 0  # tokens
    num_prefix_cache_hits: int = 0  # tokens
    cache_usage: float = 0.0  # 0..1
    step_seconds: float = 0.0  # of the last step
    memory_bytes: int = 0


class StepDone(msgspec.Struct, tag="step", frozen=True):
    """All that one step produced, in order."""

    outputs: list[SequenceOutput]
    failures: list[JobFailed]
    stats: EngineStats
    embeddings: list[EmbeddingOutput] = []


class Heartbeat(msgspec.Struct, tag="heartbeat", frozen=True):
    """The loop is alive and has nothing to report."""

    stats: EngineStats


Report = Ready | CannotLoad | StepDone | Heartbeat

encode = msgspec.msgpack.Encoder().encode

decode_command = msgspec.msgpack.Decoder(Command).decode

decode_report = msgspec.msgpack.Decoder(Report).decode


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
