"""The lines of batches: added, turned into jobs, recorded as they end, and read for the output files.

As in `storage/batches.py`, nothing here commits, and functions that write need the lock on the batch's row.
"""

# ruff: noqa: S608  (only constants of the storage are inserted into the text; values are bound)

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from uuid import UUID

from sqlalchemy import JSON, exists, func, select, text, type_coerce
from sqlalchemy.orm import Session

from domain.jobs import BATCH_PRIORITY, MIN_PRIORITY, LineOutcome, LineRefusal
from storage.files import UNFINISHED, Batch, BatchLine
from storage.job_queries import JobRecord, readable_result
from storage.job_statements import (
    AGEING_SECONDS,
    CLOCK,
    HELD_LINE,
    STANDING,
    locked_in_order,
    ranked,
)
from storage.jobs import extent
from storage.tables import Job, JobResult, Tenant

# A line has also ended if the tenant has deleted its job.
RECORD_ENDED = text("""
WITH ended AS MATERIALIZED (
    SELECT l.line, coalesce(j.status, 'cancelled') AS outcome, j.num_prompt_tokens, j.num_committed_tokens
    FROM batch_lines l LEFT JOIN jobs j ON j.id = l.job_id
    WHERE l.batch_id = :batch_id AND l.job_id IS NOT NULL AND l.outcome IS NULL
        AND (j.id IS NULL OR j.finished_at IS NOT NULL)
),
recorded AS (
    UPDATE batch_lines l SET outcome = ended.outcome FROM ended WHERE l.batch_id = :batch_id AND l.line = ended.line
)
SELECT count(*) AS num_ended, count(*) FILTER (WHERE outcome = 'completed') AS num_completed,
    coalesce(sum(num_prompt_tokens) FILTER (WHERE outcome = 'completed'), 0) AS prompt_tokens,
    coalesce(sum(num_committed_tokens) FILTER (WHERE outcome = 'completed'), 0) AS completion_tokens
FROM ended
""")

ADD_LINES = text("""
INSERT INTO batch_lines (batch_id, line, custom_id, first_byte, num_bytes, prefix_hash)
SELECT :batch_id, * FROM unnest(CAST(:lines AS int[]), CAST(:custom_ids AS text[]), CAST(:firsts AS bigint[]),
    CAST(:lengths AS int[]), CAST(:hashes AS bigint[]))
ON CONFLICT DO NOTHING RETURNING line
""")

ATTACH = text("""
UPDATE batch_lines l SET job_id = n.job_id, num_sequences = n.num_sequences
FROM unnest(CAST(:lines AS int[]), CAST(:job_ids AS uuid[]), CAST(:nums AS int[])) AS n(line, job_id, num_sequences)
WHERE l.batch_id = :batch_id AND l.line = n.line
""")

END_WAITING = text("""
WITH waiting AS (SELECT line FROM batch_lines WHERE batch_id = :batch_id AND job_id IS NULL AND outcome IS NULL),
ended AS (
    UPDATE batch_lines l SET outcome = :outcome FROM waiting WHERE l.batch_id = :batch_id AND l.line = waiting.line
)
SELECT count(*) FROM waiting
""")

# The number of sequences of lines that workers are running or are about to get.
OUTSTANDING = text("""
SELECT coalesce(sum(l.num_sequences), 0) FROM batch_lines l JOIN jobs j ON j.id = l.job_id
WHERE l.job_id IS NOT NULL AND l.outcome IS NULL AND j.model = :model AND (j.status = 'in_progress'
    OR (j.status = 'queued' AND j.num_dispatches > 0))
""")

# A batch yields to other jobs for this part of its window, and at most for as long as a line takes to rise.
YIELDING_PART = 0.25
MAX_YIELDING_SECONDS = AGEING_SECONDS * -BATCH_PRIORITY

OVERDUE = text(f"""
SELECT id FROM batches WHERE {UNFINISHED} AND status = 'in_progress' AND model = :model AND {CLOCK} - created_at
    >= least(make_interval(secs => {MAX_YIELDING_SECONDS}), {YIELDING_PART} * (expires_at - created_at))
""")

# Where a line stands that has waited as long as it must. It keeps this place if it is paused or its worker is lost.
RISEN = f"least(j.available_at, {CLOCK} + make_interval(secs => {AGEING_SECONDS} * j.priority))"

OF_BATCHES = """EXISTS (SELECT FROM batch_lines l WHERE l.job_id = j.id AND l.outcome IS NULL
        AND l.batch_id = ANY(CAST(:batch_ids AS uuid[])))"""

# For the lines of batches that have yielded long enough: they count as other jobs do, and are let in though these wait.
RAISE_LINES = text(f"""
WITH {ranked(f"{HELD_LINE} AND {OF_BATCHES}")},
{locked_in_order(HELD_LINE)}
UPDATE jobs j SET num_dispatches = 1, available_at = {RISEN} FROM pick WHERE j.id = pick.id
""")

# The same for those that had been let in, and then others came.
RAISE_LINES_THAT_ARE_IN = text(f"""
WITH pick AS MATERIALIZED (
    SELECT j.id FROM jobs j WHERE j.status = 'queued' AND j.model = :model AND j.lane = 'standard'
        AND j.priority < {MIN_PRIORITY} AND j.num_dispatches > 0 AND {STANDING} < 0 AND {OF_BATCHES}
    ORDER BY j.id FOR NO KEY UPDATE SKIP LOCKED
)
UPDATE jobs j SET available_at = {RISEN} FROM pick WHERE j.id = pick.id
""")

TAKE_TURN = text("SELECT pg_try_advisory_xact_lock(hashtextextended('celeriac batches of ' || :model, 0))")


@dataclass(frozen=True, slots=True)
class NewLine:
    """A valid line and its position in the file."""

    line: int
    custom_id: str
    first_byte: int
    num_bytes: int
    prefix_hash: int


@dataclass(frozen=True, slots=True)
class EndedLine:
    """A line that has ended; `record` is None if it had no job, or its job was deleted."""

    line: BatchLine
    record: JobRecord | None


def add_lines(session: Session, batch_id: UUID, lines: Sequence[NewLine]) -> set[int]:
    """Add lines to the batch. Returns the numbers of those whose custom_id was not taken."""
    columns = {
        "lines": [line.line for line in lines],
        "custom_ids": [line.custom_id for line in lines],
        "firsts": [line.first_byte for line in lines],
        "lengths": [line.num_bytes for line in lines],
        "hashes": [line.prefix_hash for line in lines],
    }
    return set(session.execute(ADD_LINES, columns | {"batch_id": batch_id}).scalars())


def record_ended(session: Session, batch: Batch) -> None:
    """Record which lines' jobs have ended."""
    ended = session.execute(RECORD_ENDED, {"batch_id": batch.id}).one()
    batch.num_in_flight -= ended.num_ended
    batch.num_completed += ended.num_completed
    batch.num_failed += ended.num_ended - ended.num_completed
    batch.prompt_tokens += int(ended.prompt_tokens)
    batch.completion_tokens += int(ended.completion_tokens)


def waiting_lines(session: Session, batch_id: UUID, *, limit: int, max_bytes: int) -> list[BatchLine]:
    """The next lines without a job, at least one if there are any, up to `max_bytes` in total. Lines with the same
    beginning are adjacent. None while the tenant is disabled."""
    is_disabled = exists().where(Batch.id == batch_id, Tenant.id == Batch.tenant_id, Tenant.disabled_at.is_not(None))
    statement = (
        select(BatchLine)
        .where(BatchLine.batch_id == batch_id, BatchLine.job_id.is_(None), BatchLine.outcome.is_(None), ~is_disabled)
        .order_by(BatchLine.prefix_hash, BatchLine.line)
        .limit(limit)
    )
    lines = list(session.scalars(statement))
    return lines[: num_within([line.num_bytes for line in lines], max_bytes)]


def still_waiting(session: Session, batch_id: UUID, lines: Iterable[int]) -> dict[int, BatchLine]:
    """Those of these lines that still have neither a job nor an outcome, by number."""
    waiting = (BatchLine.job_id.is_(None), BatchLine.outcome.is_(None))
    statement = select(BatchLine).where(BatchLine.batch_id == batch_id, BatchLine.line.in_(list(lines)), *waiting)
    found = session.scalars(statement.execution_options(populate_existing=True))
    return {line.line: line for line in found}


def attach_jobs(session: Session, batch: Batch, jobs: Mapping[int, tuple[UUID, int]]) -> None:
    """Record the lines' jobs. `jobs` maps a line number to the job's id and its number of sequences."""
    columns = {
        "lines": list(jobs),
        "job_ids": [job_id for job_id, _ in jobs.values()],
        "nums": [num_sequences for _, num_sequences in jobs.values()],
    }
    session.execute(ATTACH, columns | {"batch_id": batch.id})
    batch.num_in_flight += len(jobs)


def refuse_line(batch: Batch, line: BatchLine, refusal: LineRefusal) -> None:
    """Record that this line cannot become a job."""
    line.outcome, line.refusal = LineOutcome.FAILED, refusal
    batch.num_failed += 1


def end_waiting_lines(session: Session, batch: Batch, outcome: LineOutcome) -> None:
    """End all lines that have no job yet."""
    batch.num_failed += session.execute(END_WAITING, {"batch_id": batch.id, "outcome": outcome.value}).scalar_one()


def in_flight_job_ids(session: Session, batch_id: UUID) -> list[UUID]:
    statement = select(BatchLine.job_id).where(
        BatchLine.batch_id == batch_id, BatchLine.job_id.is_not(None), BatchLine.outcome.is_(None)
    )
    return [job_id for job_id in session.scalars(statement) if job_id is not None]


def ended_lines(
    session: Session, batch_id: UUID, *, after: int, limit: int, max_bytes: int, is_completed: bool | None = None
) -> list[EndedLine]:
    """Ended lines with a number above `after`, in order. `is_completed` selects completed lines, the others, or (None)
    all. At least one line if there are any, up to `max_bytes` of stored requests and results in total."""
    num_bytes = func.coalesce(func.pg_column_size(JobResult.result), 0) + BatchLine.num_bytes
    statement = (
        select(BatchLine, num_bytes)
        .outerjoin(JobResult, JobResult.job_id == BatchLine.job_id)
        .where(BatchLine.batch_id == batch_id, BatchLine.line > after, BatchLine.outcome.is_not(None))
    )
    if is_completed is not None:
        was_completed = BatchLine.outcome == LineOutcome.COMPLETED
        statement = statement.where(was_completed if is_completed else ~was_completed)
    found = session.execute(statement.order_by(BatchLine.line).limit(limit)).all()
    lines = [row[0] for row in found[: num_within([row[1] for row in found], max_bytes)]]
    rows = session.execute(
        select(Job, type_coerce(JobResult.result, JSON))
        .outerjoin(JobResult, JobResult.job_id == Job.id)
        .where(Job.id.in_([line.job_id for line in lines if line.job_id is not None]))
    )
    record_by_id = {job.id: JobRecord(job, None, readable_result(job, raw)) for job, raw in rows}
    return [EndedLine(line, record_by_id.get(line.job_id) if line.job_id is not None else None) for line in lines]


def num_within(sizes: Iterable[int], bound: int) -> int:
    """How many sizes, from the first on, add up to at most `bound`; at least 1."""
    return max(1, sum(total <= bound for total in accumulate(sizes)))


# What dispatch asks


def count_outstanding(session: Session, model: str) -> int | None:
    """The number of sequences of batch lines that run or are about to. No other process can count them until the
    transaction ends; None if another one already does."""
    if not session.execute(TAKE_TURN, {"model": model}).scalar_one():
        return None
    return num_outstanding(session, model)


def overdue(session: Session, model: str) -> Sequence[UUID]:
    """The batches that have yielded long enough: their lines count as other jobs do."""
    return session.execute(OVERDUE, {"model": model}).scalars().all()


def raise_lines(session: Session, model: str, batch_ids: Sequence[UUID], *, limit: int) -> None:
    """From now on, the lines of these batches count as other jobs do, and up to `limit` more of them are let in."""
    parameters = {"model": model, "batch_ids": list(batch_ids)}
    session.execute(RAISE_LINES_THAT_ARE_IN, parameters)
    if limit > 0:
        session.execute(RAISE_LINES, parameters | extent(limit))


def num_outstanding(session: Session, model: str) -> int:
    """The same count, without the lock."""
    return int(session.execute(OUTSTANDING, {"model": model}).scalar_one())
