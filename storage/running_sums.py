"""What running jobs have not taken yet of what they were charged, summed up for each tenant.

The order of claims and the level of new tenants depend on these sums. With few running jobs, each statement that needs
them reads these jobs. With many, it reads two counters of `tenant_load`: statements that begin and end attempts add and
subtract what the job has not taken at that moment, and `correct` subtracts, once a second, what jobs took since. So the
counters are late by what a second of running takes, and never by a claim or an end. If nobody corrects them, or a crash
loses that, they stop being used after five seconds (ARE_KEPT in storage/job_statements.py).
"""

# ruff: noqa: S608  (only constants of the storage modules are inserted into the text; values are bound)

from sqlalchemy import text
from sqlalchemy.orm import Session

from storage.job_statements import CLOCK, EXCESS_TOKENS, UNUSED_TOKENS

MANY_RUNNING = 200  # jobs of all models: to read so many takes a fraction of a millisecond

MAX_OFF_TOKENS = 16  # of each running job, by which a tenant's counters may be late; so that few rows are written

TAKE_TURN = text("SELECT pg_try_advisory_xact_lock(hashtextextended('celeriac running sums', 0))")

# The differences are those of one snapshot, in which rows and counters agree but for what jobs took. They are added to
# whatever the counters are by now, so that no claim or end waits or is lost in between. Nobody else may do this
# meanwhile, or the same difference would be added twice. Rows are locked in the order of COUNTED.
CORRECT = text(f"""
WITH summed AS MATERIALIZED (
    SELECT j.tenant_id, sum({UNUSED_TOKENS}) AS unused, sum({EXCESS_TOKENS}) AS excess
    FROM jobs j WHERE j.status = 'in_progress' GROUP BY j.tenant_id
),
off AS MATERIALIZED (
    SELECT l.tenant_id, coalesce(s.unused, 0) - l.num_unused_tokens AS unused,
        coalesce(s.excess, 0) - l.num_excess_tokens AS excess, :max_off_tokens * l.num_running AS allowed
    FROM tenant_load l LEFT JOIN summed s USING (tenant_id)
),
locked AS MATERIALIZED (
    SELECT l.tenant_id, off.unused, off.excess FROM off JOIN tenant_load l USING (tenant_id)
    WHERE greatest(abs(off.unused), abs(off.excess)) > off.allowed ORDER BY l.tenant_id FOR NO KEY UPDATE OF l
),
corrected AS (
    UPDATE tenant_load l SET num_unused_tokens = l.num_unused_tokens + locked.unused,
        num_excess_tokens = l.num_excess_tokens + locked.excess
    FROM locked WHERE l.tenant_id = locked.tenant_id RETURNING l.tenant_id
)
INSERT INTO running_sums (corrected_at, num_corrected) SELECT {CLOCK}, count(*) FROM corrected
ON CONFLICT (id) DO UPDATE SET corrected_at = excluded.corrected_at, num_corrected = excluded.num_corrected
RETURNING num_corrected
""")


def correct(session: Session, *, max_off_tokens: int = MAX_OFF_TOKENS) -> int | None:
    """Bring the sums up to date, for how many tenants. None if somebody else is doing that."""
    if not session.execute(TAKE_TURN).scalar_one():
        return None
    session.execute(text("SET LOCAL synchronous_commit = off"))  # what a crash loses is corrected again
    return int(session.execute(CORRECT, {"max_off_tokens": max_off_tokens}).scalar_one())
