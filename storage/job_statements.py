"""The SQL of the job protocol: the statements that let jobs in, claim and commit.

`storage/jobs.py` executes them. Those that end or requeue jobs are in `storage/job_ends.py`.

Each transition is one statement under READ COMMITTED. It names the status that a job must have and checks it on the
locked row, so a row that has changed in the meantime is left alone. Shared rules:

- `pick` locks the rows that qualify, in order of id or skipping locked ones. The rest of the statement touches only
  these rows.
- A statement that moves jobs has a CTE `moved(id, tenant_id, queued, running, charge, queued_tokens, unused_tokens,
  excess_tokens)` with the changes to the tenants' counters, and ends in COUNTED, which applies them. Job rows are
  locked first, then tenant_load in the order of tenant_id (accept has no existing job rows to lock), so that statements
  cannot deadlock.
- Fairness charges a job's whole `cost` while it runs, and the tokens actually used once it has ended or waits again.
  The order of claims overlooks most of what a running job has been charged and not taken (FAIR_TIME).
- Statements use `statement_timestamp()`, not `now()`, so that a lease does not get shorter if its transaction was open
  for a while.
- The planner must not compare each of n ids with each of m rows, which it does when stale statistics claim that there
  are hardly any. Therefore unnest() is MATERIALIZED; locked rows are looked up only by id, and RETURNING passes on
  whatever the next step needs; and a status next to a join is written such that no partial index matches (RUNNING).

Chunks and endings are passed in as arrays, one per column: `unnest` makes rows of them again. New jobs, which have many
columns, come as one JSON document, whose making costs the client less than that of forty arrays.
"""

# ruff: noqa: S608  (only constants of this module are inserted into the text; values are bound)

from typing import Any

import psycopg
from psycopg.types.array import ListBinaryDumper
from sqlalchemy import text

from domain.jobs import MIN_PRIORITY

CLOCK = "statement_timestamp()"

RUNNING = "j.status || '' = 'in_progress'"

# The order of one tenant's queue, in seconds: by arrival, where each step of priority counts as ten minutes earlier.
# Must be written exactly as in jobs_ready_idx. It does not change with time, so waiting jobs advance without being
# updated, and none waits forever behind a stream of more urgent jobs.
AGEING_SECONDS = 600

RANK = f"(extract(epoch FROM j.available_at AT TIME ZONE 'UTC') - {AGEING_SECONDS} * j.priority)"

# Where a job stands before any fairness: 0, or -1 for a batch line until it has risen to the priority 0 by waiting.
STANDING = f"""CASE WHEN j.priority >= {MIN_PRIORITY} OR {RANK} <= extract(epoch FROM {CLOCK}) THEN 0 ELSE -1 END"""

# How far a step of priority puts a job before those of other tenants, within the maximum that its tenant was given, and
# that of the key it was sent with, which may be less. The job is charged like any other, so its tenant pays the lead
# back: in the long run, everybody receives by weight.
LEAD_TOKENS = 1000

# How far a tenant may have received more than the others and still owe it to them after it was idle; and how far less,
# and still be owed it after it waited in vain, as for a model without workers.
MAX_DEBT_TOKENS = 10_000


def lead(job: str, tenant: str) -> str:
    """The lead of a job in tokens. Its key is looked up only where there may be one; a key that was deleted gives
    none."""
    return f"""{LEAD_TOKENS} * CASE WHEN {job}.priority > 0 AND {tenant}.max_priority > 0
            THEN least({job}.priority, {tenant}.max_priority, CASE WHEN {job}.key_id IS NOT NULL THEN
                coalesce((SELECT coalesce(k.max_priority, {tenant}.max_priority) FROM api_keys k
                    WHERE k.id = {job}.key_id), 0) END) ELSE 0 END"""


# A job comes no later than those of its tenant that RANK puts after it, whatever lead their priority gives them.
# Written backwards, since PostgreSQL computes a frame that begins at the current row anew for each row.
LIFTED = """min(fair_time) OVER (PARTITION BY {of} ORDER BY rank DESC, id DESC ROWS UNBOUNDED PRECEDING)"""

PROVEN_TOKENS = 16  # after this many tokens in one attempt, a job is no longer suspected of crashing engines

COUNTED = """
change AS (
    SELECT tenant_id, sum(queued) AS queued, sum(running) AS running, sum(charge) AS charge,
        sum(queued_tokens) AS queued_tokens, sum(unused_tokens) AS unused_tokens, sum(excess_tokens) AS excess_tokens
    FROM moved GROUP BY tenant_id
),
locked AS MATERIALIZED (
    SELECT l.tenant_id FROM change JOIN tenant_load l USING (tenant_id) ORDER BY l.tenant_id FOR NO KEY UPDATE OF l
),
counted AS (
    UPDATE tenant_load l SET num_queued = l.num_queued + change.queued, num_running = l.num_running + change.running,
        virtual_time = l.virtual_time + change.charge / t.weight,
        num_queued_tokens = l.num_queued_tokens + change.queued_tokens,
        num_unused_tokens = l.num_unused_tokens + change.unused_tokens,
        num_excess_tokens = l.num_excess_tokens + change.excess_tokens
    FROM locked JOIN change USING (tenant_id) JOIN tenants t ON t.id = locked.tenant_id
    WHERE l.tenant_id = locked.tenant_id
)"""

# What the end of an attempt adds to its tenant's virtual time: the tokens that the job has taken, minus its cost.
CORRECTION = "(j.num_prompt_tokens + j.num_committed_tokens - j.cost)"

# What the claim of a queued job adds to it: whatever part of its cost has not been charged for earlier attempts.
CHARGE = "(j.cost - CASE WHEN j.attempt > 0 THEN j.num_prompt_tokens + j.num_committed_tokens ELSE 0 END)"

# How many slots a job takes: its cost is the prompt and what each of its sequences may generate.
NUM_SEQUENCES = "greatest(1, (j.cost - j.num_prompt_tokens) / greatest(1, j.max_tokens))"

# What a running job was charged and has not taken yet.
UNUSED_TOKENS = "(j.cost - j.num_prompt_tokens - j.num_committed_tokens)"

# A running job counts for what it has taken and this many tokens more of each of its sequences. With its whole cost,
# which is charged in advance, a tenant of long jobs would be behind all others by one of them, and so would one whose
# jobs may take far more than they do. A job counts more with each token that it takes, so nothing is had for free.
COUNTED_AHEAD = 256

# What a running job was charged beyond that.
EXCESS_TOKENS = f"greatest(0, {UNUSED_TOKENS} - {COUNTED_AHEAD} * {NUM_SEQUENCES})"

# In `moved`, of a job that leaves the queue, and of one whose attempt ends.
LEAVES_QUEUE = """-1 AS queued, 0 AS running, 0 AS charge,
        -cost AS queued_tokens, 0 AS unused_tokens, 0 AS excess_tokens"""
STOPS = "-1 AS running, charge, charge AS unused_tokens, -excess_tokens AS excess_tokens"

# Whether the sums in tenant_load are those of a moment ago (storage/running_sums.py). Otherwise whatever runs is read.
# A correction that is to come was made before the clock was set back, nobody knows how long ago.
ARE_KEPT = f"""(SELECT count(*) > 0 FROM running_sums
        WHERE corrected_at BETWEEN {CLOCK} - interval '5 seconds' AND {CLOCK} + interval '1 second')"""

UNUSED = f"""
unused AS (  -- what running jobs were charged and have not taken yet
    SELECT tenant_id, num_unused_tokens AS num_tokens FROM tenant_load WHERE num_running > 0 AND {ARE_KEPT}
    UNION ALL
    SELECT j.tenant_id, sum({UNUSED_TOKENS}) FROM jobs j
    WHERE j.status = 'in_progress' AND NOT {ARE_KEPT} GROUP BY j.tenant_id
)"""

EXCESS = f"""
excess AS MATERIALIZED (  -- what running jobs were charged beyond what they count for
    SELECT tenant_id, num_excess_tokens AS num_tokens FROM tenant_load WHERE num_running > 0 AND {ARE_KEPT}
    UNION ALL
    SELECT j.tenant_id, sum({EXCESS_TOKENS}) FROM jobs j
    WHERE j.status = 'in_progress' AND {UNUSED_TOKENS} > {COUNTED_AHEAD} AND NOT {ARE_KEPT} GROUP BY j.tenant_id
)"""

# Where a tenant stands in the order of claims.
FAIR_TIME = "(l.virtual_time - coalesce(e.num_tokens, 0) / t.weight)"

NEW = """
new AS MATERIALIZED (
    SELECT * FROM json_to_recordset(CAST(:jobs AS json)) AS n(place int, id uuid, tenant_id uuid, model text,
        adapter text, model_revision text, priority smallint, idempotency_key text, request_hash bytea,
        max_failures int, start_timeout float8, deadline_at timestamptz, run_timeout_seconds float8,
        num_prompt_tokens int, max_tokens int, seed bigint, cost int, metadata text, result_ttl_seconds int,
        request text, prompt_token_ids text, webhook_url text, webhook_statuses text, endpoint text, is_stored boolean,
        fingerprint bytea, lane text, retry_of uuid, endpoint_body text, kind text, input_lengths text, request_id text,
        callback text, key_id text, eta text, traceparent text, call_size int, leader_id uuid)
)"""


def room(locking: str) -> str:
    """The CTE `load`: how many more jobs of each tenant in `new` may wait, and which tenants' jobs run isolated.
    Tenants whose queues are full are left out before any lock: a refusal waits neither for one nor for the disk."""
    return f"""
load AS MATERIALIZED (
    SELECT l.tenant_id, bound, bound - l.num_queued AS room,
        (SELECT count(*) FROM poison_requests p WHERE p.tenant_id = l.tenant_id
            AND p.created_at > {CLOCK} - interval '1 hour') > :max_poison_jobs_per_hour AS is_quarantined
    FROM tenant_load l JOIN tenants t ON t.id = l.tenant_id, coalesce(t.max_queued, :max_queued_jobs) AS bound
    WHERE l.tenant_id IN (SELECT tenant_id FROM new) AND l.num_queued < bound ORDER BY l.tenant_id {locking}
)"""


FRESH = f"""
fresh AS (
    SELECT new.*, row_number() OVER (PARTITION BY tenant_id ORDER BY place) AS place_in_tenant FROM new
    WHERE NOT EXISTS (SELECT FROM jobs j WHERE j.id = new.id)
      AND NOT EXISTS (SELECT FROM jobs j WHERE j.tenant_id = new.tenant_id AND j.idempotency_key = new.idempotency_key)
      AND (new.lane = 'isolated' OR NOT EXISTS (SELECT FROM poison_requests p WHERE p.tenant_id = new.tenant_id
          AND p.fingerprint = new.fingerprint AND p.created_at > {CLOCK} - interval '1 day'))
)"""

HAS_ROOM = "place_in_tenant <= room AND call_size <= bound"  # of a call that can never fit, no part is accepted

NEW_COLUMNS = """id, tenant_id, model, adapter, lane, retry_of, priority, idempotency_key,
        request_hash, max_failures, start_deadline_at, deadline_at, asked_deadline_at, run_timeout_seconds,
        num_prompt_tokens, max_tokens, seed, cost, metadata, result_ttl_seconds,
        webhook_url, webhook_statuses, endpoint, is_stored, kind, key_id,
        eta, available_at, dispatch_at, created_at"""

NEW_VALUES = f"""f.id, f.tenant_id, f.model, f.adapter, CASE WHEN is_quarantined THEN 'isolated' ELSE f.lane END,
        f.retry_of, f.priority, f.idempotency_key, f.request_hash, f.max_failures,
        {CLOCK} + make_interval(secs => start_timeout), f.deadline_at, f.deadline_at, f.run_timeout_seconds,
        f.num_prompt_tokens, f.max_tokens, f.seed, f.cost, f.metadata::json, f.result_ttl_seconds,
        f.webhook_url, f.webhook_statuses::text[], f.endpoint, f.is_stored,
        f.kind, f.key_id, f.eta::real[],
        {CLOCK}, {CLOCK}, {CLOCK}"""

PAYLOAD = """
payload AS (
    INSERT INTO job_payloads (job_id, request, prompt_token_ids, input_lengths, fingerprint, endpoint_body, request_id,
        traceparent, callback)
    SELECT id, request::json, prompt_token_ids::int[], input_lengths::int[], fingerprint, endpoint_body::json,
        new.request_id, new.traceparent, callback::json
    FROM (SELECT id FROM inserted) i JOIN new USING (id)
)"""

# In the order in which statements that move jobs lock them.
LOCK_LOADS = text("""
SELECT FROM tenant_load WHERE tenant_id = ANY(CAST(:tenant_ids AS uuid[])) ORDER BY tenant_id FOR NO KEY UPDATE
""")

ACCEPT = text(f"""
WITH {NEW},
{room("FOR NO KEY UPDATE OF l")},
{FRESH},
inserted AS (
    INSERT INTO jobs ({NEW_COLUMNS}, model_revision)
    SELECT {NEW_VALUES}, f.model_revision FROM fresh f JOIN load USING (tenant_id) WHERE {HAS_ROOM}
    ORDER BY place
    ON CONFLICT DO NOTHING RETURNING id, tenant_id, cost
),
{PAYLOAD},
{UNUSED},
level AS (  -- what those who run jobs have received; if nobody does, those who wait
    SELECT min(a.virtual_time - coalesce(r.num_tokens, 0) / t.weight) FILTER (WHERE a.num_running > 0) AS running,
        max(a.virtual_time) AS waiting
    FROM tenant_load a JOIN tenants t ON t.id = a.tenant_id LEFT JOIN unused r USING (tenant_id)
    WHERE a.num_queued + a.num_running > 0
),
counted AS (  -- a tenant that was idle starts level with the active ones, without credit and with little debt
    UPDATE tenant_load l SET num_queued = l.num_queued + change.queued,
        num_queued_tokens = l.num_queued_tokens + change.queued_tokens,
        virtual_time = (SELECT CASE WHEN l.num_queued + l.num_running > 0  -- greatest and least pass over a NULL
            THEN greatest(l.virtual_time, level.running - {MAX_DEBT_TOKENS} / t.weight)
            ELSE least(greatest(l.virtual_time, coalesce(level.running, level.waiting)),
                coalesce(level.running, level.waiting) + {MAX_DEBT_TOKENS} / t.weight) END FROM level)
    FROM (SELECT tenant_id, count(*) AS queued, sum(cost) AS queued_tokens FROM inserted GROUP BY tenant_id) change
        JOIN tenants t ON t.id = change.tenant_id
    WHERE l.tenant_id = change.tenant_id RETURNING l.tenant_id, l.num_queued
)
SELECT id, {CLOCK} AS created_at, counted.num_queued FROM inserted JOIN counted USING (tenant_id)
""")

# A second statement, because only its snapshot includes the row with which our insert conflicted.
EXISTING = text("""
SELECT n.place, j.id, j.tenant_id = n.tenant_id AND j.request_hash = n.request_hash AS is_same
FROM unnest(CAST(:ids AS uuid[]), CAST(:tenant_ids AS uuid[]), CAST(:idempotency_keys AS text[]),
            CAST(:request_hashes AS bytea[])) WITH ORDINALITY AS n(id, tenant_id, idempotency_key, request_hash, place)
JOIN jobs j ON j.id = n.id OR (j.tenant_id = n.tenant_id AND j.idempotency_key = n.idempotency_key)
""")

# Like EXISTING, run after the insert: tells jobs that were refused as poison from those that did not have room.
POISONED = text(f"""
SELECT n.place FROM unnest(CAST(:tenant_ids AS uuid[]), CAST(:fingerprints AS bytea[]), CAST(:lanes AS text[]))
    WITH ORDINALITY AS n(tenant_id, fingerprint, lane, place)
JOIN poison_requests p USING (tenant_id, fingerprint)
WHERE n.lane <> 'isolated' AND p.created_at > {CLOCK} - interval '1 day'
""")

# Copies the output of an ended job to the newly accepted job that continues it. Excludes the final chunk, which may
# contain text that had been held back and was flushed only because the job ended.
INHERIT = text("""
WITH old AS (
    SELECT j.id FROM jobs j JOIN jobs n ON n.id = :id AND n.retry_of = j.id AND n.tenant_id = j.tenant_id
        AND n.model_revision = j.model_revision AND n.status = 'queued' AND n.attempt = 0
),
kept AS MATERIALIZED (
    SELECT c.sequence_number, c.chunk FROM job_chunks c WHERE c.job_id = (SELECT id FROM old)
        AND c.sequence_number < coalesce((SELECT min(x.sequence_number) FROM job_chunks x WHERE x.job_id = c.job_id
            AND x.chunk::text ~ '"finish_reason":"(cancelled|deadline)"'), 2147483647)  -- ->> chokes on U+0000
),
written AS (
    INSERT INTO job_chunks (job_id, sequence_number, attempt, chunk)
    SELECT :id, sequence_number, 0, chunk FROM kept
)
UPDATE jobs SET committed_sequence_number = total.last, num_committed_tokens = total.num_tokens,
    reset_sequence_number = (SELECT o.reset_sequence_number FROM jobs o WHERE o.id = (SELECT id FROM old))
FROM (SELECT max(sequence_number) AS last, sum(json_array_length(coalesce(chunk->'token_ids', '[]'))) AS num_tokens
      FROM kept) total
WHERE jobs.id = :id AND jobs.attempt = 0 AND total.last IS NOT NULL
RETURNING committed_sequence_number
""")

# The first claim narrowed the deadline to the end of the run timeout.
HAS_RUN_OUT = "j.deadline_at = j.started_at + make_interval(secs => j.run_timeout_seconds)"

# The job has output, so it must continue under the revision that generated it.
BEGUN = "(j.committed_sequence_number > j.reset_sequence_number)"

RUNNABLE = f"""
    j.status = 'queued' AND j.available_at <= {CLOCK} AND (j.deadline_at IS NULL OR j.deadline_at > {CLOCK})
    AND (j.attempt > 0 OR j.start_deadline_at IS NULL OR j.start_deadline_at > {CLOCK})"""

CLAIMABLE = f"""{RUNNABLE} AND j.lane = :lane AND j.cancel_requested_at IS NULL
    AND (NOT {BEGUN} OR j.model_revision = :model_revision)
    AND (j.priority >= {MIN_PRIORITY} OR j.num_dispatches > 0 OR j.lane = 'isolated')  -- a line once it is let in
    AND j.num_suspicions >= :min_suspicions AND {STANDING} >= :min_standing"""

IS_HELD = f"j.lane = 'standard' AND j.priority < {MIN_PRIORITY} AND j.num_dispatches = 0"  # as in jobs_held_idx

HELD_LINE = f"{RUNNABLE} AND {IS_HELD}"


def ranked(condition: str) -> str:
    """The CTE `ranked(id, place)`: the jobs of a model that meet `condition`, in the order in which they should run.

    The tenant that has received least per weight comes first, and each of its jobs counts before its next one; of equal
    tenants, the one that runs fewer jobs. Within a tenant, the order is RANK. The number of rows read depends on how
    many are wanted, not on how many wait: the tenants come from `tenant_load` in their order, and the lateral joins
    read the heads of their queues from jobs_ready_idx.
    """
    due = f"j.model = :model AND j.tenant_id = l.tenant_id AND {condition}"
    return f"""
    {EXCESS},
    waiting AS MATERIALIZED (
        SELECT l.* FROM (
            SELECT l.tenant_id, {FAIR_TIME} AS virtual_time, l.num_running, t.weight, t.max_priority,
                {FAIR_TIME} - {LEAD_TOKENS} * t.max_priority / t.weight AS earliest
            FROM tenant_load l JOIN tenants t ON t.id = l.tenant_id LEFT JOIN excess e ON e.tenant_id = l.tenant_id
            WHERE l.num_queued > 0 ORDER BY earliest, l.num_running, l.tenant_id
        ) l
        CROSS JOIN LATERAL (SELECT FROM jobs j WHERE {due} ORDER BY {RANK}, j.id LIMIT 1) first
        ORDER BY l.earliest, l.num_running, l.tenant_id LIMIT :num_tenants
    ),
    timed AS (
        SELECT l.tenant_id, j.id, j.rank, l.num_running, l.virtual_time + (sum(j.cost) OVER (
            PARTITION BY l.tenant_id ORDER BY j.rank, j.id) - j.cost - {lead("j", "l")}) / l.weight AS fair_time
        FROM waiting l CROSS JOIN LATERAL (
            SELECT j.id, j.priority, j.key_id, {RANK} AS rank, {CHARGE} AS cost FROM jobs j WHERE {due}
            ORDER BY {RANK}, j.id LIMIT (SELECT :num_rows / count(*) + 1 FROM waiting)) j
    ),
    lifted AS (SELECT id, rank, num_running, {LIFTED.format(of="tenant_id")} AS fair_time FROM timed),
    ranked AS (
        SELECT id, row_number() OVER (ORDER BY fair_time, num_running, rank, id) AS place FROM lifted
    )"""


def locked_in_order(condition: str) -> str:
    """The CTE `pick(id, place)`: locks the first of `ranked` that are not locked and still meet `condition`."""
    return f"""
pick AS MATERIALIZED (
    SELECT j.id, r.place, j.paused_at, {CHARGE} AS charge, {NUM_SEQUENCES} AS num_sequences
    FROM (SELECT id, place FROM ranked ORDER BY place) r
    CROSS JOIN LATERAL (SELECT * FROM jobs WHERE jobs.id = r.id FOR NO KEY UPDATE SKIP LOCKED) j
    WHERE {condition} LIMIT :limit
)"""


# What could be claimed now, for as many messages. Not in order, since that is decided at the claim.
CLAIMABLE_SOON = text(f"""
SELECT j.id FROM jobs j WHERE j.model = :model AND {RUNNABLE} AND j.lane = 'standard'
    AND j.cancel_requested_at IS NULL AND (j.priority >= {MIN_PRIORITY} OR j.num_dispatches > 0)
    AND (NOT {BEGUN} OR j.model_revision = ANY(CAST(:model_revisions AS text[])))
LIMIT :limit
""")

# For a transaction that need not wait for the disk: the loss of its changes in a crash of the database does no harm.
UNSYNCED = "CROSS JOIN (SELECT set_config('synchronous_commit', 'off', true)) AS unsynced"

# Lets batch lines in. If a crash loses this update, they are let in again.
LET_LINES_IN = text(f"""
WITH {ranked(HELD_LINE)},
{locked_in_order(HELD_LINE)},
let_in AS (UPDATE jobs j SET num_dispatches = 1 FROM pick WHERE j.id = pick.id RETURNING j.id, pick.place)
SELECT id FROM let_in {UNSYNCED} ORDER BY place
""")


def claimed(pick: str, *, joined: str = "") -> str:
    """Claim the jobs that `pick(id, place, paused_at, charge, num_sequences)` has locked, as long as a slot is left for
    them: increment the attempt, which fences off earlier owners, start the lease, and return everything that the engine
    needs."""
    return f"""
{pick},
fitting AS (
    SELECT * FROM (
        SELECT *, coalesce(sum(num_sequences) OVER (ORDER BY place ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING), 0)
            AS num_before FROM pick
    ) p WHERE num_before < :num_slots
),
claimed AS (
    UPDATE jobs j SET status = 'in_progress', attempt = j.attempt + 1, lease_owner = :owner,
        model_revision = :model_revision,  -- the revision of all its output: of what it has, or of the first to come
        lease_expires_at = {CLOCK} + make_interval(secs => :lease_seconds),
        started_at = coalesce(j.started_at, {CLOCK}), attempt_started_at = {CLOCK}, progressed_at = {CLOCK},
        paused_at = NULL, num_tokens_at_claim = j.num_committed_tokens, engine_seconds = 0,
        deadline_at = CASE WHEN j.attempt = 0 AND j.run_timeout_seconds IS NOT NULL
            THEN least(j.deadline_at, {CLOCK} + make_interval(secs => j.run_timeout_seconds)) ELSE j.deadline_at END
    FROM fitting WHERE j.id = fitting.id
    RETURNING j.*, fitting.place, fitting.paused_at AS was_paused_at, fitting.charge,
        {UNUSED_TOKENS} AS unused_tokens, {EXCESS_TOKENS} AS excess_tokens
),
moved AS (
    SELECT id, tenant_id, -1 AS queued, 1 AS running, charge, -cost AS queued_tokens, unused_tokens, excess_tokens
    FROM claimed
),
{COUNTED}
SELECT c.id, c.tenant_id, c.attempt, p.request::text AS request, p.prompt_token_ids, p.input_lengths,
    c.max_tokens, c.seed, c.priority, p.request_id, p.traceparent, c.eta,
    extract(epoch FROM {CLOCK} - c.created_at)::float8 AS seconds_since_accept,
    extract(epoch FROM {CLOCK} - c.started_at)::float8 AS seconds_since_start,
    extract(epoch FROM {CLOCK} - c.was_paused_at)::float8 AS seconds_paused,
    c.lane, c.num_suspicions, c.committed_sequence_number, log.chunks, coalesce(log.last, 0) AS last_chunk
FROM claimed c JOIN job_payloads p ON p.job_id = c.id
LEFT JOIN LATERAL (
    SELECT array_agg(k.chunk::text ORDER BY k.sequence_number) AS chunks, max(k.sequence_number) AS last
    FROM job_chunks k WHERE c.committed_sequence_number > 0 AND k.job_id = c.id
) log ON true
{joined}
ORDER BY c.place"""


# If a crash loses a claim, the job is queued as before (ADR 63). Its next claim then gets the same attempt.
CLAIM = text(f"WITH {ranked(CLAIMABLE)}," + claimed(locked_in_order(CLAIMABLE), joined=UNSYNCED))

# Claims the jobs that are named, in this order; those that others have locked or that may not run any more are left.
CLAIM_THESE = text(
    "WITH ranked AS (SELECT * FROM unnest(CAST(:ids AS uuid[])) WITH ORDINALITY AS r(id, place)),"
    + claimed(locked_in_order(f"j.model = :model AND {CLAIMABLE}"))
)

# The heads of the tenants' queues in the order of claims, as far as they would be read for a claim of :limit jobs.
NEXT_IN_TURN = text(f"""
WITH {ranked(CLAIMABLE)}
SELECT r.id, j.tenant_id, {NUM_SEQUENCES} AS num_sequences FROM ranked r JOIN jobs j USING (id) ORDER BY r.place
""")

RUNNING_BY_TENANT = text(f"""
SELECT j.tenant_id, sum({NUM_SEQUENCES})::int AS num_running FROM jobs j
WHERE j.status = 'in_progress' AND j.model = :model GROUP BY j.tenant_id
""")

# What tenants have received per weight: what they were charged, without what their running jobs have not taken yet.
RECEIVED = text(f"""
WITH {UNUSED}
SELECT l.tenant_id, t.weight, l.virtual_time - coalesce(u.num_tokens, 0) / t.weight AS tokens
FROM tenant_load l JOIN tenants t ON t.id = l.tenant_id LEFT JOIN unused u USING (tenant_id)
WHERE l.tenant_id = ANY(CAST(:tenant_ids AS uuid[]))
""")

TAKE_SHARING_TURN = text("SELECT pg_try_advisory_xact_lock(hashtextextended('celeriac shares of ' || :model, 0))")

CHUNKS_OF = text("""
SELECT job_id, array_agg(chunk::text ORDER BY sequence_number) AS chunks FROM job_chunks
WHERE job_id = ANY(CAST(:ids AS uuid[])) GROUP BY job_id
""")

# A repeated commit finds its own chunks, since nobody else can have written any in the same attempt.
NUM_COMMITTED = """j.num_committed_tokens
            + CASE WHEN j.committed_sequence_number = flush.before THEN flush.num_tokens ELSE 0 END"""

# A claim that a crash has lost was of the same attempt, so the attempt alone does not tell who made it.
OWNED = "(CAST(:owner AS uuid) IS NULL OR j.lease_owner = :owner)"

PROVEN = f"{NUM_COMMITTED} - j.num_tokens_at_claim >= {PROVEN_TOKENS}"

COMMIT_CHUNKS = text(f"""
WITH flush AS MATERIALIZED (
    SELECT * FROM unnest(CAST(:ids AS uuid[]), CAST(:attempts AS int[]), CAST(:before AS int[]), CAST(:after AS int[]),
                         CAST(:num_tokens AS int[]), CAST(:engine_seconds AS float8[]), CAST(:chunks AS text[]))
        AS f(id, attempt, before, after, num_tokens, engine_seconds, chunks)
),
held AS (
    UPDATE jobs j SET committed_sequence_number = flush.after,
        num_committed_tokens = {NUM_COMMITTED},
        num_suspicions = CASE WHEN {PROVEN} THEN 0 ELSE j.num_suspicions END,
        lane = CASE WHEN {PROVEN} AND j.num_suspicions > 0 THEN 'standard' ELSE j.lane END,
        first_token_at = coalesce(j.first_token_at, {CLOCK}),
        progressed_at = {CLOCK}, engine_seconds = flush.engine_seconds,
        lease_expires_at = {CLOCK} + make_interval(secs => :lease_seconds)
    FROM flush WHERE j.id = flush.id AND {RUNNING} AND j.attempt = flush.attempt AND {OWNED}
        AND j.committed_sequence_number IN (flush.before, flush.after)
    RETURNING j.id, j.attempt, j.cancel_requested_at IS NOT NULL AS is_cancel_requested,
        coalesce(j.deadline_at <= {CLOCK}, false) AS is_past_deadline, coalesce({HAS_RUN_OUT}, false) AS has_run_out,
        flush.before, flush.chunks
),
written AS (
    INSERT INTO job_chunks (job_id, sequence_number, attempt, chunk)
    SELECT held.id, held.before + c.place, held.attempt, c.chunk
    FROM held CROSS JOIN LATERAL json_array_elements(held.chunks::json) WITH ORDINALITY AS c(chunk, place)
    ON CONFLICT DO NOTHING
)
SELECT id, attempt, is_cancel_requested, is_past_deadline, has_run_out FROM held
""")

RENEW = text(f"""
UPDATE jobs j SET lease_expires_at = {CLOCK} + make_interval(secs => :lease_seconds)
WHERE j.id = ANY(CAST(:ids AS uuid[])) AND j.status = 'in_progress' AND j.lease_owner = :owner
RETURNING j.id, j.attempt, j.cancel_requested_at IS NOT NULL AS is_cancel_requested,
    coalesce(j.deadline_at <= {CLOCK}, false) AS is_past_deadline, coalesce({HAS_RUN_OUT}, false) AS has_run_out
""")


class Packed(list[Any]):
    """An array that is sent in binary format. For the text format, psycopg escapes every quote with a regular
    expression, which costs more than all other parameters of the statement."""


psycopg.adapters.register_dumper(Packed, ListBinaryDumper)
