"""Files in SQL, written piece by piece and read in parts, and the row classes of files and batches.

docs/adr/0012-files-are-in-sql.md explains why the content is in SQL as well. Each piece is written in its own
transaction, so an upload does not hold a connection while it waits for its client. Until the last piece has arrived,
the file is `uploading` and invisible. Every file belongs to one tenant. All functions are synchronous on a `Session`
and do not commit.
"""

from collections.abc import Sequence
from datetime import datetime
from typing import Literal
from uuid import UUID

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    ColumnElement,
    Double,
    ForeignKey,
    Index,
    Select,
    UniqueConstraint,
    delete,
    exists,
    func,
    insert,
    or_,
    select,
    text,
    update,
)
from sqlalchemy.orm import Mapped, Session, mapped_column

from domain.errors import InsufficientQuota, InvalidRequest
from domain.jobs import PIECE_BYTES, BatchErrors, BatchStatus, FileStatus, LineOutcome, LineRefusal, new_id
from storage.column_types import PydanticJSON, TextEnum
from storage.tables import IS_PRUNED, Row, Tenant

UNFINISHED = "status IN ('validating', 'in_progress', 'finalizing', 'cancelling')"


class File(Row):
    """A file that a client has uploaded or that a batch writes."""

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
    touched_at: Mapped[datetime] = mapped_column(server_default=func.now())  # when its last piece arrived
    expires_at: Mapped[datetime | None]


class FilePiece(Row):
    """PIECE_BYTES of a file's content; the last piece may be shorter."""

    __tablename__ = "file_pieces"
    __table_args__ = IS_PRUNED

    file_id: Mapped[UUID] = mapped_column(ForeignKey("files.id", ondelete="CASCADE"), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True)  # from 0
    content: Mapped[bytes]  # stored uncompressed, so that parts of it can be read


class Batch(Row):
    """One batch and its progress. A step may be written only while holding the lock on this row."""

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
    key_id: Mapped[str | None]  # the API key that it was created with
    status: Mapped[BatchStatus] = mapped_column(TextEnum(BatchStatus), server_default="validating")
    endpoint: Mapped[str]
    input_file_id: Mapped[UUID]  # no foreign key: it may be deleted once the batch is done
    completion_window: Mapped[str]
    batch_metadata: Mapped[dict[str, str]] = mapped_column("metadata")
    output_ttl_seconds: Mapped[int]
    start_timeout_seconds: Mapped[float | None] = mapped_column(Double)  # of lines that have none of their own
    run_timeout_seconds: Mapped[float | None] = mapped_column(Double)
    traceparent: Mapped[str | None]  # of the request that created it, if that is part of a trace
    model: Mapped[str | None]
    errors: Mapped[BatchErrors | None] = mapped_column(PydanticJSON(BatchErrors))
    output_file_id: Mapped[UUID | None]
    error_file_id: Mapped[UUID | None]
    num_bytes_read: Mapped[int] = mapped_column(BigInteger, server_default="0")  # how far validation has read the file
    num_lines_read: Mapped[int] = mapped_column(server_default="0")  # including empty ones
    num_lines: Mapped[int] = mapped_column(server_default="0")
    num_inputs: Mapped[int] = mapped_column(server_default="0")  # embedding inputs, over all lines
    num_in_flight: Mapped[int] = mapped_column(server_default="0")  # lines whose job is not known to have ended
    num_completed: Mapped[int] = mapped_column(server_default="0")
    num_failed: Mapped[int] = mapped_column(server_default="0")
    num_frozen: Mapped[int] = mapped_column(server_default="0")  # the last line written to an output file
    prompt_tokens: Mapped[int] = mapped_column(BigInteger, server_default="0")
    cached_tokens: Mapped[int] = mapped_column(BigInteger, server_default="0")
    completion_tokens: Mapped[int] = mapped_column(BigInteger, server_default="0")
    step_failure: Mapped[str | None]  # how the last step failed, if it did
    num_step_failures: Mapped[int] = mapped_column(server_default="0")  # consecutive, in this way
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
    """One line of a batch: its position in the file, its job, and its outcome. Deleted when the output is frozen."""

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
    line: Mapped[int] = mapped_column(primary_key=True)  # its number in the file, from 1
    custom_id: Mapped[str]
    first_byte: Mapped[int] = mapped_column(BigInteger)
    num_bytes: Mapped[int]
    prefix_hash: Mapped[int] = mapped_column(BigInteger)  # lines with the same beginning run one after another
    num_sequences: Mapped[int] = mapped_column(server_default="1")
    job_id: Mapped[UUID | None]  # no foreign key: a tenant may delete the job
    outcome: Mapped[LineOutcome | None] = mapped_column(TextEnum(LineOutcome))
    refusal: Mapped[LineRefusal | None] = mapped_column(PydanticJSON(LineRefusal))


STALE_UPLOAD_SECONDS = 600  # an upload without a new piece for this long is discarded

PIECES_PER_READ = 4

# Each range is assembled from the pieces that it spans.
READ_RANGES = text("""
SELECT w.place, string_agg(substring(p.content
        FROM greatest(w.first - p.number::bigint * :size, 0)::int + 1
        FOR (least(w.first + w.length, (p.number + 1)::bigint * :size)
            - greatest(w.first, p.number::bigint * :size))::int), ''::bytea ORDER BY p.number) AS content
FROM unnest(CAST(:firsts AS bigint[]), CAST(:lengths AS int[])) WITH ORDINALITY AS w(first, length, place)
JOIN file_pieces p ON p.file_id = :file_id AND p.number BETWEEN w.first / :size AND (w.first + w.length - 1) / :size
GROUP BY w.place ORDER BY w.place
""")


def begin_upload(session: Session, tenant_id: UUID, *, max_bytes: int) -> UUID:
    """Create a file that is not visible yet, and return its id. Raises InsufficientQuota if the tenant's files already
    have `max_bytes` in total."""
    _refuse_over_quota(session, tenant_id, max_bytes)
    file = File(id=new_id(), tenant_id=tenant_id, filename="", purpose="batch", status=FileStatus.UPLOADING)
    session.add(file)
    session.flush()
    return file.id


def begin_with(session: Session, tenant_id: UUID, content: bytes, *, max_bytes: int) -> UUID:
    """As `begin_upload`, with piece 0: most files have no other."""
    file_id = begin_upload(session, tenant_id, max_bytes=max_bytes)
    append(session, file_id, 0, content)
    return file_id


def append(session: Session, file_id: UUID, number: int, content: bytes) -> None:
    """Write piece `number`, counted from 0. All pieces but the last must have PIECE_BYTES."""
    session.execute(insert(FilePiece).values(file_id=file_id, number=number, content=content))
    grown = {"num_bytes": File.num_bytes + len(content), "touched_at": func.statement_timestamp()}
    session.execute(update(File).where(File.id == file_id).values(**grown))


def finish_upload(
    session: Session, file_id: UUID, tenant_id: UUID, *, filename: str, purpose: str, ttl_seconds: int, max_bytes: int
) -> File:
    """Make the file visible. Raises InsufficientQuota, even if two uploads that together exceed the quota end at the
    same time."""
    session.execute(select(Tenant.id).where(Tenant.id == tenant_id).with_for_update(key_share=True))
    _refuse_over_quota(session, tenant_id, max_bytes + 1)
    file = session.get_one(File, file_id, populate_existing=True)
    file.filename, file.purpose, file.status = filename, purpose, FileStatus.PROCESSED
    file.expires_at = _seconds_from_now(session, ttl_seconds)
    session.flush()
    session.expunge(file)
    return file


def _refuse_over_quota(session: Session, tenant_id: UUID, bound: int) -> None:
    """Raise InsufficientQuota if the tenant's files have at least `bound` bytes. Uploads in progress count with the
    bytes that have arrived."""
    num_bytes = session.scalar(select(func.coalesce(func.sum(File.num_bytes), 0)).where(File.tenant_id == tenant_id))
    if int(num_bytes or 0) >= bound:
        raise InsufficientQuota(
            f"your files have {num_bytes} bytes, but the limit is {bound}; delete some, or let them expire earlier",
            param="file",
        )


def discard(session: Session, file_id: UUID) -> None:
    """Delete an upload that was interrupted."""
    session.execute(delete(File).where(File.id == file_id, File.status == FileStatus.UPLOADING))


def get(session: Session, file_id: UUID, tenant_id: UUID) -> File | None:
    """The file, or None if the tenant does not have it, or it is still being uploaded, or it has expired."""
    file = session.scalar(
        select(File)
        .where(File.id == file_id, File.tenant_id == tenant_id, *_visible())
        .execution_options(populate_existing=True)
    )
    if file is not None:
        session.expunge(file)
    return file


def list_files(
    session: Session,
    tenant_id: UUID,
    *,
    purpose: str | None = None,
    after: UUID | None = None,
    limit: int = 10_000,
    order: Literal["asc", "desc"] = "desc",
) -> list[File]:
    """One page in the order of ids, which is the order of creation; `after` is the last id of the previous page."""
    statement: Select[File] = select(File).where(File.tenant_id == tenant_id, *_visible())
    if purpose is not None:
        statement = statement.where(File.purpose == purpose)
    if after is not None:
        statement = statement.where(File.id > after if order == "asc" else File.id < after)
    statement = statement.order_by(File.id.asc() if order == "asc" else File.id.desc()).limit(limit)
    found = list(session.scalars(statement.execution_options(populate_existing=True)))
    session.expunge_all()
    return found


def _visible() -> tuple[ColumnElement[bool], ...]:
    unexpired = or_(File.expires_at.is_(None), File.expires_at > func.statement_timestamp())
    return File.status != FileStatus.UPLOADING, unexpired


def delete_file(session: Session, file_id: UUID, tenant_id: UUID) -> bool:
    """Delete a file. False if the tenant has no such file. Raises InvalidRequest while an unfinished batch uses it."""
    # Conflicts with the lock taken for a batch that is about to use the file, so that one of the two sees the other.
    file = session.scalar(
        select(File).where(File.id == file_id, File.tenant_id == tenant_id, *_visible()).with_for_update()
    )
    if file is None:
        return False
    if session.scalar(select(exists().where(_in_use(file_id)))):
        raise InvalidRequest(
            "an unfinished batch needs this file; cancel the batch or wait until it ends", param="file_id"
        )
    session.execute(delete(File).where(File.id == file_id))
    return True


def _in_use(file_id: "UUID | ColumnElement[UUID]") -> ColumnElement[bool]:
    is_named = or_(Batch.input_file_id == file_id, Batch.output_file_id == file_id, Batch.error_file_id == file_id)
    return is_named & text(f"batches.{UNFINISHED}")


def read_pieces(session: Session, file_id: UUID, *, first: int, num_pieces: int = PIECES_PER_READ) -> list[bytes]:
    """A few consecutive pieces from number `first` on; empty after the last."""
    statement = (
        select(FilePiece.content)
        .where(FilePiece.file_id == file_id, FilePiece.number >= first)
        .order_by(FilePiece.number)
        .limit(num_pieces)
    )
    return list(session.scalars(statement))


def read_ranges(session: Session, file_id: UUID, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
    """The bytes of each range (first byte, length), in order, without reading the bytes in between."""
    parameters = {
        "file_id": file_id,
        "firsts": [first for first, _ in ranges],
        "lengths": [length for _, length in ranges],
        "size": PIECE_BYTES,
    }
    return [bytes(row.content) for row in session.execute(READ_RANGES, parameters)]


def create_live(session: Session, tenant_id: UUID, filename: str) -> UUID:
    """Create a file that a batch will write. Until it is frozen, its content is assembled from the batch's lines."""
    file = File(id=new_id(), tenant_id=tenant_id, filename=filename, purpose="batch_output", status=FileStatus.LIVE)
    session.add(file)
    session.flush()
    return file.id


def extend(session: Session, file_id: UUID, content: bytes) -> None:
    """Append to the content: fill the last piece, then add more. The caller must be the only writer."""
    num_bytes = session.scalars(select(File.num_bytes).where(File.id == file_id)).one()
    number, used = divmod(num_bytes, PIECE_BYTES)
    if used and content:
        rest, content = content[: PIECE_BYTES - used], content[PIECE_BYTES - used :]
        grown = {"content": FilePiece.content.op("||")(rest)}
        session.execute(update(FilePiece).where(FilePiece.file_id == file_id, FilePiece.number == number).values(grown))
        session.execute(update(File).where(File.id == file_id).values(num_bytes=File.num_bytes + len(rest)))
        number += 1
    for start in range(0, len(content), PIECE_BYTES):
        append(session, file_id, number + start // PIECE_BYTES, content[start : start + PIECE_BYTES])


def freeze(session: Session, file_id: UUID, *, ttl_seconds: int) -> bool:
    """Make the content written so far final. If there is none, delete the file and return False."""
    file = session.get_one(File, file_id, populate_existing=True)
    if file.num_bytes == 0:
        session.delete(file)
        session.flush()
        return False
    file.status, file.expires_at = (FileStatus.PROCESSED, _seconds_from_now(session, ttl_seconds))
    session.flush()
    return True


def prune(session: Session, *, limit: int = 20) -> int:
    """Delete interrupted uploads, and expired files that no unfinished batch needs. Returns how many."""
    now = func.statement_timestamp()
    is_stale = (File.status == FileStatus.UPLOADING) & (
        File.touched_at < now - func.make_interval(0, 0, 0, 0, 0, 0, STALE_UPLOAD_SECONDS)
    )
    is_over = (File.expires_at <= now) & ~exists().where(_in_use(File.id))  # type: ignore[arg-type]
    picked = select(File.id).where(is_stale | is_over).limit(limit).with_for_update(skip_locked=True)
    return len(session.execute(delete(File).where(File.id.in_(picked)).returning(File.id)).all())


def _seconds_from_now(session: Session, seconds: int) -> datetime:
    then = session.scalar(select(func.statement_timestamp() + func.make_interval(0, 0, 0, 0, 0, 0, seconds)))
    assert isinstance(then, datetime)
    return then
