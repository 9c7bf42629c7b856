"""The file of a batch is read, some lines a step, and refused with the numbers of the lines at fault, or begun."""

from itertools import islice
from time import monotonic

from sqlalchemy.orm import Session

from domain.batches import MAX_ERRORS, MAX_INPUTS, MAX_LINE_BYTES, MAX_LINES, BatchError, BatchErrors
from domain.embeddings import EmbeddingRequest
from domain.errors import CeleriacError, InvalidRequest
from storage import batch_lines, batches, files
from storage.batch_lines import NewLine
from storage.batch_tables import Batch
from tasks.batch_files import FoundLine, prefix_hash, split_lines
from tasks.batch_surface import BatchSurface, LineRequest
from tasks.models import ModelView, ModelViews
from tasks.settler import refuse_unfit

LINES_PER_STEP = 500
STEP_SECONDS = 1.0  # for long lines: who wants to cancel the batch waits as long


class BatchValidation:
    """Where it stands is in the batch's row alone, whose lock the caller holds."""

    def __init__(self, views: ModelViews, surface: BatchSurface) -> None:
        self._views = views
        self._surface = surface

    def step(self, session: Session, batch: Batch) -> bool:
        """Read the next lines; behind the last one the batch begins, or fails. True: the next step need not wait."""
        errors = list(batch.errors.data) if batch.errors is not None else []
        num_lines_read = batch.num_lines_read
        lines = self._read_some(session, batch, errors)
        is_read = batch.num_lines_read == num_lines_read
        if lines:
            self._add(session, batch, lines, errors)
        if is_read and batch.num_lines == 0 and not errors:
            errors.append(BatchError(code="empty_file", message="the file holds no request; send one a line"))
        too_many = _too_many(batch)
        return self._conclude(session, batch, [*errors, *too_many], is_over=is_read or bool(too_many))

    def _read_some(self, session: Session, batch: Batch, errors: list[BatchError]) -> list[NewLine]:
        """The valid ones of the next lines; what is wrong with the others is added to `errors`."""
        parts = files.read_from(session, batch.input_file_id, batch.num_bytes_read)
        until = monotonic() + STEP_SECONDS
        lines = []
        for found in islice(split_lines(parts, batch.num_bytes_read), LINES_PER_STEP):
            batch.num_lines_read += 1
            batch.num_bytes_read = found.next_byte
            if found.content is None or found.content.strip():
                try:
                    lines.append(self._read(batch, found))
                except CeleriacError as exc:
                    errors.append(_error(exc, batch.num_lines_read))
            if monotonic() > until:
                break  # the others come with the next step
        return lines

    def _conclude(self, session: Session, batch: Batch, errors: list[BatchError], *, is_over: bool) -> bool:
        """`is_over`: nothing more of the file is to be read."""
        kept = (
            BatchErrors(data=tuple(sorted(errors, key=lambda error: error.line or 0)[:MAX_ERRORS])) if errors else None
        )
        if kept is not None and (is_over or len(errors) >= MAX_ERRORS):
            batches.fail(session, batch, kept)
        elif is_over:
            batches.begin(session, batch)
        else:
            batch.errors = kept
        return True

    def _read(self, batch: Batch, found: FoundLine) -> NewLine:
        """Raises CeleriacError."""
        if found.content is None:
            raise InvalidRequest(f"the line is longer than {MAX_LINE_BYTES} bytes; shorten it")
        request = self._surface.read_line(found.content, batch.endpoint)
        view = self._views.get(request.request.model)
        _refuse_unfit(request, view)
        model = view.spec.id
        if batch.model is not None and batch.model != model:
            raise InvalidRequest(
                f"body.model is {model!r}, but the lines before it ask for {batch.model!r}; make it a batch of its own",
                param="body.model",
            )
        batch.model = model
        if isinstance(request.request, EmbeddingRequest):
            batch.num_inputs += len(request.request.inputs)
        return NewLine(
            batch.num_lines_read, request.custom_id, found.first_byte, len(found.content), prefix_hash(request.request)
        )

    def _add(self, session: Session, batch: Batch, lines: list[NewLine], errors: list[BatchError]) -> None:
        added = batch_lines.add_lines(session, batch.id, lines)
        batch.num_lines += len(added)
        for line in lines:
            if line.line not in added:
                message = f"custom_id {line.custom_id[:64]!r} is that of an earlier line; give each line its own"
                errors.append(
                    BatchError(code="duplicate_custom_id", message=message, line=line.line, param="custom_id")
                )


def _refuse_unfit(asked: LineRequest, view: ModelView) -> None:
    """Raises CeleriacError whose `param` is a field of the line."""
    try:
        refuse_unfit(asked.request, view)
    except CeleriacError as exc:
        exc = asked.in_words(exc)
        exc.param = exc.param and f"body.{exc.param}"
        raise exc from None


def _too_many(batch: Batch) -> list[BatchError]:
    """What is wrong with the file as a whole as soon as so much of it was read."""
    errors = []
    if batch.num_lines > MAX_LINES:
        errors.append(BatchError(code="too_many_tasks", message=f"the file holds more than {MAX_LINES} requests"))
    if batch.num_inputs > MAX_INPUTS:
        message = f"the lines hold more than {MAX_INPUTS} inputs together; make several batches of them"
        errors.append(BatchError(code="too_many_inputs", message=message, param="body.input"))
    return errors


def _error(exc: CeleriacError, line: int) -> BatchError:
    return BatchError(code=exc.code, message=exc.message, line=line, param=exc.param)
