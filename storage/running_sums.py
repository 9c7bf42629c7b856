"""What running jobs have not taken yet of what they were charged, summed up for each tenant.

The order of claims and the level of new tenants depend on these sums. With few running jobs, each statement that needs
them reads these jobs. With many, it reads two counters of `tenant_load`: statements that begin and end attempts add and
subtract what the job has not taken at that moment, and `correct` subtracts, once a second, what jobs took since. So the
counters are late by what a second of running takes, and never by a claim or an end. If nobody corrects them, or a crash
loses that, they stop being used after five seconds (ARE_KEPT in storage/job_statements.py).
"""

# ruff: noqa: S608  (only constants of the storage modules are inserted into the text; values are bound)

from dataclasses import dataclass

from psycopg.errors import LockNotAvailable
from sqlalchemy import text
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from storage.job_statements import CLOCK, EXCESS_TOKENS, UNUSED_TOKENS

MANY_RUNNING = 200  # jobs of all models: to read so many takes a fraction of a millisecond

MAX_OFF_TOKENS = 16  # of each running job, by which a tenant's counters may be late; so that few rows are written

TAKE_TURN = text("SELECT pg_try_advisory_xact_lock(hashtextextended('celeriac running sums', 0))")

# The differences are those of one snapshot, in which rows and counters agree but for what jobs took. They are added to
# whatever the counters are by now, so that no claim or end is lost in between. Nobody else may do this meanwhile, or
# the same difference would be added twice.
_CORRECT = f"""
WITH summed AS MATERIALIZED (
    SELECT j.tenant_id, sum({UNUSED_TOKENS}) AS unused, sum({EXCESS_TOKENS}) AS excess
    FROM jobs j WHERE j.status = 'in_progress' GROUP BY j.tenant_id
),
off AS MATERIALIZED (
    SELECT tenant_id, unused, excess FROM (
        SELECT l.tenant_id, l.num_running, coalesce(s.unused, 0) - l.num_unused_tokens AS unused,
            coalesce(s.excess, 0) - l.num_excess_tokens AS excess
        FROM tenant_load l LEFT JOIN summed s USING (tenant_id)
    ) d WHERE greatest(abs(unused), abs(excess)) > :max_off_tokens * num_running
),
locked AS MATERIALIZED (
    SELECT l.tenant_id, off.unused, off.excess FROM off JOIN tenant_load l USING (tenant_id) {{locking}}
),
corrected AS (
    UPDATE tenant_load l SET num_unused_tokens = l.num_unused_tokens + locked.unused,
        num_excess_tokens = l.num_excess_tokens + locked.excess
    FROM locked WHERE l.tenant_id = locked.tenant_id RETURNING l.tenant_id
)
INSERT INTO running_sums (corrected_at, num_corrected) SELECT {CLOCK}, count(*) FROM corrected
ON CONFLICT (id) DO UPDATE SET corrected_at = excluded.corrected_at, num_corrected = excluded.num_corrected
RETURNING num_corrected AS num_tenants, (SELECT count(*) FROM off) - num_corrected AS num_skipped
"""

# All that nobody else has locked; then, by itself, one of those that others have. So a transaction that is held up
# while it has one tenant's counters holds up no other tenant's.
CORRECT = text(_CORRECT.format(locking="FOR NO KEY UPDATE OF l SKIP LOCKED"))
CORRECT_ONE = text(_CORRECT.format(locking="ORDER BY random() LIMIT 1 FOR NO KEY UPDATE OF l"))

WAIT_MILLISECONDS = 100  # for a tenant whose counters others lock without a pause, each for a few of these


@dataclass(frozen=True, slots=True)
class Corrected:
    """Of how many tenants the sums were brought up to date, and of how many not, since others had locked them."""

    num_tenants: int
    num_skipped: int


def correct(session: Session, *, max_off_tokens: int = MAX_OFF_TOKENS) -> Corrected | None:
    """Bring the sums up to date, except for what others have locked. None if somebody else is doing that."""
    if not session.execute(TAKE_TURN).scalar_one():
        return None
    session.execute(text("SET LOCAL synchronous_commit = off"))  # what a crash loses is corrected again
    return Corrected(*session.execute(CORRECT, {"max_off_tokens": max_off_tokens}).one())


def correct_one(session: Session) -> None:
    """Bring the sums of one tenant up to date, and wait a moment for its lock. Needs a transaction of its own."""
    if not session.execute(TAKE_TURN).scalar_one():
        return
    session.execute(text(f"SET LOCAL synchronous_commit = off; SET LOCAL lock_timeout = '{WAIT_MILLISECONDS}ms'"))
    try:
        with session.begin_nested():
            session.execute(CORRECT_ONE, {"max_off_tokens": MAX_OFF_TOKENS})
    except OperationalError as exc:
        if not isinstance(exc.orig, LockNotAvailable):
            raise
