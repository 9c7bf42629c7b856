"""The messages between the worker's main process and its engine process: msgpack frames over a socket pair.

A frame is a 4-byte big-endian length followed by one struct, encoded by msgspec (never by pickle). Free of torch.
"""

import fcntl
import select
import socket
import struct
import termios

import msgspec


class AddJob(msgspec.Struct, tag="add", frozen=True):
    """Run this job. The engine answers with SequenceOutputs; the last one of each sequence has a finish reason.

    `params` is a dumped `SamplingParams` with all defaults resolved. The engine continues sequence i after
    `committed_token_ids[i]`. The first `num_emitted_chars[i]` characters of their text are committed as well; the rest
    of it is emitted again.
    """

    job_id: str
    attempt: int
    prompt_token_ids: list[int]
    params: dict[str, object]
    max_tokens: int
    seed: int
    priority: int
    cache_salt: str  # prefix-cache entries are shared only under the same salt (one per tenant)
    committed_token_ids: list[list[int]]  # one list for each of the n sequences; empty lists on a first attempt
    num_emitted_chars: list[int]
    finished_indexes: list[int]  # sequences whose last chunk is already committed
    has_prompt_logprobs: bool = False  # whether the prompt's logprobs, if the job asks for them, are already committed
    adapter: str | None = None  # the name of one of the model's LoRA adapters
    conversation: bytes | None = None  # a dumped GenerationRequest, for a server that takes messages


class EmbedJob(msgspec.Struct, tag="embed", frozen=True):
    """Compute a vector for each input. The engine answers with one EmbeddingOutput. If `dimensions` is None, vectors
    keep their full width."""

    job_id: str
    attempt: int
    inputs: list[list[int]]
    dimensions: int | None
    priority: int
    tenant: str = ""  # tenants take turns


class AbortJob(msgspec.Struct, tag="abort", frozen=True):
    """Remove the job from the running batch at the next step. Each running sequence gets a final SequenceOutput with
    `reason`, or none if `reason` is empty because another worker owns the job now."""

    job_id: str
    attempt: int
    reason: str  # a FinishReason (cancelled or deadline), or empty


class PauseJob(msgspec.Struct, tag="pause", frozen=True):
    """Remove the job from the running batch at the next step. The engine answers with JobReturned, after all outputs
    that it has sent of the job. Its keys and values stay in the prefix cache while there is room."""

    job_id: str
    attempt: int


class EndEngine(msgspec.Struct, tag="shutdown", frozen=True):
    """End the process after the current step."""


Command = AddJob | EmbedJob | AbortJob | PauseJob | EndEngine


class Loading(msgspec.Struct, tag="loading", frozen=True):
    """How far the model has been loaded. Only from back ends that can tell, a few times a second."""

    share: float  # 0 to 1


class Ready(msgspec.Struct, tag="ready", frozen=True):
    """The model is loaded. Sent once."""

    model: str
    backend: str
    device: str
    max_num_seqs: int
    max_model_len: int
    num_cache_tokens: int
    keeps_prefixes: bool
    pid: int


class CannotLoad(msgspec.Struct, tag="cannot_load", frozen=True):
    """The model cannot be loaded, and trying again would not help. The engine exits after sending this."""

    reason: str  # one line, bounded


class SequenceOutput(msgspec.Struct, frozen=True):
    """The tokens and text that one sequence gained in a step."""

    job_id: str
    attempt: int
    index: int
    token_ids: list[int]
    text: str
    finish_reason: str | None = None  # a FinishReason; set on the last output of the sequence
    logprobs: list[dict[str, object]] | None = None  # dumped TokenLogprob, one per token id
    num_cached_tokens: int = 0  # of prompt and committed tokens, those found in the prefix cache
    sum_logprobs: float | None = None  # sum over token_ids; set if the job has best_of
    prompt_logprobs: list[dict[str, object] | None] | None = (
        None  # dumped TokenLogprobs; set once per job, before any of its tokens
    )
    num_reasoning_tokens: int | None = None  # output tokens up to the first </think>, once it is complete
    stop_string: str | None = None  # the one that ended the sequence


class EmbeddingOutput(msgspec.Struct, frozen=True):
    """All vectors of a job, in the order of its inputs: little-endian float32, unit length. Empty if it was aborted."""

    job_id: str
    attempt: int
    vectors: list[bytes]
    finish_reason: str  # a FinishReason


class JobFailed(msgspec.Struct, frozen=True):
    """The engine cannot run this job and has removed it. The other jobs continue."""

    job_id: str
    attempt: int
    code: str
    message: str


class JobReturned(msgspec.Struct, frozen=True):
    """The engine has removed this job, because it was told to pause it, or because it cannot run it at present through
    no fault of the job. It goes back to the queue."""

    job_id: str
    attempt: int


class EngineStats(msgspec.Struct, frozen=True):
    """The engine's statistics for Flower, /health and the metrics. Counters start at 0 with each engine."""

    num_steps: int = 0
    num_running: int = 0
    num_waiting: int = 0
    num_preemptions: int = 0
    num_generation_tokens: int = 0
    num_prompt_tokens: int = 0
    num_prefix_cache_queries: int = 0  # tokens
    num_prefix_cache_hits: int = 0  # tokens
    cache_usage: float | None = None  # share of the key/value cache in use, 0 to 1; None: has none, or cannot tell
    step_seconds: float = 0.0  # duration of the last step
    memory_bytes: int = 0
    is_full: bool = False  # whether it should get no more jobs for now, though it has slots
    waiting_for: str = ""  # why it runs nothing at all, although it is loaded; free of secrets and of texts


class StepDone(msgspec.Struct, tag="step", frozen=True):
    """Everything that one step produced, in order."""

    outputs: list[SequenceOutput]
    failures: list[JobFailed]
    stats: EngineStats
    embeddings: list[EmbeddingOutput] = []
    returned: list[JobReturned] = []


class StillAlive(msgspec.Struct, tag="heartbeat", frozen=True):
    """Sent while there is nothing else to report."""

    stats: EngineStats


Report = Loading | Ready | CannotLoad | StepDone | StillAlive

encode = msgspec.msgpack.Encoder().encode

decode_command = msgspec.msgpack.Decoder(Command).decode

decode_report = msgspec.msgpack.Decoder(Report).decode


MAX_FRAME_BYTES = 64 * 1024 * 1024

READ_BYTES = 256 * 1024

_LENGTH = struct.Struct(">I")


class PeerClosed(Exception):
    """The other end of the socket has closed it, or has violated the protocol."""


class FrameSocket:
    """A socket that sends and receives whole frames. Neither direction blocks: outgoing frames are kept in memory until
    the other end reads them, so that a stalled reader does not stall the sender."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._socket = sock
        self._incoming = bytearray()
        self._outgoing = bytearray()

    def fileno(self) -> int:
        return self._socket.fileno()

    @property
    def has_outgoing(self) -> bool:
        """Whether `flush` has anything left to write. If so, wait for the socket to become writable as well."""
        return bool(self._outgoing)

    def send(self, frame: bytes) -> None:
        """Queue one frame and write as much as the socket takes. Raises PeerClosed; ValueError if it is too long."""
        if len(frame) > MAX_FRAME_BYTES:
            raise ValueError(f"a frame of {len(frame)} bytes exceeds {MAX_FRAME_BYTES}; send less in one step")
        self._outgoing += _LENGTH.pack(len(frame))
        self._outgoing += frame
        self.flush()

    def flush(self) -> None:
        """Write as much as the socket takes without blocking. Raises PeerClosed."""
        try:
            while self._outgoing:
                num_sent = self._socket.send(self._outgoing)
                del self._outgoing[:num_sent]
        except BlockingIOError:
            return
        except OSError as exc:
            raise PeerClosed(f"cannot write: {exc}") from exc

    def flush_all(self) -> None:
        """Write everything, blocking until the other end has taken it. Raises PeerClosed."""
        while self._outgoing:
            select.select([], [self._socket], [])
            self.flush()

    @property
    def num_unread(self) -> int:
        """Bytes that the other end has not read yet, including kernel overhead; 0 if it has read everything."""
        (num_bytes,) = struct.unpack("i", fcntl.ioctl(self._socket, termios.TIOCOUTQ, b"\0\0\0\0"))
        return int(num_bytes)

    def receive(self) -> list[bytes]:
        """All complete frames that have arrived. Raises PeerClosed at the end of the stream, once all frames before it
        have been returned."""
        is_open = self._read_available()
        frames = list(self._split_frames())
        if not is_open and not frames:
            raise PeerClosed("the other end closed the socket")
        return frames

    def wait_readable(self, timeout_seconds: float) -> bool:
        """Wait until there is something to read, or the end of the stream; False if the time runs out first."""
        return bool(select.select([self._socket], [], [], timeout_seconds)[0])

    def close(self) -> None:
        self._socket.close()

    def _read_available(self) -> bool:
        """Read without blocking; False at the end of the stream."""
        try:
            while received := self._socket.recv(READ_BYTES):
                self._incoming += received
                if len(self._incoming) > MAX_FRAME_BYTES:
                    return True  # enough for now: a full socket slows the sender down
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
                raise PeerClosed(f"the other end sent a frame of {length} bytes; the limit is {MAX_FRAME_BYTES}")
            end = start + _LENGTH.size + length
            if len(self._incoming) < end:
                break
            frames.append(bytes(self._incoming[start + _LENGTH.size : end]))
            start = end
        del self._incoming[:start]
        return frames
