"""The statements for jobs that had begun under a revision of their model which no worker serves any more. The rules
they share are told in `storage/jobs_sql.py`.

A revision counts as served while a live worker of it is there, whatever it is at: one that loads will go on with its
jobs. It counts as gone only where another revision of the same model is ready to run, and every live worker says which
one it has; without a worker a job waits for a worker, not for a revision.
"""

# ruff: noqa: S608  (only constants of these modules are put into the text; values are bound)

from sqlalchemy import text

from storage.jobs_ends_sql import told
from storage.jobs_sql import BEGUN, CLOCK, CORRECTION, COUNTED
from storage.webhook_outbox import IS_TOLD


def _is_gone(model: str, revision: str) -> str:
    live = f"w.model = {model} AND w.seen_at > {CLOCK} - make_interval(secs => :live_seconds)"
    return f"""
    EXISTS (SELECT FROM workers w WHERE {live} AND w.state = 'ready' AND w.model_revision <> {revision})
    AND NOT EXISTS (SELECT FROM workers w WHERE {live} AND coalesce(w.model_revision, {revision}) = {revision})"""


GONE_REVISIONS = text(f"""
WITH begun AS MATERIALIZED (
    SELECT j.model, j.model_revision, count(*) AS num_jobs FROM jobs j
    WHERE j.status = 'queued' AND {BEGUN} GROUP BY j.model, j.model_revision
)
SELECT b.model, b.model_revision, b.num_jobs FROM begun b WHERE {_is_gone("b.model", "b.model_revision")}
""")

PICK = f"""
pick AS MATERIALIZED (
    SELECT j.id, j.num_committed_tokens AS num_tokens FROM jobs j
    WHERE j.status = 'queued' AND j.model = :model AND j.model_revision = :model_revision AND {BEGUN}
        AND {_is_gone("j.model", "j.model_revision")}
    ORDER BY j.id LIMIT :limit FOR NO KEY UPDATE OF j SKIP LOCKED
)"""

# No attempt is under way, so there is none to fence off: the next claim raises the attempt as ever. The reset takes the
# number after the last chunk, and the chunks themselves go.
RESTART = text(f"""
WITH {PICK},
discarded AS (DELETE FROM job_chunks c USING pick WHERE c.job_id = pick.id),
restarted AS (
    UPDATE jobs j SET committed_sequence_number = j.committed_sequence_number + 1,
        reset_sequence_number = j.committed_sequence_number + 1, num_committed_tokens = 0, num_tokens_at_claim = 0,
        first_token_at = NULL, dispatch_at = {CLOCK}, num_dispatches = 0
    FROM pick WHERE j.id = pick.id
    RETURNING j.id, j.attempt, j.committed_sequence_number, pick.num_tokens
),
written AS (
    INSERT INTO job_chunks (job_id, sequence_number, attempt, chunk)
    SELECT id, committed_sequence_number, attempt,
        json_build_object('sequence_number', committed_sequence_number, 'is_reset', true)
    FROM restarted
)
SELECT r.id, r.attempt, r.num_tokens, (SELECT p.request_id FROM job_payloads p WHERE p.job_id = r.id) AS request_id
FROM restarted r
""")

FAIL_GONE = text(f"""
WITH {PICK},
failed AS (
    UPDATE jobs j SET status = 'failed', error = CAST(:revision_error AS json), finished_at = {CLOCK},
        prune_at = {CLOCK} + make_interval(secs => j.result_ttl_seconds)
    FROM pick WHERE j.id = pick.id
    RETURNING j.id, j.tenant_id, j.status, j.attempt, j.num_committed_tokens, j.created_at,
        {CORRECTION} AS charge, {IS_TOLD}
),
moved AS (SELECT id, tenant_id, -1 AS queued, 0 AS running, charge FROM failed),
{COUNTED}
{told("failed", has_chunks="true")}
""")
