"""Batch files: splitting the input file into lines, and writing the lines of the output and error files."""

import hashlib
from codecs import BOM_UTF8
from collections.abc import Iterator
from dataclasses import dataclass
from uuid import UUID, uuid5

import orjson
from sqlalchemy.orm import Session

from dialects.errors import refuse_unfinished
from dialects.openai_batches import read_line, refusal_of
from domain.errors import CeleriacError
from domain.jobs import MAX_LINE_BYTES, LineOutcome, LineRefusal, external_id
from domain.requests import GenerationRequest, JobRequest
from storage import batch_lines, files
from storage.batch_lines import EndedLine
from storage.files import Batch
from text.models import ModelViews

LINES_PER_READ = 50
BYTES_PER_READ = 4_194_304  # of results; logprobs and vectors can take megabytes
PREFIX_CHARS = 512  # of the first message, unless it is a system message, or of the prompt
#: Characters that some programs (and Python's `splitlines`) treat as line breaks, and their JSON escapes.
SEPARATORS = {"\x85".encode(): b"\\u0085", "\u2028".encode(): b"\\u2028", "\u2029".encode(): b"\\u2029"}

ENDED_BADLY = {
    LineOutcome.EXPIRED: ("batch_expired", "the completion window ended before this line was done"),
    LineOutcome.CANCELLED: ("batch_cancelled", "the batch was cancelled before this line was done"),
}


@dataclass(frozen=True, slots=True)
class FoundLine:
    """A line without its line break, with its offsets in the file. `content` is None if the line is too long."""

    first_byte: int
    content: bytes | None
    next_byte: int


def split_lines(parts: Iterator[bytes], first_byte: int) -> Iterator[FoundLine]:
    """The lines of a file from `first_byte`, the start of a line. The last line need not end in a line break. At most
    MAX_LINE_BYTES of a line are kept in memory. A byte order mark is skipped."""
    for number, line in enumerate(_split(parts, first_byte)):
        if number or line.first_byte or line.content is None or not line.content.startswith(BOM_UTF8):
            yield line
        else:
            yield FoundLine(len(BOM_UTF8), line.content[len(BOM_UTF8) :], line.next_byte)


def _split(parts: Iterator[bytes], first_byte: int) -> Iterator[FoundLine]:
    rest, num_dropped, start = b"", 0, first_byte
    for part in parts:
        pieces = (rest + part).split(b"\n")
        for piece in pieces[:-1]:
            length = num_dropped + len(piece)
            yield FoundLine(start, None if length > MAX_LINE_BYTES else piece, start + length + 1)
            start, num_dropped = start + length + 1, 0
        rest = pieces[-1]
        if num_dropped + len(rest) > MAX_LINE_BYTES:
            rest, num_dropped = b"", num_dropped + len(rest)
    if rest or num_dropped:
        length = num_dropped + len(rest)
        yield FoundLine(start, None if length > MAX_LINE_BYTES else rest, start + length)


def prefix_hash(request: JobRequest) -> int:
    """Equal for requests with the same beginning, so that they run one after another and share a cached prefix. A
    signed 64-bit integer. Embeddings do not use the cache, so their lines run in file order."""
    if not isinstance(request, GenerationRequest):
        return 0
    if request.messages is not None:
        first = request.messages[0]
        prefix = first.role + first.content[: None if first.role == "system" else PREFIX_CHARS]
    else:
        prefix = (request.prompt or str(request.prompt_token_ids))[:PREFIX_CHARS]
    return int.from_bytes(hashlib.blake2b(prefix.encode(), digest_size=8).digest(), signed=True)


@dataclass(frozen=True, slots=True)
class AnsweredLine:
    """A line that has ended, with its request as bytes if writing the answer needs it."""

    ended: EndedLine
    asked: bytes | None


def write_line(batch: Batch, line: AnsweredLine, views: ModelViews) -> bytes:
    """Encode a line of the output or error file. Slow and needs no session, so do not hold a transaction open
    meanwhile."""
    ended = line.ended
    response, error = _response(batch, ended, line.asked, views), None
    if response is None:
        outcome = LineOutcome(ended.line.outcome or LineOutcome.CANCELLED)
        code, message = ENDED_BADLY.get(outcome, ("job_deleted", "the job was deleted before its result was read"))
        error = {"code": code, "message": message}
    id_ = ended.line.job_id or line_id(batch.id, ended.line.line)
    written = {
        "id": external_id(id_, "batch_req"),
        "custom_id": ended.line.custom_id,
        "response": response,
        "error": error,
    }
    content = orjson.dumps(written)
    for separator, escape in SEPARATORS.items():
        content = content.replace(separator, escape)
    return content + b"\n"


def _response(batch: Batch, ended: EndedLine, asked: bytes | None, views: ModelViews) -> dict[str, object] | None:
    """The response of a line; None if it has none."""
    if ended.line.refusal is not None:
        return _refused(ended.line.refusal, external_id(line_id(batch.id, ended.line.line), "batch_req"))
    if ended.record is None or ended.line.outcome in ENDED_BADLY:
        return None
    request_id = external_id(ended.record.job.id)
    try:
        body = read_line(asked, batch.endpoint, views).answer(ended.record) if asked is not None else None
        if body is None:
            refuse_unfinished(ended.record)
    except CeleriacError as exc:
        return _refused(refusal_of(exc), request_id)
    return {"status_code": 200, "request_id": request_id, "body": body}


def _refused(refusal: LineRefusal, request_id: str) -> dict[str, object]:
    error = {"message": refusal.message, "type": refusal.type, "param": refusal.param, "code": refusal.code}
    return {"status_code": refusal.status_code, "request_id": request_id, "body": {"error": error}}


def line_id(batch_id: UUID, line: int) -> UUID:
    """The id of a line without a job."""
    return uuid5(batch_id, str(line))


def read_ended(session: Session, batch: Batch, *, after: int, is_completed: bool | None = None) -> list[AnsweredLine]:
    """The next ended lines after line `after`, as many as are written at once, with their requests from the input
    file."""
    ended = batch_lines.ended_lines(
        session, batch.id, after=after, limit=LINES_PER_READ, max_bytes=BYTES_PER_READ, is_completed=is_completed
    )
    done = [one.line for one in ended if one.line.outcome is LineOutcome.COMPLETED]
    asked = files.read_ranges(session, batch.input_file_id, [(line.first_byte, line.num_bytes) for line in done])
    asked_by_line = {line.line: content for line, content in zip(done, asked, strict=True)}
    return [AnsweredLine(one, asked_by_line.get(one.line.line)) for one in ended]
