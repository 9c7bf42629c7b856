"""Validates the file of a batch, some lines per step. Invalid lines fail the batch and are listed; else it starts."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from time import monotonic
from uuid import UUID

from sqlalchemy.orm import Session, sessionmaker

from dialects import openai_batches
from dialects.openai_batches import LineRequest
from domain.errors import CeleriacError, InvalidRequest
from domain.jobs import (
    MAX_ERRORS,
    MAX_INPUTS,
    MAX_LINE_BYTES,
    MAX_LINES,
    PIECE_BYTES,
    BatchError,
    BatchErrors,
    BatchStatus,
    external_id,
)
from domain.requests import EmbeddingRequest
from observability import describe_exception
from storage import batch_lines, batches, files
from storage.batch_lines import NewLine
from storage.files import Batch
from tasks.batch_files import FoundLine, prefix_hash, split_lines
from tasks.prepare import refuse_unfit
from text.models import ModelView, ModelViews

log = logging.getLogger(__name__)

LINES_PER_STEP = 2_000
STEP_SECONDS = 0.25  # after this much time in a step, its progress is saved


@dataclass
class ReadLines:
    """What a step has read: valid lines, errors, and its position in the file."""

    num_bytes_read: int
    num_lines_read: int
    num_inputs: int
    model: str | None
    is_end: bool = False  # whether the end of the file has been reached
    lines: list[NewLine] = field(default_factory=list)  # the valid lines
    errors: list[BatchError] = field(default_factory=list)


class BatchValidation:
    """Validates batches. Progress is stored only in a batch's row, never here."""

    def __init__(self, sessions: sessionmaker[Session], views: ModelViews) -> None:
        self._sessions = sessions
        self._views = views

    def step(self, batch: Batch) -> bool:
        """Read the next lines; after the last one, start or fail the batch. True if the next step need not wait."""
        read = self._read_some(batch)
        with self._sessions.begin() as session:
            locked = batches.lock(session, batch.id, BatchStatus.VALIDATING)
            if locked is None or locked.num_bytes_read != batch.num_bytes_read:
                return False  # cancelled in the meantime, or advanced by another process
            if locked.expires_at <= batches.now(session):
                batches.expire(session, locked)
            else:
                self._write_down(session, locked, read)
        return True

    def _read_some(self, batch: Batch) -> ReadLines:
        read = ReadLines(batch.num_bytes_read, batch.num_lines_read, batch.num_inputs, batch.model)
        until = monotonic() + STEP_SECONDS
        num_found = 0
        parts = self._parts(batch.input_file_id, batch.num_bytes_read)
        for found in islice(split_lines(parts, batch.num_bytes_read), LINES_PER_STEP):
            num_found += 1
            read.num_lines_read += 1
            read.num_bytes_read = found.next_byte
            if found.content is None or found.content.strip():
                self._read(batch, found, read)
            if len(read.errors) >= MAX_ERRORS or monotonic() > until:
                break  # the next step reads the others
        read.is_end = num_found == 0
        return read

    def _parts(self, file_id: UUID, first_byte: int) -> Iterator[bytes]:
        """Yield the content from `first_byte` on. No transaction is open between two reads, while lines are parsed."""
        number, skipped = divmod(first_byte, PIECE_BYTES)
        while True:
            with self._sessions() as session:
                pieces = files.read_pieces(session, file_id, first=number)
            if not pieces:
                return
            for piece in pieces:
                yield piece[skipped:]
                skipped = 0
            number += len(pieces)

    def _read(self, batch: Batch, found: FoundLine, read: ReadLines) -> None:
        """Add the line, or its error, to `read`."""
        try:
            read.lines.append(self._line_of(batch, found, read))
        except CeleriacError as exc:
            read.errors.append(
                BatchError(code=exc.code, message=exc.message, line=read.num_lines_read, param=exc.param)
            )
        except (OSError, MemoryError, KeyboardInterrupt, SystemExit):
            raise  # the machine is at fault, not the line
        except BaseException as exc:  # anything that breaks the parser, even a panic in Rust, is an error of the line
            log.exception(
                "a line of a batch could not be read: %s",
                describe_exception(exc),
                extra={"batch_id": external_id(batch.id, "batch"), "line": read.num_lines_read},
            )
            message = f"the server failed to read this line ({type(exc).__name__}); change it, and report this error"
            read.errors.append(BatchError(code=CeleriacError.code, message=message, line=read.num_lines_read))

    def _line_of(self, batch: Batch, found: FoundLine, read: ReadLines) -> NewLine:
        """The line as a row for the batch. Raises CeleriacError if it is invalid."""
        if found.content is None:
            raise InvalidRequest(f"the line is longer than {MAX_LINE_BYTES} bytes; shorten it")
        request = openai_batches.read_line(found.content, batch.endpoint, self._views)
        view = self._views.get(request.request.model)
        _refuse_unfit(request, view)
        model = view.spec.id
        if read.model is not None and read.model != model:
            raise InvalidRequest(
                f"body.model is {model!r}, but earlier lines use {read.model!r}; put it into a separate batch",
                param="body.model",
            )
        read.model = model
        if isinstance(request.request, EmbeddingRequest):
            read.num_inputs += len(request.request.inputs)
        return NewLine(
            read.num_lines_read, request.custom_id, found.first_byte, len(found.content), prefix_hash(request.request)
        )

    def _write_down(self, session: Session, batch: Batch, read: ReadLines) -> None:
        batch.num_bytes_read, batch.num_lines_read = read.num_bytes_read, read.num_lines_read
        batch.num_inputs, batch.model = read.num_inputs, read.model
        errors = [*(batch.errors.data if batch.errors is not None else ()), *read.errors]
        errors += _add(session, batch, read.lines)
        if read.is_end and batch.num_lines == 0 and not errors:
            errors.append(BatchError(code="empty_file", message="the file has no requests; send one per line"))
        too_many = _too_many(batch)
        self._conclude(session, batch, [*errors, *too_many], is_over=read.is_end or bool(too_many))

    def _conclude(self, session: Session, batch: Batch, errors: list[BatchError], *, is_over: bool) -> None:
        """Start or fail the batch if its file has been read to the end, or if `is_over`, when no more will be read."""
        in_order = sorted(errors, key=lambda error: error.line or 0)
        kept = BatchErrors(data=tuple(in_order[:MAX_ERRORS])) if errors else None
        if kept is not None and (is_over or len(errors) >= MAX_ERRORS):
            batches.fail(session, batch, kept)
        elif is_over:
            batches.begin(session, batch)
        else:
            batch.errors = kept


def _add(session: Session, batch: Batch, lines: list[NewLine]) -> list[BatchError]:
    """Add the lines to the batch. Returns errors for those whose custom_id is taken."""
    added = batch_lines.add_lines(session, batch.id, lines) if lines else set()
    batch.num_lines += len(added)
    return [
        BatchError(
            code="duplicate_custom_id",
            message=f"custom_id {line.custom_id[:64]!r} is already used by an earlier line; give each line its own",
            line=line.line,
            param="custom_id",
        )
        for line in lines
        if line.line not in added
    ]


def _refuse_unfit(asked: LineRequest, view: ModelView) -> None:
    """Raise a CeleriacError, whose `param` is a field of the line, if the model cannot run this request."""
    try:
        refuse_unfit(asked.request, view)
    except CeleriacError as exc:
        exc = asked.in_words(exc)
        exc.param = exc.param and f"body.{exc.param}"
        raise exc from None


def _too_many(batch: Batch) -> list[BatchError]:
    """Errors of the file as a whole, considering what has been read so far."""
    errors = []
    if batch.num_lines > MAX_LINES:
        errors.append(BatchError(code="too_many_tasks", message=f"the file has more than {MAX_LINES} requests"))
    if batch.num_inputs > MAX_INPUTS:
        message = f"the lines have more than {MAX_INPUTS} inputs together; split them into several batches"
        errors.append(BatchError(code="too_many_inputs", message=message, param="body.input"))
    return errors
