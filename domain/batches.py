"""What a batch is: its statuses, what is wrong with it, and how each of its lines ended."""

from enum import StrEnum

from domain.jobs import Frozen

MAX_LINES = 50_000
MAX_INPUTS = 50_000  # of embeddings, over all lines
MAX_LINE_BYTES = 1_048_576
MAX_ERRORS = 50  # that a refused file is told of
PIECE_BYTES = 1_048_576  # every piece of a file but its last is exactly so long, so a byte is found by its place


class BatchStatus(StrEnum):
    VALIDATING = "validating"
    FAILED = "failed"  # the file was refused
    IN_PROGRESS = "in_progress"
    FINALIZING = "finalizing"  # every line has ended, the output is being frozen
    COMPLETED = "completed"
    EXPIRED = "expired"  # its window closed before its last line ended
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"

    @property
    def is_terminal(self) -> bool:
        return self in TERMINAL_STATUSES


TERMINAL_STATUSES = frozenset({BatchStatus.FAILED, BatchStatus.COMPLETED, BatchStatus.EXPIRED, BatchStatus.CANCELLED})


class LineOutcome(StrEnum):
    """How a line ended. Only completed ones are in the output file, all others are in the error file."""

    COMPLETED = "completed"
    FAILED = "failed"  # its job failed, or none could be made of it
    EXPIRED = "expired"
    CANCELLED = "cancelled"


class FileStatus(StrEnum):
    UPLOADING = "uploading"  # not to be seen yet
    LIVE = "live"  # of a batch that runs: its content is what the lines have come to
    PROCESSED = "processed"


class BatchError(Frozen):
    """Why a file was refused; `line` counts from 1."""

    code: str
    message: str
    line: int | None = None
    param: str | None = None


class BatchErrors(Frozen):
    data: tuple[BatchError, ...] = ()


class LineRefusal(Frozen):
    """Why no job was made of a line, as the endpoint would have answered it."""

    status_code: int
    type: str
    code: str
    message: str
    param: str | None = None
