"""The messages between the worker's main process and its engine process: msgpack frames over a socket pair.

A frame is a 4-byte big-endian length and one msgspec-encoded struct. Never pickle. Torch-free.
"""

import fcntl
import select
import socket
import struct
import termios

import msgspec


class AddJob(msgspec.Struct, tag="add", frozen=True):
    """Run this job. It is answered by SequenceOutputs, the last one of each index with a finish reason.

    `params` is a dumped `SamplingParams` with every default resolved. The engine continues sequence i after
    `committed_token_ids[i]`. Of their text `num_emitted_chars[i]` characters were committed, too; the rest is emitted
    again.
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
    has_prompt_logprobs: bool = False  # those of the prompt are committed already, if the job asks for them


class EmbedJob(msgspec.Struct, tag="embed", frozen=True):
    """Make a vector of each input; the answer is one EmbeddingOutput. `dimensions` None keeps all of them."""

    job_id: str
    attempt: int
    inputs: list[list[int]]
    dimensions: int | None
    priority: int


class AbortJob(msgspec.Struct, tag="abort", frozen=True):
    """Take the job out of the running batch at the next step. Each running sequence gets a final SequenceOutput with
    `reason`; none if `reason` is empty (the job was fenced off)."""

    job_id: str
    attempt: int
    reason: str  # a FinishReason: cancelled or deadline


class EndEngine(msgspec.Struct, tag="shutdown", frozen=True):
    """End the process after the current step."""


Command = AddJob | EmbedJob | AbortJob | EndEngine


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
    """The model cannot be loaded, and trying again would not help. The engine exits after sending this."""

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
    num_reasoning_tokens: int | None = None  # output tokens up to the first </think>, once that is complete
    stop_string: str | None = None  # that ended the sequence


class EmbeddingOutput(msgspec.Struct, frozen=True):
    """All vectors of a job: little-endian float32, unit length. Empty if the job was aborted."""

    job_id: str
    attempt: int
    vectors: list[bytes]
    finish_reason: str  # a FinishReason


class JobFailed(msgspec.Struct, frozen=True):
    """The engine cannot run this job and has removed it; the others continue."""

    job_id: str
    attempt: int
    code: str
    message: str


class EngineStats(msgspec.Struct, frozen=True):
    """The engine's figures for Flower and /health."""

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


class StillAlive(msgspec.Struct, tag="heartbeat", frozen=True):
    """The loop is alive but has nothing else to report."""

    stats: EngineStats


Report = Ready | CannotLoad | StepDone | StillAlive

encode = msgspec.msgpack.Encoder().encode

decode_command = msgspec.msgpack.Decoder(Command).decode

decode_report = msgspec.msgpack.Decoder(Report).decode


MAX_FRAME_BYTES = 64 * 1024 * 1024

READ_BYTES = 256 * 1024

_LENGTH = struct.Struct(">I")


class PeerClosed(Exception):
    """The other end is gone, or does not speak our protocol."""


class FrameSocket:
    """Reads never block; writes are kept until the other end takes them, so a reader that stalls does not stall us."""

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
        """Queue one frame and write what the socket takes. Raises PeerClosed, and ValueError for one too long."""
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
            raise PeerClosed(f"cannot write: {exc}") from exc

    def flush_all(self) -> None:
        """Write everything, however long the other end takes."""
        while self._outgoing:
            select.select([], [self._socket], [])
            self.flush()

    @property
    def num_unread(self) -> int:
        """Bytes the other end has not read yet, kernel overhead included; 0 if it has read everything."""
        (num_bytes,) = struct.unpack("i", fcntl.ioctl(self._socket, termios.TIOCOUTQ, b"\0\0\0\0"))
        return int(num_bytes)

    def receive(self) -> list[bytes]:
        """Every whole frame that has arrived. Raises PeerClosed at the end, after what came before it."""
        is_open = self._read_available()
        frames = list(self._split_frames())
        if not is_open and not frames:
            raise PeerClosed("the other end closed the socket")
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
                    return True  # enough for now: what stays in the socket slows the sender down
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
                raise PeerClosed(f"the other end announced a frame of {length} bytes; the limit is {MAX_FRAME_BYTES}")
            end = start + _LENGTH.size + length
            if len(self._incoming) < end:
                break
            frames.append(bytes(self._incoming[start + _LENGTH.size : end]))
            start = end
        del self._incoming[:start]
        return frames
