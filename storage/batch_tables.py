"""The row classes of files and batches. A file's content is in SQL, too: docs/adr/0012-files-are-in-sql.md says why."""

from datetime import datetime
from uuid import UUID

from sqlalchemy import BigInteger, CheckConstraint, ForeignKey, Index, UniqueConstraint, func, text
from sqlalchemy.orm import Mapped, mapped_column

from domain.batches import BatchErrors, BatchStatus, FileStatus, LineOutcome, LineRefusal
from storage.column_types import PydanticJSON, TextEnum
from storage.tables import Row

UNFINISHED = "status IN ('validating', 'in_progress', 'finalizing', 'cancelling')"


class File(Row):
    """A file that was uploaded, or that a batch writes."""

    __tablename__ = "files"
    __table_args__ = (
        CheckConstraint("status IN ('uploading', 'live', 'processed')", name="status"),
        CheckConstraint("purpose IN ('batch', 'batch_output')", name="purpose"),
        Index("files_tenant_idx", "tenant_id", text("id DESC")),
        Index("files_expires_idx", "expires_at", postgresql_where=text("expires_at IS NOT NULL")),
        Index("files_uploading_idx", "touched_at", postgresql_where=text("status = 'uploading'")),
    )

    id: Mapped[UUID] = mapped_column(primary_key=True)  # a ULID
    tenant_id: Mapped[UUID] = mapped_column(ForeignKey("tenants.id", ondelete="CASCADE"))
    filename: Mapped[str]
    purpose: Mapped[str]
    status: Mapped[FileStatus] = mapped_column(TextEnum(FileStatus))
    num_bytes: Mapped[int] = mapped_column(BigInteger, server_default="0")
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    touched_at: Mapped[datetime] = mapped_column(server_default=func.now())  # when its last piece came
    expires_at: Mapped[datetime | None]


class FilePiece(Row):
    """PIECE_BYTES of a file's content; the last piece may have fewer."""

    __tablename__ = "file_pieces"

    file_id: Mapped[UUID] = mapped_column(ForeignKey("files.id", ondelete="CASCADE"), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True)  # from 0
    content: Mapped[bytes]  # stored as it is: parts of it are read


class Batch(Row):
    """One batch and how far it has come. The lock on this row is the right to take it a step further."""

    __tablename__ = "batches"
    __table_args__ = (
        CheckConstraint(
            "status IN ('validating', 'failed', 'in_progress', 'finalizing', 'completed', 'expired', 'cancelling',"
            " 'cancelled')",
            name="status",
        ),
        UniqueConstraint("output_file_id"),
        UniqueConstraint("error_file_id"),
        Index("batches_tenant_idx", "tenant_id", text("id DESC")),
        Index("batches_unfinished_idx", "tenant_id", postgresql_where=text(UNFINISHED)),
    )

    id: Mapped[UUID] = mapped_column(primary_key=True)  # a ULID
    tenant_id: Mapped[UUID] = mapped_column(ForeignKey("tenants.id", ondelete="CASCADE"))
    status: Mapped[BatchStatus] = mapped_column(TextEnum(BatchStatus), server_default="validating")
    endpoint: Mapped[str]
    input_file_id: Mapped[UUID]  # no foreign key: it may be deleted when the batch is done
    completion_window: Mapped[str]
    batch_metadata: Mapped[dict[str, str]] = mapped_column("metadata")
    output_ttl_seconds: Mapped[int]
    model: Mapped[str | None]
    errors: Mapped[BatchErrors | None] = mapped_column(PydanticJSON(BatchErrors))
    output_file_id: Mapped[UUID | None]
    error_file_id: Mapped[UUID | None]
    num_bytes_read: Mapped[int] = mapped_column(BigInteger, server_default="0")  # by validation
    num_lines_read: Mapped[int] = mapped_column(server_default="0")  # empty ones, too
    num_lines: Mapped[int] = mapped_column(server_default="0")
    num_inputs: Mapped[int] = mapped_column(server_default="0")  # of embeddings, over all lines
    num_in_flight: Mapped[int] = mapped_column(server_default="0")  # lines whose job has not been seen to end
    num_completed: Mapped[int] = mapped_column(server_default="0")
    num_failed: Mapped[int] = mapped_column(server_default="0")
    num_frozen: Mapped[int] = mapped_column(server_default="0")  # the last line whose outcome is in a file
    prompt_tokens: Mapped[int] = mapped_column(BigInteger, server_default="0")
    cached_tokens: Mapped[int] = mapped_column(BigInteger, server_default="0")
    completion_tokens: Mapped[int] = mapped_column(BigInteger, server_default="0")
    step_failure: Mapped[str | None]  # how the last step failed, where it did
    num_step_failures: Mapped[int] = mapped_column(server_default="0")  # so, one after another
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    expires_at: Mapped[datetime]
    in_progress_at: Mapped[datetime | None]
    finalizing_at: Mapped[datetime | None]
    completed_at: Mapped[datetime | None]
    failed_at: Mapped[datetime | None]
    expired_at: Mapped[datetime | None]
    cancelling_at: Mapped[datetime | None]
    cancelled_at: Mapped[datetime | None]


class BatchLine(Row):
    """Where a line is in its file, which job it became, and how it ended. Gone when the output is frozen."""

    __tablename__ = "batch_lines"
    __table_args__ = (
        UniqueConstraint("batch_id", "custom_id"),
        UniqueConstraint("job_id"),
        CheckConstraint("outcome IN ('completed', 'failed', 'expired', 'cancelled')", name="outcome"),
        Index(
            "batch_lines_waiting_idx",
            "batch_id",
            "prefix_hash",
            "line",
            postgresql_where=text("job_id IS NULL AND outcome IS NULL"),
        ),
        Index("batch_lines_in_flight_idx", "batch_id", postgresql_where=text("job_id IS NOT NULL AND outcome IS NULL")),
    )

    batch_id: Mapped[UUID] = mapped_column(ForeignKey("batches.id", ondelete="CASCADE"), primary_key=True)
    line: Mapped[int] = mapped_column(primary_key=True)  # in the file, from 1
    custom_id: Mapped[str]
    first_byte: Mapped[int] = mapped_column(BigInteger)
    num_bytes: Mapped[int]
    prefix_hash: Mapped[int] = mapped_column(BigInteger)  # lines that begin alike run one after another
    num_sequences: Mapped[int] = mapped_column(server_default="1")
    job_id: Mapped[UUID | None]  # no foreign key: a tenant may delete the job
    outcome: Mapped[LineOutcome | None] = mapped_column(TextEnum(LineOutcome))
    refusal: Mapped[LineRefusal | None] = mapped_column(PydanticJSON(LineRefusal))
