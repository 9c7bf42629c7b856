"""The ledger: what each attempt at a job took, for billing.

A record is written by the statement that ends the attempt, so that none is missing, and kept when the job is deleted.
It contains neither prompts nor output.

An attempt has one record, and a job that ends in the queue has one more, with nothing taken. So has a job that is
completed with another one's output. The sums over a job's records are its `usage`, without what it has from other jobs:
its prompt counts with its first attempt, and the output with the attempt that committed it. If output is discarded
because the job starts over, a record with a negative number of tokens takes it back.
"""

# ruff: noqa: S608  (only constants of the storage modules are inserted into the text; values are bound)

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import REAL, BigInteger, Double, Index, func, select, text
from sqlalchemy.orm import Mapped, Session, mapped_column

from domain.jobs import MIN_PRIORITY, JobKind
from domain.requests import GenerationResult, JobOutput
from storage.job_statements import CLOCK
from storage.tables import Row
from storage.usage_hours import HOUR_SECONDS, closed_within


class UsageRecord(Row):
    """One attempt, or the end of a job in the queue. Without foreign keys, as it outlives what it refers to."""

    __tablename__ = "usage_records"
    __table_args__ = (
        Index("usage_records_ended_idx", "ended_at", postgresql_using="brin"),
        Index(
            "usage_records_model_idx",
            "model",
            "ended_at",
            postgresql_where=text("is_attempt AND NOT is_batch"),
        ),
    )

    tenant_id: Mapped[UUID] = mapped_column(primary_key=True)
    ended_at: Mapped[datetime] = mapped_column(primary_key=True)
    job_id: Mapped[UUID] = mapped_column(primary_key=True)
    attempt: Mapped[int] = mapped_column(primary_key=True)
    outcome: Mapped[str] = mapped_column(primary_key=True)  # an AttemptOutcome, `deleted`, or `restarted`
    is_attempt: Mapped[bool]  # not just the end of a queued job, nor a correction
    is_end: Mapped[bool]  # of the job
    key_id: Mapped[str | None]
    model: Mapped[str]
    adapter: Mapped[str | None]
    kind: Mapped[JobKind]
    is_batch: Mapped[bool]
    num_prompt_tokens: Mapped[int] = mapped_column(BigInteger)
    num_cached_tokens: Mapped[int] = mapped_column(BigInteger)  # of the prompt
    num_output_tokens: Mapped[int] = mapped_column(BigInteger)
    num_reasoning_tokens: Mapped[int] = mapped_column(BigInteger)  # of the output, up to </think>
    queue_seconds: Mapped[float] = mapped_column(Double)
    prefill_seconds: Mapped[float] = mapped_column(Double)  # from the claim to the first committed output
    decode_seconds: Mapped[float] = mapped_column(Double)
    engine_seconds: Mapped[float] = mapped_column(Double)  # each step's time, divided by the sequences in it
    num_allowed_tokens: Mapped[int] = mapped_column(BigInteger, server_default="0")  # of output, of all choices
    eta_start_seconds: Mapped[float | None] = mapped_column(REAL)  # of a first attempt: the raw estimates
    eta_end_seconds: Mapped[float | None] = mapped_column(REAL)


#: What `RETURNING` must contain for a record, besides id, tenant_id and attempt.
RECORDED_COLUMNS = """j.model AS model_id, j.adapter, j.kind, j.priority, j.key_id, j.created_at AS accepted_at,
        j.attempt_started_at AS claimed_at, j.first_token_at, j.num_prompt_tokens, j.engine_seconds,
        j.cost, j.cost - j.num_prompt_tokens AS num_allowed_tokens, j.eta"""

_COLUMNS = """tenant_id, ended_at, job_id, attempt, outcome, is_attempt, is_end, key_id, model, adapter, kind, is_batch,
        num_prompt_tokens, num_cached_tokens, num_output_tokens, num_reasoning_tokens,
        queue_seconds, prefill_seconds, decode_seconds, engine_seconds,
        num_allowed_tokens, eta_start_seconds, eta_end_seconds"""

_JOB = f"o.key_id, o.model_id, o.adapter, o.kind, o.priority < {MIN_PRIORITY}"

# A job waits from its acceptance, or from the end of the attempt before.
_QUEUED_AT = """coalesce((SELECT max(a.ended_at) FROM job_attempts a WHERE o.attempt > {first} AND a.job_id = o.id
            AND a.ended_at <= {until}), o.accepted_at)"""


def attempts_recorded(
    over: str, *, is_end: str, cached: str = "0", reasoning: str = "0", engine_seconds: str = "o.engine_seconds"
) -> str:
    """A CTE that records the attempts in `over`, which has RECORDED_COLUMNS, `outcome` and `num_tokens`. An attempt
    that continues earlier output counts as decoding from its claim on."""
    queued_at = _QUEUED_AT.format(first=1, until="t.claimed_at")
    return f"""
recorded AS (
    INSERT INTO usage_records ({_COLUMNS})
    SELECT o.tenant_id, {CLOCK}, o.id, o.attempt, o.outcome, true, {is_end}, {_JOB},
        CASE WHEN o.attempt = 1 THEN o.num_prompt_tokens ELSE 0 END, least({cached}, o.num_prompt_tokens),
        o.num_tokens, {reasoning},
        greatest(0, extract(epoch FROM t.claimed_at - {queued_at})),
        greatest(0, extract(epoch FROM t.spoke_at - t.claimed_at)),
        greatest(0, extract(epoch FROM {CLOCK} - t.spoke_at)), {engine_seconds}, o.num_allowed_tokens,
        CASE WHEN o.attempt = 1 THEN o.eta[1] END, CASE WHEN o.attempt = 1 THEN o.eta[2] END
    FROM {over} o CROSS JOIN LATERAL (
        SELECT coalesce(o.claimed_at, {CLOCK}) AS claimed_at,
            greatest(coalesce(o.first_token_at, {CLOCK}), o.claimed_at) AS spoke_at
    ) t
    ON CONFLICT DO NOTHING
)"""


def ends_recorded(over: str, *, outcome: str, condition: str) -> str:
    """A CTE that records jobs in `over`, which has RECORDED_COLUMNS, that ended while they were queued."""
    queued_at = _QUEUED_AT.format(first=0, until=CLOCK)
    return f"""
recorded AS (
    INSERT INTO usage_records ({_COLUMNS})
    SELECT o.tenant_id, {CLOCK}, o.id, o.attempt, {outcome}, false, true, {_JOB},
        0, 0, 0, 0, greatest(0, extract(epoch FROM {CLOCK} - {queued_at})), 0, 0, 0, 0, NULL, NULL
    FROM {over} o WHERE {condition}
    ON CONFLICT DO NOTHING
)"""


def discarded_recorded(over: str) -> str:
    """A CTE that takes back the output of the jobs in `over`, which has RECORDED_COLUMNS and `num_discarded`."""
    return f"""
recorded AS (
    INSERT INTO usage_records ({_COLUMNS})
    SELECT o.tenant_id, {CLOCK}, o.id, o.attempt, 'restarted', false, false, {_JOB},
        0, 0, -o.num_discarded, 0, 0, 0, 0, 0, 0, NULL, NULL
    FROM {over} o WHERE o.num_discarded > 0
    ON CONFLICT DO NOTHING
)"""


def reasoning_tokens_of(output: JobOutput | None) -> int:
    """The output tokens of all choices up to </think>, where there is one."""
    if not isinstance(output, GenerationResult):
        return 0
    return sum(choice.num_reasoning_tokens or 0 for choice in output.choices)


MAX_GROUPS = 10_000  # of one query

TOTALS_SECONDS = 5.0  # after this the server gives up a query, for whose answer nobody waits any more


@dataclass(frozen=True, slots=True)
class UsageQuery:
    """Which records are summed up, and by what. An empty list of names stands for all."""

    start: datetime
    end: datetime  # exclusive
    tenant_id: UUID | None = None  # None: of all tenants
    by_tenant: bool = False
    by_key: bool = False
    by_batch: bool = False
    bucket_seconds: int = 0  # 0: not by time
    kinds: Sequence[JobKind] = tuple(JobKind)
    tenants: Sequence[str] = ()
    key_ids: Sequence[str] = ()
    models: Sequence[str] = ()  # without adapters
    is_batch: bool | None = None


@dataclass(frozen=True, slots=True)
class UsageTotal:
    """The sum over one model's records of one group. What is not grouped by is None."""

    bucket: int | None  # seconds since 1970
    tenant: str | None
    key_id: str | None
    is_batch: bool | None
    model: str
    adapter: str | None
    num_jobs: int  # that have ended
    num_attempts: int
    num_prompt_tokens: int
    num_cached_tokens: int
    num_output_tokens: int
    num_reasoning_tokens: int
    queue_seconds: float
    prefill_seconds: float
    decode_seconds: float
    engine_seconds: float


_SUMS = """num_prompt_tokens, num_cached_tokens, num_output_tokens, num_reasoning_tokens,
        queue_seconds, prefill_seconds, decode_seconds, engine_seconds"""

_RECORDS = f"""
    SELECT ended_at, tenant_id, key_id, model, adapter, kind, is_batch, is_end::int AS num_jobs,
        is_attempt::int AS num_attempts, {_SUMS}
    FROM usage_records WHERE ended_at >= {{start}} AND ended_at < {{end}} {{of_tenant}}"""


# Without the tenant in a condition of its own, PostgreSQL would not use the primary key once it plans for all values.
def _totals(of_tenant: str) -> str:
    return f"""
WITH known AS (
    SELECT id, name FROM tenants
    UNION ALL
    SELECT CAST(a.changes->>'id' AS uuid), a.tenant FROM audit_log a  -- deleted ones, unless another has the name now
    WHERE a.action = 'tenant.delete' AND a.changes->>'id' IS NOT NULL
        AND NOT EXISTS (SELECT FROM tenants t WHERE t.name = a.tenant)
),
part AS (  -- whole hours as they were summed up, and records before and after them
    {_RECORDS.format(start=":start", end=":first", of_tenant=of_tenant)}
    UNION ALL
    {_RECORDS.format(start=":last", end=":end", of_tenant=of_tenant)}
    UNION ALL
    SELECT hour, tenant_id, nullif(key_id, ''), model, nullif(adapter, ''), kind, is_batch, num_jobs, num_attempts,
        {_SUMS}
    FROM usage_hours WHERE hour >= :first AND hour < :last {of_tenant}
),
total AS (
    SELECT CASE WHEN :bucket_seconds > 0 THEN
            (floor(extract(epoch FROM u.ended_at) / :bucket_seconds) * :bucket_seconds)::bigint END AS bucket,
        CASE WHEN :by_tenant THEN u.tenant_id END AS tenant_id,
        CASE WHEN :by_key THEN u.key_id END AS key_id, CASE WHEN :by_batch THEN u.is_batch END AS is_batch,
        u.model, u.adapter,
        sum(u.num_jobs)::bigint AS num_jobs, sum(u.num_attempts)::bigint AS num_attempts,
        sum(u.num_prompt_tokens)::bigint AS prompt, sum(u.num_cached_tokens)::bigint AS cached,
        sum(u.num_output_tokens)::bigint AS output, sum(u.num_reasoning_tokens)::bigint AS reasoning,
        sum(u.queue_seconds) AS queued, sum(u.prefill_seconds) AS prefill, sum(u.decode_seconds) AS decode,
        sum(u.engine_seconds) AS engine
    FROM part u
    WHERE u.kind = ANY(CAST(:kinds AS text[]))
        AND (CAST(:key_ids AS text[]) = '{{}}' OR u.key_id = ANY(CAST(:key_ids AS text[])))
        AND (CAST(:models AS text[]) = '{{}}' OR u.model = ANY(CAST(:models AS text[])))
        AND (CAST(:is_batch AS boolean) IS NULL OR u.is_batch = :is_batch)
        AND (CAST(:tenants AS text[]) = '{{}}'
            OR u.tenant_id IN (SELECT id FROM known WHERE name = ANY(CAST(:tenants AS text[]))))
    GROUP BY 1, 2, 3, 4, 5, 6
)
SELECT total.bucket, coalesce(t.name, total.tenant_id::text) AS tenant, key_id, is_batch, model, adapter, num_jobs,
    num_attempts, prompt, cached, output, reasoning, queued, prefill, decode, engine
FROM total LEFT JOIN known t ON t.id = total.tenant_id
ORDER BY bucket, tenant, key_id, is_batch, model, adapter LIMIT {MAX_GROUPS + 1}
"""


TOTALS = text(_totals(""))

TOTALS_OF_TENANT = text(_totals("AND tenant_id = :tenant_id"))

PRUNE_USAGE = text(f"""
DELETE FROM usage_records WHERE ctid = ANY(ARRAY(
    SELECT ctid FROM usage_records WHERE ended_at < {CLOCK} - make_interval(days => :days) LIMIT :limit))
""")


def totals(session: Session, query: UsageQuery, *, seconds: float = TOTALS_SECONDS) -> list[UsageTotal]:
    """The totals by model and by what the query says, in order. More than MAX_GROUPS mean that there are more. Needs a
    transaction, for its time limit. Raises OperationalError after `seconds`."""
    session.execute(select(func.set_config("statement_timeout", f"{round(1000 * seconds)}ms", True)))
    first, last = query.start, query.start
    if query.bucket_seconds % HOUR_SECONDS == 0:
        first, last = closed_within(session, query.start, query.end)
    parameters: dict[str, Any] = {
        "start": query.start,
        "first": first,
        "last": last,
        "end": query.end,
        "by_tenant": query.by_tenant,
        "by_key": query.by_key,
        "by_batch": query.by_batch,
        "bucket_seconds": query.bucket_seconds,
        "kinds": [kind.value for kind in query.kinds],
        "tenants": list(query.tenants),
        "key_ids": list(query.key_ids),
        "models": list(query.models),
        "is_batch": query.is_batch,
    }
    if query.tenant_id is None:
        rows = session.execute(TOTALS, parameters)
    else:
        rows = session.execute(TOTALS_OF_TENANT, parameters | {"tenant_id": query.tenant_id})
    return [UsageTotal(*row) for row in rows]


def prune(session: Session, *, days: int, limit: int = 1_000) -> int:
    """Delete records that are older than this. Returns how many."""
    result = session.connection().execute(PRUNE_USAGE, {"days": days, "limit": limit})
    return int(result.rowcount)
