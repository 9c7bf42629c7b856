"""Every row class except those of files, batches, webhooks and other things that have a file of their own here.

SQL is the only truth: no fact about a job exists only in Redis.
"""

from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import (
    ARRAY,
    JSON,
    REAL,
    BigInteger,
    CheckConstraint,
    Double,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    SmallInteger,
    Text,
    UniqueConstraint,
    func,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB, TIMESTAMP
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from domain.access import Scope
from domain.callbacks import CALLBACK, CeleryCallback
from domain.jobs import AttemptOutcome, Endpoint, FinishReason, JobError, JobKind, JobStatus, Lane, WorkerState
from domain.model_names import model_name
from domain.requests import REQUEST, RESULT, JobOutput, JobRequest, TokenChunk
from storage.column_types import AdaptedJSON, PydanticJSON, TextEnum

IS_PRUNED = {"postgresql_with": {"autovacuum_vacuum_scale_factor": "0.02"}}  # vacuumed when a fiftieth is deleted
DEFAULT_TENANT_ID = UUID("00000000-0000-7000-8000-000000000001")  # the tenant `default`, created by the first migration


class Row(DeclarativeBase):
    metadata = MetaData(
        naming_convention={
            "ix": "%(table_name)s_%(column_0_N_name)s_idx",
            "uq": "%(table_name)s_%(column_0_N_name)s_key",
            "ck": "%(table_name)s_%(constraint_name)s_check",
            "fk": "%(table_name)s_%(column_0_N_name)s_fkey",
            "pk": "%(table_name)s_pkey",
        }
    )
    type_annotation_map = {  # noqa: RUF012  (SQLAlchemy reads it as a class attribute)
        datetime: TIMESTAMP(timezone=True),
        str: Text,
        bytes: LargeBinary,
        JobStatus: TextEnum(JobStatus),
        Lane: TextEnum(Lane),
        Endpoint: TextEnum(Endpoint),
        AttemptOutcome: TextEnum(AttemptOutcome),
        FinishReason: TextEnum(FinishReason),
        WorkerState: TextEnum(WorkerState),
        JobError: PydanticJSON(JobError),
        JobKind: TextEnum(JobKind),
        TokenChunk: PydanticJSON(TokenChunk),
        dict[str, str]: JSON,
        dict[str, Any]: JSON,
        list[int]: ARRAY(Integer),
        list[str]: ARRAY(Text),
    }


class Tenant(Row):
    """The owner of jobs; fairness, limits and isolation are per tenant."""

    __tablename__ = "tenants"
    __table_args__ = (
        CheckConstraint("weight > 0", name="weight"),
        CheckConstraint("max_priority BETWEEN 0 AND 10", name="max_priority"),
        CheckConstraint("retention_seconds BETWEEN 60 AND 315360000", name="retention_seconds"),
    )

    id: Mapped[UUID] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    max_queued: Mapped[int | None]  # None: the installation's limit
    weight: Mapped[float] = mapped_column(REAL, server_default="1")
    signing_key: Mapped[UUID] = mapped_column(server_default=func.gen_random_uuid())  # of its stream tokens and seals
    max_priority: Mapped[int] = mapped_column(SmallInteger, server_default="0")  # that counts among other tenants' jobs
    retention_seconds: Mapped[int] = mapped_column(server_default="315360000")  # finished jobs are kept no longer
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    disabled_at: Mapped[datetime | None]  # since when none of its keys is valid
    archived_at: Mapped[datetime | None]  # since when the archive has jobs of it


class TenantLoad(Row):
    """Counters of one tenant, changed in the same statement as the job rows they count."""

    __tablename__ = "tenant_load"
    __table_args__ = (
        CheckConstraint("num_queued >= 0", name="num_queued"),
        CheckConstraint("num_running >= 0", name="num_running"),
        {"postgresql_with": {"fillfactor": "50"}},
    )

    tenant_id: Mapped[UUID] = mapped_column(ForeignKey("tenants.id", ondelete="CASCADE"), primary_key=True)
    num_queued: Mapped[int] = mapped_column(server_default="0")
    num_running: Mapped[int] = mapped_column(server_default="0")
    virtual_time: Mapped[float] = mapped_column(Double, server_default="0")  # tokens / weight
    num_queued_tokens: Mapped[int] = mapped_column(BigInteger, server_default="0")  # the costs of those that wait
    num_unused_tokens: Mapped[int] = mapped_column(BigInteger, server_default="0")  # see storage/running_sums.py
    num_excess_tokens: Mapped[int] = mapped_column(BigInteger, server_default="0")


class ApiKey(Row):
    """A credential of one tenant. The secret itself is never stored."""

    __tablename__ = "api_keys"
    __table_args__ = (CheckConstraint("max_priority BETWEEN 0 AND 10", name="max_priority"),)

    id: Mapped[str] = mapped_column(primary_key=True)  # the public part of the key
    tenant_id: Mapped[UUID] = mapped_column(ForeignKey("tenants.id", ondelete="CASCADE"))
    secret_sha256: Mapped[bytes]
    is_admin: Mapped[bool] = mapped_column(server_default="false")  # the scope admin
    scopes: Mapped[list[str]] = mapped_column(server_default=text("'{submit,read,cancel}'"))  # all others
    name: Mapped[str] = mapped_column(server_default="")
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    expires_at: Mapped[datetime | None]
    revoked_at: Mapped[datetime | None]  # since when it is disabled
    max_priority: Mapped[int] = mapped_column(SmallInteger, server_default="10")  # within that of its tenant

    @property
    def all_scopes(self) -> frozenset[Scope]:
        """Without scopes of newer releases."""
        own = frozenset(scope for scope in Scope if scope in self.scopes)
        return own | {Scope.ADMIN} if self.is_admin else own


class AuditEntry(Row):
    """What an administrator changed. It names tenants and keys, which may be gone by now, and contains no secret."""

    __tablename__ = "audit_log"

    id: Mapped[UUID] = mapped_column(primary_key=True)  # a ULID
    changed_at: Mapped[datetime] = mapped_column(server_default=func.now())
    actor: Mapped[str]
    action: Mapped[str]
    tenant: Mapped[str]  # its name
    key_id: Mapped[str | None]
    changes: Mapped[dict[str, Any]]


class Job(Row):
    """One request, its status and its progress. Narrow and hot: input and output are in other tables."""

    __tablename__ = "jobs"
    __table_args__ = (
        UniqueConstraint("tenant_id", "idempotency_key"),
        CheckConstraint("status IN ('queued','in_progress','completed','failed','cancelled','expired')", name="status"),
        CheckConstraint("kind IN ('generation', 'embedding')", name="kind"),
        CheckConstraint("(status = 'in_progress') = (lease_owner IS NOT NULL)", name="lease_owner"),
        CheckConstraint("(status IN ('queued','in_progress')) = (finished_at IS NULL)", name="finished_at"),
        Index(
            "jobs_ready_idx",
            "model",
            "tenant_id",
            text("(EXTRACT(epoch FROM (available_at AT TIME ZONE 'UTC'::text)) - (600 * priority)::numeric)"),
            "id",
            postgresql_where=text("status = 'queued'"),
        ),
        Index("jobs_status_idx", "tenant_id", "status", text("id DESC")),
        Index(  # batch lines that wait to be let in: so that looking for them does not read all other jobs
            "jobs_held_idx",
            "model",
            "tenant_id",
            text("(EXTRACT(epoch FROM (available_at AT TIME ZONE 'UTC'::text)) - (600 * priority)::numeric)"),
            "id",
            postgresql_where=text("status = 'queued' AND lane = 'standard' AND priority < -10 AND num_dispatches = 0"),
        ),
        Index(  # what the limits of keys count
            "jobs_key_idx",
            "tenant_id",
            "key_id",
            postgresql_where=text("status = 'queued' AND key_id IS NOT NULL"),
        ),
        Index(  # those of BEGUN, of which there are few; its own columns change with every flush of running jobs
            "jobs_begun_idx",
            "model",
            "model_revision",
            postgresql_where=text("status = 'queued' AND (attempt > 0 OR retry_of IS NOT NULL)"),
        ),
        Index(  # by which the beginnings of keys are found, whatever the database's collation
            "jobs_lines_idx",
            "tenant_id",
            "idempotency_key",
            postgresql_ops={"idempotency_key": "text_pattern_ops"},
            postgresql_where=text("priority < -10"),
        ),
        # lease_expires_at is not indexed, so that renewals stay heap-only updates.
        Index("jobs_running_idx", "lease_owner", postgresql_where=text("status = 'in_progress'")),
        Index("jobs_tenant_idx", "tenant_id", text("id DESC")),
        Index("jobs_model_idx", "tenant_id", "model", text("id DESC")),
        Index(
            "jobs_deadline_idx",
            text("LEAST(deadline_at, start_deadline_at)"),
            postgresql_where=text("status = 'queued' AND LEAST(deadline_at, start_deadline_at) IS NOT NULL"),
        ),
        # Native jobs are never looked up this way, so they are not indexed.
        Index("jobs_request_hash_idx", "tenant_id", "request_hash", postgresql_where=text("endpoint <> 'jobs'")),
        Index("jobs_stored_idx", "tenant_id", "endpoint", text("id DESC"), postgresql_where=text("is_stored")),
        Index("jobs_prune_idx", "prune_at", postgresql_where=text("prune_at IS NOT NULL")),
        {"postgresql_with": {"fillfactor": "70", "autovacuum_vacuum_scale_factor": "0.02"}},
    )

    id: Mapped[UUID] = mapped_column(primary_key=True)  # a ULID drawn by the API before the insert
    tenant_id: Mapped[UUID] = mapped_column(ForeignKey("tenants.id", ondelete="CASCADE"))
    model: Mapped[str]
    adapter: Mapped[str | None]  # a LoRA adapter of the model
    model_revision: Mapped[str]  # of the files that generate its output; until the first claim, of the API's files
    endpoint: Mapped[Endpoint] = mapped_column(server_default="jobs")
    is_stored: Mapped[bool] = mapped_column(server_default="false")  # requested with store=true: listed on its route
    kind: Mapped[JobKind] = mapped_column(server_default="generation")
    lane: Mapped[Lane] = mapped_column(server_default="standard")
    priority: Mapped[int] = mapped_column(SmallInteger, server_default="0")  # higher runs earlier
    idempotency_key: Mapped[str | None]
    request_hash: Mapped[bytes]
    status: Mapped[JobStatus] = mapped_column(server_default="queued")
    attempt: Mapped[int] = mapped_column(server_default="0")  # the fencing token: +1 at every claim, never reset
    num_failures: Mapped[int] = mapped_column(server_default="0")  # drains do not count
    max_failures: Mapped[int]
    num_suspicions: Mapped[int] = mapped_column(server_default="0")  # summed weights of the engine crashes it was in
    available_at: Mapped[datetime] = mapped_column(server_default=func.now())
    start_deadline_at: Mapped[datetime | None]  # the job expires if it has not been claimed by then
    deadline_at: Mapped[datetime | None]  # the job expires then in any state
    asked_deadline_at: Mapped[datetime | None]  # the deadline that the client gave
    run_timeout_seconds: Mapped[float | None] = mapped_column(Double)  # narrows deadline_at at the first claim
    dispatch_at: Mapped[datetime] = mapped_column(server_default=func.now())  # read by earlier releases only
    num_dispatches: Mapped[int] = mapped_column(server_default="0")  # of a batch line: above 0 once it is let in
    lease_owner: Mapped[UUID | None]
    lease_expires_at: Mapped[datetime | None]
    cancel_requested_at: Mapped[datetime | None]
    committed_sequence_number: Mapped[int] = mapped_column(server_default="0")
    reset_sequence_number: Mapped[int] = mapped_column(server_default="0")  # where its output starts over
    num_committed_tokens: Mapped[int] = mapped_column(server_default="0")
    num_prompt_tokens: Mapped[int]
    max_tokens: Mapped[int]  # resolved at submit, never None
    seed: Mapped[int] = mapped_column(BigInteger)
    cost: Mapped[int]  # prompt tokens + n * max_tokens: what fairness charges
    finish_reason: Mapped[FinishReason | None]  # of the first sequence
    error: Mapped[JobError | None]
    job_metadata: Mapped[dict[str, str]] = mapped_column("metadata")
    result_ttl_seconds: Mapped[int]
    webhook_url: Mapped[str | None]  # notified of its end, in addition to the tenant's endpoints
    webhook_statuses: Mapped[list[str] | None]  # the final statuses of which it is notified
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    started_at: Mapped[datetime | None]  # the first claim
    first_token_at: Mapped[datetime | None]  # when its first chunk was committed; None for embeddings
    finished_at: Mapped[datetime | None]
    delivered_at: Mapped[datetime | None]  # when the whole answer reached a client
    prune_at: Mapped[datetime | None]  # finished_at + result_ttl_seconds
    attempt_started_at: Mapped[datetime | None]  # the newest claim
    progressed_at: Mapped[datetime | None]  # the newest claim or chunk; leases may be renewed without progress
    num_tokens_at_claim: Mapped[int] = mapped_column(server_default="0")  # committed before the newest claim
    paused_at: Mapped[datetime | None]  # while it waits because it was another tenant's turn
    retry_of: Mapped[UUID | None]  # the ended job that this one repeats, which may have been pruned
    answered_by: Mapped[UUID | None]  # the job whose output this one got a copy of; may have been pruned
    key_id: Mapped[str | None]  # the API key that it was submitted with
    engine_seconds: Mapped[float] = mapped_column(REAL, server_default="0")  # the newest attempt's, as committed
    eta: Mapped[list[float] | None] = mapped_column(ARRAY(REAL))  # at acceptance, see `domain.eta.Eta.stored`

    @property
    def model_name(self) -> str:
        """By which the request asked for it."""
        return model_name(self.model, self.adapter)


class JobPayload(Row):
    """A job's input: written once, at accept."""

    __tablename__ = "job_payloads"
    __table_args__ = IS_PRUNED

    job_id: Mapped[UUID] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    # The full dump with defaults resolved, so that a changed default does not change old jobs.
    request: Mapped[JobRequest] = mapped_column(AdaptedJSON(REQUEST))
    prompt_token_ids: Mapped[list[int]]  # for embeddings: of all inputs, concatenated
    input_lengths: Mapped[list[int] | None]  # for embeddings: tokens per input
    fingerprint: Mapped[bytes | None]  # of what the engine is asked: the same for repeated requests
    endpoint_body: Mapped[dict[str, Any] | None]  # as the client sent it, if its route shows it again
    request_id: Mapped[str | None]  # of the HTTP request that submitted it; in the logs of every process
    traceparent: Mapped[str | None]  # of that request, if it is part of a trace (W3C Trace Context)
    callback: Mapped[CeleryCallback | None] = mapped_column(AdaptedJSON(CALLBACK))


class JobChunk(Row):
    """One committed piece of a stream; append-only, except for a job that starts over."""

    __tablename__ = "job_chunks"
    __table_args__ = IS_PRUNED

    job_id: Mapped[UUID] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    sequence_number: Mapped[int] = mapped_column(primary_key=True)
    attempt: Mapped[int]
    chunk: Mapped[TokenChunk]


class JobResult(Row):
    """A job's output: written once, in the statement that makes the job terminal."""

    __tablename__ = "job_results"
    __table_args__ = IS_PRUNED

    job_id: Mapped[UUID] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    attempt: Mapped[int]
    result: Mapped[JobOutput] = mapped_column(AdaptedJSON(RESULT))


class JobAttempt(Row):
    """An attempt that has ended: written by the statement that ended it."""

    __tablename__ = "job_attempts"
    __table_args__ = (
        CheckConstraint(
            "outcome IN ('completed','failed','cancelled','expired','released','lost','crashed','stalled')",
            name="outcome",
        ),
    )

    job_id: Mapped[UUID] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    attempt: Mapped[int] = mapped_column(primary_key=True)
    worker_id: Mapped[UUID]
    worker_name: Mapped[str | None]  # None: it had not reported itself yet
    started_at: Mapped[datetime]
    ended_at: Mapped[datetime]
    outcome: Mapped[AttemptOutcome]
    error_code: Mapped[str | None]
    num_tokens: Mapped[int]  # output tokens committed in this attempt


class KnownAnswer(Row):
    """Which job has, or will have, the answer to what a tenant has asked for (storage/answers.py)."""

    __tablename__ = "answers"

    tenant_id: Mapped[UUID] = mapped_column(ForeignKey("tenants.id", ondelete="CASCADE"), primary_key=True)
    key: Mapped[bytes] = mapped_column(primary_key=True)  # a hash of the request
    job_id: Mapped[UUID] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), index=True)
    created_at: Mapped[datetime]


class JobFollower(Row):
    """A queued job that is to end with another one, its leader, which asks for the same."""

    __tablename__ = "job_followers"

    job_id: Mapped[UUID] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    leader_id: Mapped[UUID]  # no foreign key: when it is gone, its followers go on


class PoisonRecord(Row):
    """A request that crashed an engine while it ran alone; not accepted again for a day."""

    __tablename__ = "poison_requests"

    tenant_id: Mapped[UUID] = mapped_column(ForeignKey("tenants.id", ondelete="CASCADE"), primary_key=True)
    fingerprint: Mapped[bytes] = mapped_column(primary_key=True)
    job_id: Mapped[UUID]  # the newest job that failed this way; may have been pruned
    created_at: Mapped[datetime]


class MaintenanceFigure(Row):
    """What a rule of the janitor found last or has counted; part of the metrics."""

    __tablename__ = "maintenance_figures"

    name: Mapped[str] = mapped_column(primary_key=True)
    label: Mapped[str] = mapped_column(primary_key=True)
    value: Mapped[float] = mapped_column(Double)
    updated_at: Mapped[datetime]


class MaintenanceTick(Row):
    """When a clock of the maintenance processes last ticked."""

    __tablename__ = "maintenance_ticks"

    clock: Mapped[str] = mapped_column(primary_key=True)
    ticked_at: Mapped[datetime]


class RunningSums(Row):
    """When the counters of TenantLoad that count running jobs were last corrected: one row, or none."""

    __tablename__ = "running_sums"
    __table_args__ = (CheckConstraint("id = 1", name="id"),)

    id: Mapped[int] = mapped_column(SmallInteger, primary_key=True, autoincrement=False, server_default="1")
    corrected_at: Mapped[datetime]
    num_corrected: Mapped[int]  # of tenants


class Worker(Row):
    """A GPU worker process that reported recently. Used for dispatch windows and /health; correctness does not depend
    on it."""

    __tablename__ = "workers"
    __table_args__ = (
        CheckConstraint("state IN ('loading', 'ready', 'draining', 'unloaded', 'standby')", name="state"),
    )

    id: Mapped[UUID] = mapped_column(primary_key=True)  # new for each process; also the lease owner
    hostname: Mapped[str]  # the Celery node name
    model: Mapped[str]
    model_revision: Mapped[str | None]  # None: from a release that did not report it
    release: Mapped[str | None]  # of this software; None: of one that did not report it
    max_num_seqs: Mapped[int]
    num_running: Mapped[int] = mapped_column(server_default="0")
    tokens_per_second: Mapped[float] = mapped_column(Double, server_default="0")
    cache_usage: Mapped[float | None] = mapped_column(REAL)  # share of the key/value cache, 0 to 1
    memory_bytes: Mapped[int | None] = mapped_column(BigInteger)  # of the device, or else its own; None: unknown
    state: Mapped[WorkerState] = mapped_column(server_default="ready")
    load_percent: Mapped[int | None] = mapped_column(SmallInteger)  # None: not loading, or unknown
    ready_in_seconds: Mapped[float | None] = mapped_column(Double)  # None: loaded, or unknown
    troubles: Mapped[dict[str, str]] = mapped_column(JSONB, server_default=text("'{}'"))  # by domain/troubles.py
    started_at: Mapped[datetime] = mapped_column(server_default=func.now())
    seen_at: Mapped[datetime] = mapped_column(server_default=func.now())


class WorkerDrain(Row):
    """An order to the worker of this name to accept no jobs. Without a row it accepts them."""

    __tablename__ = "worker_drains"

    hostname: Mapped[str] = mapped_column(primary_key=True)  # the Celery node name
    since: Mapped[datetime] = mapped_column(server_default=func.now())
    release_after_seconds: Mapped[float] = mapped_column(Double)


class ModelState(Row):
    """Whether a model should be loaded. Without a row it should."""

    __tablename__ = "model_states"

    model: Mapped[str] = mapped_column(primary_key=True)
    is_loaded: Mapped[bool]
    changed_at: Mapped[datetime] = mapped_column(server_default=func.now())
