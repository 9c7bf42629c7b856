"""How jobs end: the statements, and jobs of model revisions that are gone.

The rules that all statements share are in `storage/job_statements.py`.

A model revision counts as served while it has a live worker in any state, since one that is still loading will run its
jobs. It counts as gone only if another revision of the same model is ready and all live workers have reported their
revision. If there is no worker at all, jobs wait for a worker, and no revision counts as gone.
"""

# ruff: noqa: S608  (only constants of the storage modules are inserted into the text; values are bound)

from sqlalchemy import text

from domain.access import MAX_RETENTION_SECONDS
from domain.errors import (
    CeleriacError,
    DeadlineExceeded,
    ModelRevisionGone,
    PoisonJob,
    RunTimeoutExceeded,
    StartTimeoutExceeded,
    WorkerLost,
)
from domain.jobs import JobError
from storage.job_statements import (
    BEGUN,
    CLOCK,
    CORRECTION,
    COUNTED,
    EXCESS_TOKENS,
    HAS_RUN_OUT,
    LEAVES_QUEUE,
    OWNED,
    RUNNING,
    STOPS,
)
from storage.usage import RECORDED_COLUMNS, attempts_recorded, discarded_recorded, ends_recorded
from storage.webhooks import IS_TOLD

LATE_ERROR = f"CAST(CASE WHEN {HAS_RUN_OUT} THEN :run_timeout_error ELSE :deadline_error END AS json)"

BEGAN = f"coalesce(j.attempt_started_at, j.started_at, {CLOCK}) AS attempt_started_at"

# Writes one row of history for each attempt in `over`. It is part of the statement that ends them, so none is missing.
NOTED = f"""
noted AS (
    INSERT INTO job_attempts (job_id, attempt, worker_id, worker_name, started_at, ended_at, outcome, error_code,
        num_tokens)
    SELECT o.id, o.attempt, o.owner, (SELECT w.hostname FROM workers w WHERE w.id = o.owner), o.attempt_started_at,
        {CLOCK}, o.outcome, o.error_code, o.num_tokens
    FROM {{over}} o ON CONFLICT DO NOTHING
)"""

FINALISE = text(f"""
WITH ending AS MATERIALIZED (
    SELECT * FROM unnest(
        CAST(:ids AS uuid[]), CAST(:attempts AS int[]), CAST(:last AS int[]), CAST(:statuses AS text[]),
        CAST(:finish_reasons AS text[]), CAST(:errors AS text[]), CAST(:results AS text[]),
        CAST(:cached_tokens AS int[]), CAST(:reasoning_tokens AS int[]), CAST(:engine_seconds AS float8[]))
        AS e(id, attempt, last, status, finish_reason, error, result, cached, reasoning, seconds_in_engine)
),
pick AS MATERIALIZED (
    SELECT ending.*, j.lease_owner AS owner FROM jobs j JOIN ending USING (id)
    WHERE {RUNNING} AND j.attempt = ending.attempt AND {OWNED} AND j.committed_sequence_number = ending.last
    ORDER BY j.id FOR NO KEY UPDATE OF j
),
ended AS (
    UPDATE jobs j SET status = pick.status, finish_reason = pick.finish_reason,
        error = CASE WHEN pick.status = 'expired' THEN {LATE_ERROR} ELSE pick.error::json END,
        finished_at = {CLOCK}, prune_at = {CLOCK} + make_interval(secs => j.result_ttl_seconds),
        num_suspicions = CASE WHEN pick.status = 'completed' THEN 0 ELSE j.num_suspicions END,
        lease_owner = NULL, lease_expires_at = NULL
    FROM pick WHERE j.id = pick.id
    RETURNING j.id, j.tenant_id, j.attempt, pick.result, {CORRECTION} AS charge, pick.owner, {BEGAN},
        pick.status AS outcome, j.error->>'code' AS error_code, pick.cached, pick.reasoning, pick.seconds_in_engine,
        j.num_committed_tokens - j.num_tokens_at_claim AS num_tokens, {IS_TOLD}, {EXCESS_TOKENS} AS excess_tokens,
        {RECORDED_COLUMNS}
),
{NOTED.format(over="ended")},
{
    attempts_recorded(
        "ended", is_end="true", cached="o.cached", reasoning="o.reasoning", engine_seconds="o.seconds_in_engine"
    )
},
written AS (
    INSERT INTO job_results (job_id, attempt, result)
    SELECT id, attempt, result::json FROM ended WHERE result IS NOT NULL
),
moved AS (SELECT id, tenant_id, 0 AS queued, 0 AS queued_tokens, {STOPS} FROM ended),
{COUNTED}
SELECT id, is_told FROM ended
UNION ALL  -- a repeated call: the first one was committed, but its answer was lost
SELECT j.id, false FROM jobs j JOIN ending USING (id) WHERE j.status = ending.status AND j.attempt = ending.attempt
    AND j.committed_sequence_number = ending.last AND (CAST(:owner AS uuid) IS NULL
        OR EXISTS (SELECT FROM job_attempts a WHERE a.job_id = j.id AND a.attempt = j.attempt AND a.worker_id = :owner))
""")


def told(jobs: str, *, has_chunks: str) -> str:
    """Select what callers log and return about the jobs in the CTE `jobs`: their state, and the time since accept."""
    return f"""
SELECT t.id, t.model, t.status, t.attempt, {has_chunks} AS has_chunks, t.is_told, t.num_committed_tokens AS num_tokens,
    extract(epoch FROM {CLOCK} - t.created_at)::float8 AS seconds,
    (SELECT p.request_id FROM job_payloads p WHERE p.job_id = t.id) AS request_id,
    (SELECT p.traceparent FROM job_payloads p WHERE p.job_id = t.id) AS traceparent
FROM {jobs} t"""


def _returned(pick: str, *, sets: str = "", also: str = "") -> str:
    """Requeue or end the running jobs that `pick` has locked.

    The columns of `pick` are the jobs' new values (id, next_status, which is queued or terminal, lane, num_failures,
    num_suspicions, delay_seconds, error) and how the attempt ended (owner, outcome). `sets` are further assignments,
    `also` is an additional CTE that may refer to `returned`.
    """
    return f"""
WITH pick AS MATERIALIZED ({pick}),
returned AS (
    UPDATE jobs j SET status = pick.next_status, lane = pick.lane, num_failures = pick.num_failures,
        num_suspicions = pick.num_suspicions, error = pick.error, lease_owner = NULL, lease_expires_at = NULL,
        finished_at = CASE WHEN pick.next_status <> 'queued' THEN {CLOCK} END,
        prune_at = CASE WHEN pick.next_status <> 'queued'
            THEN {CLOCK} + make_interval(secs => j.result_ttl_seconds) END,
        available_at = CASE WHEN pick.delay_seconds > 0  -- else it keeps its place in the queue
            THEN {CLOCK} + make_interval(secs => pick.delay_seconds) ELSE j.available_at END,
        {sets} dispatch_at = {CLOCK}, num_dispatches = 0
    FROM pick WHERE j.id = pick.id
    RETURNING j.id, j.model, j.tenant_id, j.status, j.attempt, j.committed_sequence_number, {CORRECTION} AS charge,
        j.num_committed_tokens, j.created_at,
        pick.owner, {BEGAN}, pick.outcome, j.error->>'code' AS error_code,
        j.num_committed_tokens - j.num_tokens_at_claim AS num_tokens, {IS_TOLD}, {EXCESS_TOKENS} AS excess_tokens,
        {RECORDED_COLUMNS}
),
{NOTED.format(over="returned")},
{attempts_recorded("returned", is_end="o.status <> 'queued'")},{also}
moved AS (
    SELECT id, tenant_id, CASE WHEN status = 'queued' THEN 1 ELSE 0 END AS queued,
        CASE WHEN status = 'queued' THEN cost ELSE 0 END AS queued_tokens, {STOPS} FROM returned
),
{COUNTED}
{told("returned", has_chunks="committed_sequence_number > 0")}"""


def _charged(is_poison: str) -> str:
    """The columns of a job to which a failure is charged. After a first failure, and after any attempt with output, the
    next attempt may begin immediately; a job that fails again without output waits for up to 2, 4, then 8 s."""
    return f"""j.num_failures + 1 AS num_failures,
        CASE WHEN j.num_failures = 0 OR j.num_committed_tokens > j.num_tokens_at_claim THEN 0
            ELSE power(2, least(j.num_failures, 3)) * (0.5 + 0.5 * random()) END AS delay_seconds,
        CASE WHEN j.cancel_requested_at IS NOT NULL THEN 'cancelled' WHEN j.deadline_at <= {CLOCK} THEN 'expired'
            WHEN {is_poison} OR j.num_failures + 1 > j.max_failures THEN 'failed' ELSE 'queued' END AS next_status,
        CASE WHEN j.cancel_requested_at IS NOT NULL THEN NULL
            WHEN j.deadline_at <= {CLOCK} THEN {LATE_ERROR}
            WHEN {is_poison} THEN CAST(:poison_error AS json)
            WHEN j.num_failures + 1 > j.max_failures THEN CAST(:lost_error AS json) END AS error"""


def _ours(delay_seconds: str) -> str:
    return f"""
    SELECT j.id, j.lease_owner AS owner, 'released' AS outcome, j.lane, j.num_failures, j.num_suspicions,
        {delay_seconds} AS delay_seconds, NULL::json AS error,
        CASE WHEN j.cancel_requested_at IS NOT NULL THEN 'cancelled' ELSE 'queued' END AS next_status
    FROM jobs j WHERE j.id = ANY(CAST(:ids AS uuid[])) AND j.status = 'in_progress' AND j.lease_owner = :owner
    ORDER BY j.id FOR NO KEY UPDATE"""


RELEASE = text(_returned(_ours("0")))

PUT_OFF = text(_returned(_ours("CAST(:seconds AS float)")))

PAUSE = text(_returned(_ours("0"), sets=f"paused_at = {CLOCK},"))

REPORT_CRASH = text(
    _returned(
        f"""
    SELECT j.id, j.lease_owner AS owner, 'crashed' AS outcome,
        CASE WHEN j.num_suspicions + crash.weight >= 2 THEN 'isolated' ELSE j.lane END AS lane,
        j.num_suspicions + crash.weight AS num_suspicions, {_charged("(j.lane = 'isolated' AND crash.weight > 0)")}
    FROM unnest(CAST(:ids AS uuid[]), CAST(:weights AS int[])) AS crash(id, weight) JOIN jobs j USING (id)
    WHERE {RUNNING} AND j.lease_owner = :owner ORDER BY j.id FOR NO KEY UPDATE OF j""",
        also=f"""
poisoned AS (  -- the same request will be refused for a day
    INSERT INTO poison_requests (tenant_id, fingerprint, job_id, created_at)
    SELECT DISTINCT ON (r.tenant_id, p.fingerprint) r.tenant_id, p.fingerprint, r.id, {CLOCK}
    FROM returned r JOIN job_payloads p ON p.job_id = r.id
    WHERE r.error_code = 'poison_job' AND p.fingerprint IS NOT NULL
    ON CONFLICT (tenant_id, fingerprint) DO UPDATE SET job_id = excluded.job_id, created_at = excluded.created_at
),""",
    )
)

# The lease is checked on the locked row, not on the one in the snapshot, so that a renewal in between wins.
RESCUE = text(
    _returned(f"""
    SELECT j.id, j.lease_owner AS owner, 'lost' AS outcome, j.lane, j.num_suspicions, {_charged("false")} FROM jobs j
    WHERE j.status = 'in_progress'
        AND j.lease_expires_at < CAST(:as_of AS timestamptz) - make_interval(secs => :grace_seconds)
        AND CAST(:as_of AS timestamptz) - pg_postmaster_start_time() > make_interval(secs => :quiet_seconds)
    ORDER BY j.id LIMIT :limit FOR NO KEY UPDATE SKIP LOCKED""")
)

# The lease is being renewed, but no tokens arrive. A job that has had no token in this attempt may still be in prefill
# or waiting for its turn in the engine, so it gets ten times as long.
STALL = text(
    _returned(f"""
    SELECT j.id, j.lease_owner AS owner, 'stalled' AS outcome, j.lane, j.num_suspicions, {_charged("false")}
    FROM jobs j WHERE j.status = 'in_progress' AND j.lease_expires_at >= CAST(:as_of AS timestamptz)
        AND j.progressed_at < CAST(:as_of AS timestamptz) - make_interval(secs => :stall_seconds
            * CASE WHEN j.num_committed_tokens > j.num_tokens_at_claim THEN 1 ELSE 10 END)
    ORDER BY j.id LIMIT :limit FOR NO KEY UPDATE SKIP LOCKED""")
)

CANCEL = text(f"""
WITH pick AS MATERIALIZED (
    SELECT j.id FROM jobs j WHERE j.id = ANY(CAST(:ids AS uuid[])) AND j.status = ANY(CAST(:statuses AS text[]))
        AND (CAST(:tenant_id AS uuid) IS NULL OR j.tenant_id = :tenant_id) ORDER BY j.id FOR NO KEY UPDATE
),
asked AS (
    UPDATE jobs j SET cancel_requested_at = coalesce(j.cancel_requested_at, {CLOCK}),
        status = CASE WHEN j.status = 'queued' THEN 'cancelled' ELSE j.status END,
        finished_at = CASE WHEN j.status = 'queued' THEN {CLOCK} END,
        prune_at = CASE WHEN j.status = 'queued' THEN {CLOCK} + make_interval(secs => j.result_ttl_seconds) END
    FROM pick WHERE j.id = pick.id
    RETURNING j.id, j.model, j.tenant_id, j.status, j.attempt, j.committed_sequence_number, j.num_committed_tokens,
        j.created_at, {IS_TOLD},
        {RECORDED_COLUMNS}
),
{ends_recorded("asked", outcome="o.status", condition="o.status = 'cancelled'")},
moved AS (SELECT id, tenant_id, {LEAVES_QUEUE} FROM asked WHERE status = 'cancelled'),
{COUNTED}
{told("asked", has_chunks="status = 'cancelled' AND committed_sequence_number > 0")}
""")

# Of a job that follows another one, which has been started, the output is being made. If that one ends without it or is
# deleted, the job gets another start_deadline_at when it is let go (storage/answers.py).
_IS_STARTED = """(j.attempt > 0 OR EXISTS (SELECT FROM job_followers f LEFT JOIN jobs l ON l.id = f.leader_id
            WHERE f.job_id = j.id AND (l.id IS NULL OR l.attempt > 0)))"""

EXPIRE = text(f"""
WITH pick AS MATERIALIZED (
    SELECT j.id FROM jobs j WHERE j.status = 'queued' AND least(j.deadline_at, j.start_deadline_at) <= {CLOCK}
        AND (j.deadline_at <= {CLOCK} OR NOT {_IS_STARTED}) LIMIT :limit FOR NO KEY UPDATE SKIP LOCKED
),
expired AS (
    UPDATE jobs j SET status = 'expired', finished_at = {CLOCK},
        error = CASE WHEN j.deadline_at <= {CLOCK} THEN {LATE_ERROR} ELSE CAST(:start_timeout_error AS json) END,
        prune_at = {CLOCK} + make_interval(secs => j.result_ttl_seconds)
    FROM pick WHERE j.id = pick.id
    RETURNING j.id, j.model, j.tenant_id, j.status, j.attempt, j.committed_sequence_number, j.num_committed_tokens,
        j.created_at, {IS_TOLD},
        {RECORDED_COLUMNS}
),
{ends_recorded("expired", outcome="o.status", condition="true")},
moved AS (SELECT id, tenant_id, {LEAVES_QUEUE} FROM expired),
{COUNTED}
{told("expired", has_chunks="committed_sequence_number > 0")}
""")

_DUE = f"SELECT id FROM jobs WHERE prune_at <= {CLOCK} ORDER BY prune_at LIMIT :limit"


def _due_retained(locking: str) -> str:
    """Jobs of tenants with a retention, whatever their own `prune_at`. Ids begin with the time of acceptance, so that
    only jobs old enough are read. Lines whose batch has not written their results yet, and turns that are not part of
    their conversation yet, stay until then."""
    return f"""
    SELECT old.id FROM tenants t CROSS JOIN LATERAL (
        SELECT j.id FROM jobs j
        WHERE j.tenant_id = t.id AND j.finished_at <= {CLOCK} - make_interval(secs => t.retention_seconds)
            AND j.id < (lpad(to_hex((1000 * (extract(epoch FROM {CLOCK}) - t.retention_seconds))::bigint), 12, '0')
                || repeat('0', 20))::uuid
            AND NOT EXISTS (SELECT FROM batch_lines l WHERE l.job_id = j.id)
            AND NOT EXISTS (SELECT FROM conversation_turns c WHERE c.job_id = j.id)
        ORDER BY j.id LIMIT :limit {locking}
    ) old WHERE t.retention_seconds < {MAX_RETENTION_SECONDS}"""


PRUNE = text(f"DELETE FROM jobs WHERE finished_at IS NOT NULL AND id IN ({_DUE} FOR UPDATE SKIP LOCKED)")

PRUNE_RETAINED = text(
    f"DELETE FROM jobs WHERE finished_at IS NOT NULL AND id IN ({_due_retained('FOR UPDATE OF j SKIP LOCKED')})"
)

DUE, DUE_RETAINED = text(_DUE), text(_due_retained(""))

# Of jobs that were due a moment ago, those that still are.
DELETE_DUE = text(f"""
DELETE FROM jobs j WHERE j.finished_at IS NOT NULL AND j.id = ANY(CAST(:ids AS uuid[])) AND (j.prune_at <= {CLOCK}
    OR EXISTS (SELECT FROM tenants t WHERE t.id = j.tenant_id AND t.retention_seconds < {MAX_RETENTION_SECONDS}
            AND j.finished_at <= {CLOCK} - make_interval(secs => t.retention_seconds))
        AND NOT EXISTS (SELECT FROM batch_lines l WHERE l.job_id = j.id)
        AND NOT EXISTS (SELECT FROM conversation_turns c WHERE c.job_id = j.id))
""")

FORGET_POISON = text(f"DELETE FROM poison_requests WHERE created_at < {CLOCK} - interval '1 day'")

DELETE = text(f"""
WITH deleted AS (
    DELETE FROM jobs j WHERE j.id = :id AND j.tenant_id = :tenant_id
    RETURNING j.id, j.tenant_id, j.attempt, j.status, {CORRECTION} AS charge, {EXCESS_TOKENS} AS excess_tokens,
        'deleted' AS outcome,
        j.num_committed_tokens - j.num_tokens_at_claim AS num_tokens,
        {RECORDED_COLUMNS}
),
running AS (SELECT * FROM deleted WHERE status = 'in_progress'),
{attempts_recorded("running", is_end="true")},
{ends_recorded("deleted", outcome="o.outcome", condition="o.status = 'queued'").replace("recorded AS", "dropped AS")},
moved AS (
    SELECT id, tenant_id, 0 AS queued, 0 AS queued_tokens, {STOPS} FROM running
    UNION ALL
    SELECT id, tenant_id, queued, queued_tokens, running, charge, unused_tokens, excess_tokens
    FROM (SELECT id, tenant_id, {LEAVES_QUEUE} FROM deleted WHERE status = 'queued') d
),
{COUNTED}
SELECT id FROM deleted
""")


def is_gone(model: str, revision: str) -> str:
    """Whether no worker serves the revision any more, but another one."""
    live = f"w.model = {model} AND w.seen_at > {CLOCK} - make_interval(secs => :live_seconds)"
    return f"""
    EXISTS (SELECT FROM workers w WHERE {live} AND w.state = 'ready' AND w.model_revision <> {revision})
    AND NOT EXISTS (SELECT FROM workers w WHERE {live} AND coalesce(w.model_revision, {revision}) = {revision})"""


# Written as in jobs_begun_idx: output comes from an earlier attempt, or from the job that this one repeats.
MAY_HAVE_BEGUN = "(j.attempt > 0 OR j.retry_of IS NOT NULL)"

GONE_REVISIONS = text(f"""
WITH begun AS MATERIALIZED (
    SELECT j.model, j.model_revision, count(*) AS num_jobs FROM jobs j
    WHERE j.status = 'queued' AND {MAY_HAVE_BEGUN} AND {BEGUN} GROUP BY j.model, j.model_revision
)
SELECT b.model, b.model_revision, b.num_jobs FROM begun b WHERE {is_gone("b.model", "b.model_revision")}
""")

PICK = f"""
pick AS MATERIALIZED (
    SELECT j.id, j.num_committed_tokens AS num_tokens FROM jobs j
    WHERE j.status = 'queued' AND j.model = :model AND j.model_revision = :model_revision
        AND {MAY_HAVE_BEGUN} AND {BEGUN}
        AND {is_gone("j.model", "j.model_revision")}
    ORDER BY j.id LIMIT :limit FOR NO KEY UPDATE OF j SKIP LOCKED
)"""


# No attempt is running, so none has to be fenced off; the next claim increments the attempt as usual. The chunks are
# deleted, and the reset gets the sequence number after the last of them.
def _restart(pick: str) -> str:
    return f"""
WITH {pick},
discarded AS (
    DELETE FROM job_chunks c USING pick WHERE c.job_id = pick.id
    RETURNING c.job_id, CASE WHEN c.attempt > 0  -- else it is recorded for the job that it was taken over from
        THEN json_array_length(coalesce(c.chunk->'token_ids', '[]')) ELSE 0 END AS num_tokens
),
restarted AS (
    UPDATE jobs j SET committed_sequence_number = j.committed_sequence_number + 1,
        reset_sequence_number = j.committed_sequence_number + 1, num_committed_tokens = 0, num_tokens_at_claim = 0,
        first_token_at = NULL, dispatch_at = {CLOCK}, num_dispatches = 0
    FROM pick WHERE j.id = pick.id
    RETURNING j.id, j.tenant_id, j.attempt, j.committed_sequence_number, pick.num_tokens,
        (SELECT sum(d.num_tokens) FROM discarded d WHERE d.job_id = j.id) AS num_discarded,
        {RECORDED_COLUMNS}
),
{discarded_recorded("restarted")},
written AS (
    INSERT INTO job_chunks (job_id, sequence_number, attempt, chunk)
    SELECT id, committed_sequence_number, attempt,
        json_build_object('sequence_number', committed_sequence_number, 'is_reset', true)
    FROM restarted
),
moved AS (  -- the tenant is not charged for what is discarded
    SELECT id, tenant_id, 0 AS queued, 0 AS running, CASE WHEN attempt > 0 THEN -num_tokens ELSE 0 END AS charge,
        0 AS queued_tokens, 0 AS unused_tokens, 0 AS excess_tokens FROM restarted
),
{COUNTED}
SELECT r.id, r.attempt, r.num_tokens, (SELECT p.request_id FROM job_payloads p WHERE p.job_id = r.id) AS request_id,
    (SELECT p.traceparent FROM job_payloads p WHERE p.job_id = r.id) AS traceparent
FROM restarted r
"""


RESTART = text(_restart(PICK))

START_OVER = text(
    _restart(f"""
pick AS MATERIALIZED (
    SELECT j.id, j.num_committed_tokens AS num_tokens FROM jobs j
    WHERE j.id = ANY(CAST(:ids AS uuid[])) AND j.status = 'queued' AND {BEGUN}
    ORDER BY j.id FOR NO KEY UPDATE OF j
)""")
)

FAIL_GONE = text(f"""
WITH {PICK},
failed AS (
    UPDATE jobs j SET status = 'failed', error = CAST(:revision_error AS json), finished_at = {CLOCK},
        prune_at = {CLOCK} + make_interval(secs => j.result_ttl_seconds)
    FROM pick WHERE j.id = pick.id
    RETURNING j.id, j.model, j.tenant_id, j.status, j.attempt, j.num_committed_tokens, j.created_at,
        {IS_TOLD},
        {RECORDED_COLUMNS}
),
{ends_recorded("failed", outcome="o.status", condition="true")},
moved AS (SELECT id, tenant_id, {LEAVES_QUEUE} FROM failed),
{COUNTED}
{told("failed", has_chunks="true")}
""")


def _stored_error(error: type[CeleriacError], message: str) -> str:
    return JobError(code=error.code, message=message, retryable=error.retryable).model_dump_json()


#: Errors of jobs that failed or expired without their worker.
ERRORS = {
    "deadline_error": _stored_error(DeadlineExceeded, "the deadline passed before the job was finished"),
    "start_timeout_error": _stored_error(StartTimeoutExceeded, "it was not started within its start_timeout"),
    "run_timeout_error": _stored_error(RunTimeoutExceeded, "it ran for longer than its run_timeout"),
    "poison_error": _stored_error(PoisonJob, "the engine crashed while it was running this job alone"),
    "lost_error": _stored_error(WorkerLost, "the worker was lost or crashed more often than max_failures allows"),
    "revision_error": _stored_error(
        ModelRevisionGone,
        "it started under a model revision that is no longer served; retry it to start over",
    ),
}
