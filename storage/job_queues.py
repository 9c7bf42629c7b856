"""The queues of all models: what waits and runs in each, and where single jobs stand."""

# ruff: noqa: S608  (only constants of the storage are inserted into the text; values are bound)

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import Row, text
from sqlalchemy.orm import Session

from domain.eta import Load
from domain.jobs import MIN_PRIORITY, Lane, WaitingJob
from storage.job_ends import MAY_HAVE_BEGUN
from storage.job_statements import BEGUN, CHARGE, CLOCK, EXCESS, FAIR_TIME, IS_HELD, LIFTED, RANK, STANDING, lead
from storage.tables import Job

# Whatever else is put off has failed before.
IS_FOLLOWING = f"(j.attempt = 0 AND j.available_at > {CLOCK})"

# The reason why a queued job waits depends on these columns and on the live workers.
WAITING_JOB = f"""j.lane, CASE WHEN {BEGUN} THEN j.model_revision END AS revision,
    {IS_HELD} AS is_held_line,
    j.available_at > {CLOCK} AS is_delayed, {IS_FOLLOWING} AS is_following, j.paused_at IS NOT NULL AS is_paused"""


# The output tokens that a job may still take.
TOKENS_LEFT = "greatest(0, j.cost - j.num_prompt_tokens - j.num_committed_tokens)"


# A job that follows another one is queued, but it is no work: it will get the other's output.
WAITING = f"""SELECT j.model, {WAITING_JOB}, j.tenant_id, count(*)::int AS num_jobs,
    count(*) FILTER (WHERE f.job_id IS NULL)::int AS num_to_run,
    coalesce(sum({CHARGE}) FILTER (WHERE f.job_id IS NULL), 0)::bigint AS cost,
    coalesce(sum({TOKENS_LEFT}) FILTER (WHERE f.job_id IS NULL), 0)::bigint AS num_tokens,
    extract(epoch FROM {CLOCK} - min(j.created_at))::float8 AS oldest_seconds"""

WAITING_GROUPS = text(f"""
{WAITING}
FROM jobs j LEFT JOIN job_followers f ON f.job_id = j.id WHERE j.status = 'queued' GROUP BY 1, 2, 3, 4, 5, 6, 7, 8
""")

MAX_READ = 20_000  # queued jobs; it takes a tenth of a second

NUMS_QUEUED = text("SELECT tenant_id, num_queued FROM tenant_load WHERE num_queued > 0")

# Which tenants have queued jobs of which models, by one look into jobs_ready_idx for each such queue.
QUEUES = text("""
WITH RECURSIVE queues AS (
    (SELECT j.model, j.tenant_id FROM jobs j WHERE j.status = 'queued' ORDER BY j.model, j.tenant_id LIMIT 1)
    UNION ALL
    SELECT n.model, n.tenant_id FROM queues q CROSS JOIN LATERAL (
        SELECT j.model, j.tenant_id FROM jobs j
        WHERE j.status = 'queued' AND (j.model, j.tenant_id) > (q.model, q.tenant_id)
        ORDER BY j.model, j.tenant_id LIMIT 1
    ) n
)
SELECT model, tenant_id FROM queues LIMIT :limit
""")

JOBS_PER_QUEUE = 20  # the ends of a queue take about the time of so many jobs: shorter queues are read as a whole

_READ = """j.id, j.tenant_id, j.model, j.model_revision, j.lane, j.priority, j.num_dispatches, j.available_at,
            j.paused_at, j.attempt, j.cost, j.num_prompt_tokens, j.num_committed_tokens, j.committed_sequence_number,
            j.reset_sequence_number, j.created_at"""

# Of each tenant's queue for a model, the first and the last :num_ends jobs, one of the batch lines that wait, if there
# are any, and all that may have begun, paused ones among them: there are few. How many are in between is known from
# tenant_load, or counted if a tenant has several long queues. All these are taken to be like the commonest jobs at the
# ends, since a queue begins with the jobs that are exceptions or ends with them; only how many of them are batch lines
# that wait is counted.
LONG_WAITING_GROUPS = text(f"""
WITH queues AS MATERIALIZED (
    SELECT * FROM unnest(CAST(:models AS text[]), CAST(:tenant_ids AS uuid[])) AS q(model, tenant_id)
),
read AS (
    SELECT j.*, true AS is_end FROM queues q CROSS JOIN LATERAL (
        (SELECT {_READ} FROM jobs j WHERE j.status = 'queued' AND j.model = q.model AND j.tenant_id = q.tenant_id
            AND NOT {MAY_HAVE_BEGUN} ORDER BY {RANK}, j.id LIMIT :num_ends)
        UNION
        (SELECT {_READ} FROM jobs j WHERE j.status = 'queued' AND j.model = q.model AND j.tenant_id = q.tenant_id
            AND NOT {MAY_HAVE_BEGUN} ORDER BY {RANK} DESC, j.id DESC LIMIT :num_ends)
        UNION
        (SELECT {_READ} FROM jobs j WHERE j.status = 'queued' AND {IS_HELD} AND j.model = q.model
            AND j.tenant_id = q.tenant_id AND NOT {MAY_HAVE_BEGUN} LIMIT 1)
    ) j
    UNION ALL
    SELECT {_READ}, false FROM jobs j WHERE j.status = 'queued' AND {MAY_HAVE_BEGUN}
),
groups AS (
    {WAITING}, count(*) FILTER (WHERE j.is_end) AS num_at_ends
    FROM read j LEFT JOIN job_followers f ON f.job_id = j.id GROUP BY 1, 2, 3, 4, 5, 6, 7, 8
),
counted AS (
    SELECT model, tenant_id, sum(num_jobs) AS num_read, sum(num_at_ends) >= 2 * :num_ends AS is_long,
        coalesce(sum(num_jobs) FILTER (WHERE is_held_line), 0) AS num_held, bool_and(is_held_line) AS is_all_held
    FROM groups GROUP BY model, tenant_id
),
sized AS (
    SELECT c.*, CASE WHEN NOT c.is_long THEN 0
        WHEN count(*) FILTER (WHERE c.is_long) OVER of_tenant = 1 THEN l.num_queued - sum(c.num_read) OVER of_tenant
        ELSE (SELECT count(*) FROM jobs j
            WHERE j.status = 'queued' AND j.model = c.model AND j.tenant_id = c.tenant_id) - c.num_read
        END AS num_between
    FROM counted c JOIN tenant_load l USING (tenant_id) WINDOW of_tenant AS (PARTITION BY c.tenant_id)
),
divided AS (
    SELECT s.model, s.tenant_id, s.num_between, CASE WHEN s.num_between <= 0 OR s.num_held = 0 THEN 0
        WHEN s.is_all_held THEN s.num_between
        ELSE (SELECT count(*) FROM jobs j
            WHERE j.status = 'queued' AND {IS_HELD} AND j.model = s.model AND j.tenant_id = s.tenant_id) - s.num_held
        END AS num_held_between
    FROM sized s
),
scaled AS (
    SELECT g.*, 1 + CASE WHEN row_number() OVER likely > 1 THEN 0 WHEN g.is_held_line THEN d.num_held_between
        ELSE greatest(0, d.num_between - d.num_held_between) END / g.num_jobs::float8 AS times
    FROM groups g JOIN divided d USING (model, tenant_id)
    WINDOW likely AS (PARTITION BY g.model, g.tenant_id, g.is_held_line ORDER BY g.num_at_ends DESC, g.is_delayed)
)
SELECT model, lane, revision, is_held_line, is_delayed, is_following, is_paused, tenant_id,
    round(num_jobs * times)::int AS num_jobs, round(num_to_run * times)::int AS num_to_run,
    round(cost * times)::bigint AS cost, round(num_tokens * times)::bigint AS num_tokens, oldest_seconds
FROM scaled
""")


RUNNING_FIGURES = text("""
SELECT model, count(*)::int AS num_jobs,
    sum(greatest(0, cost - num_prompt_tokens - num_committed_tokens))::bigint AS cost,
    sum(cost - num_prompt_tokens)::bigint AS allowed, sum(num_committed_tokens)::bigint AS committed
FROM jobs WHERE status = 'in_progress' GROUP BY model
""")


# A follower has the place of its leader: the first one if that runs. It is not ahead of anybody.
POSITIONS = text(f"""
WITH asked AS MATERIALIZED (
    SELECT j.id, j.tenant_id, j.model, coalesce(f.leader_id, j.id) AS ranked_id, f.job_id IS NOT NULL AS is_follower,
        {WAITING_JOB}
    FROM jobs j LEFT JOIN job_followers f ON f.job_id = j.id
    WHERE j.id = ANY(CAST(:ids AS uuid[])) AND j.status = 'queued'
),
{EXCESS},
timed AS (
    SELECT j.id, j.model, j.tenant_id, {RANK} AS rank, {CHARGE} AS cost, {TOKENS_LEFT} AS num_tokens,
        {STANDING} AS standing, l.num_running,
        {FAIR_TIME} + (sum({CHARGE}) OVER (PARTITION BY j.model, j.tenant_id ORDER BY {RANK}, j.id)
            - {CHARGE} - {lead("j", "t")}) / t.weight AS fair_time
    FROM jobs j JOIN tenant_load l USING (tenant_id) JOIN tenants t ON t.id = j.tenant_id
        LEFT JOIN excess e ON e.tenant_id = j.tenant_id
    WHERE j.status = 'queued' AND j.model IN (SELECT model FROM asked)
        AND NOT EXISTS (SELECT FROM job_followers f WHERE f.job_id = j.id)
),
lifted AS (
    SELECT id, tenant_id, model, rank, cost, num_tokens, standing, num_running,
        {LIFTED.format(of="model, tenant_id")} AS fair_time
    FROM timed
),
ranked AS (
    SELECT id, row_number() OVER ahead - 1 AS num_ahead, sum(cost) OVER ahead - cost AS cost_ahead,
        sum(num_tokens) OVER ahead - num_tokens AS tokens_ahead, num_tokens, fair_time FROM lifted
    WINDOW ahead AS (PARTITION BY model ORDER BY standing DESC, fair_time, num_running, rank, id
        ROWS UNBOUNDED PRECEDING)
),
found AS MATERIALIZED (  -- by one look into a hash table for each job that is ranked
    SELECT * FROM ranked WHERE (id IN (SELECT ranked_id FROM asked)) IS TRUE
)
SELECT a.*, coalesce(r.num_ahead, 0) AS num_ahead, coalesce(r.cost_ahead, 0) AS cost_ahead,
    coalesce(r.tokens_ahead, 0) AS tokens_ahead, coalesce(r.num_tokens, 0) AS num_tokens, r.fair_time
FROM asked a LEFT JOIN found r ON r.id = a.ranked_id WHERE r.id IS NOT NULL OR a.is_follower
""")


@dataclass(frozen=True, slots=True)
class WaitingGroup:
    """Queued jobs of one model that wait for the same thing."""

    job: WaitingJob
    num_jobs: int
    cost: int  # tokens of their prompts plus the most that they may generate
    oldest_seconds: float  # time since the oldest of them was accepted


@dataclass(frozen=True, slots=True)
class QueueFigures:
    """The work queued and running for one model."""

    waiting: Sequence[WaitingGroup] = ()
    num_running: int = 0
    running_cost: int = 0  # tokens that running jobs may still generate
    allowed_tokens: int = 0  # that running jobs may generate in all
    committed_tokens: int = 0  # of these
    loads: Mapping[UUID, Load] = field(default_factory=dict)  # by tenant, what is queued, without batch lines that wait

    @property
    def num_queued(self) -> int:
        return sum(group.num_jobs for group in self.waiting)

    @property
    def queued_cost(self) -> int:
        return sum(group.cost for group in self.waiting)

    @property
    def oldest_queued_seconds(self) -> float:
        """How long ago the oldest queued job was accepted; 0 if none is queued."""
        return max((group.oldest_seconds for group in self.waiting), default=0.0)


@dataclass(frozen=True, slots=True)
class QueuePosition:
    """How many queued jobs of the model come earlier in the current order, and how many tokens they may take."""

    num_ahead: int
    cost_ahead: int
    job: WaitingJob = field(default_factory=WaitingJob)
    tokens_ahead: int = 0  # of output
    num_tokens: int = 0  # that the job itself may generate
    is_estimate: bool = False  # the queue is too long to rank
    turn: tuple[UUID, float] | None = None  # its tenant and its fair time, by which others may overtake it


@dataclass(frozen=True, slots=True)
class QueueRows:
    """What the database says of all queues: a row for each tenant of a model and reason to wait. Thousands of them are
    read within milliseconds; what `figures_of` makes of them takes ten times as long."""

    waiting: Sequence[Row[Any]]
    running: Sequence[Row[Any]]

    @property
    def models_with_held_lines(self) -> set[str]:
        return {row.model for row in self.waiting if row.is_held_line}


def queue_rows(session: Session) -> QueueRows:
    """Reads every running job besides `waiting_rows`, so call it at most once a second."""
    return QueueRows(waiting_rows(session), session.execute(RUNNING_FIGURES).all())


def waiting_rows(session: Session) -> Sequence[Row[Any]]:
    """Of all queued jobs, if these are at most MAX_READ, or their queues are short. Of more, the ends of long queues
    are read. Then the numbers of jobs of each tenant and model are exact, also of those that have begun and of batch
    lines that wait, unless a queue begins meanwhile; other reasons to wait, costs and ages are estimates."""
    num_queued_by_tenant = {row.tenant_id: row.num_queued for row in session.execute(NUMS_QUEUED)}
    num_queued = sum(num_queued_by_tenant.values())
    if num_queued <= MAX_READ:
        return session.execute(WAITING_GROUPS).all()
    max_queues = num_queued // JOBS_PER_QUEUE
    queues = session.execute(QUEUES, {"limit": max_queues + 1}).all()
    if len(queues) > max_queues:
        return session.execute(WAITING_GROUPS).all()
    num_queues = Counter(queue.tenant_id for queue in queues)
    lengths = (num_queued_by_tenant.get(queue.tenant_id, 0) / num_queues[queue.tenant_id] for queue in queues)
    columns = {"models": [queue.model for queue in queues], "tenant_ids": [queue.tenant_id for queue in queues]}
    return session.execute(LONG_WAITING_GROUPS, columns | {"num_ends": num_ends(sorted(lengths))}).all()


def num_ends(lengths: Sequence[float]) -> int:
    """How many jobs to read at each end of a queue, so that at most about MAX_READ are read in queues of these lengths,
    which ascend, or two of each."""
    num_left: float = MAX_READ
    for place, length in enumerate(lengths):
        share = num_left / (len(lengths) - place)  # of each of the queues from here on
        if length > share:
            return max(1, int(share / 2))
        num_left -= length
    return MAX_READ


def figures_of(rows: QueueRows) -> dict[str, QueueFigures]:
    """Figures by model; models without unfinished jobs are left out."""
    alike: dict[tuple[Any, ...], list[Row[Any]]] = {}  # by model and what they wait for
    loads: dict[str, dict[UUID, Load]] = {}
    for row in rows.waiting:
        kind = row.model, row.lane, row.revision, row.is_held_line, row.is_delayed, row.is_following, row.is_paused
        alike.setdefault(kind, []).append(row)
        if row.num_to_run and not row.is_held_line:
            by_tenant, load = loads.setdefault(row.model, {}), Load(row.num_to_run, row.cost, row.num_tokens)
            first = by_tenant.setdefault(row.tenant_id, load)
            if first is not load:
                by_tenant[row.tenant_id] = first.plus(load)
    groups: dict[str, list[WaitingGroup]] = {}
    for (model, *_), own in alike.items():
        num_jobs, cost = sum(row.num_jobs for row in own), sum(row.cost for row in own)
        oldest_seconds = max(0.0, *(row.oldest_seconds for row in own))
        group = WaitingGroup(read_waiting_job(own[0]), num_jobs, cost, oldest_seconds)
        groups.setdefault(model, []).append(group)
    running = {row.model: row for row in rows.running}
    return {
        model: _figures(groups.get(model, []), running.get(model), loads.get(model, {})) for model in groups | running
    }


def queue_figures(session: Session) -> dict[str, QueueFigures]:
    return figures_of(queue_rows(session))


def _figures(waiting: Sequence[WaitingGroup], running: Row[Any] | None, loads: Mapping[UUID, Load]) -> QueueFigures:
    if running is None:
        return QueueFigures(waiting, loads=loads)
    return QueueFigures(waiting, running.num_jobs, running.cost, running.allowed, running.committed, loads)


def positions(session: Session, job_ids: Sequence[UUID]) -> dict[UUID, QueuePosition]:
    """The positions of queued jobs in the current order of claims; later jobs may still overtake.

    Jobs that are not queued are left out. This ranks every queued job of their models (milliseconds per thousand), so
    ask for many jobs at once, and at most once a second.
    """
    if not job_ids:
        return {}
    rows = session.execute(POSITIONS, {"ids": list(job_ids)})
    return {
        row.id: QueuePosition(
            row.num_ahead,
            row.cost_ahead,
            read_waiting_job(row),
            row.tokens_ahead,
            row.num_tokens,
            turn=None if row.fair_time is None else (row.tenant_id, row.fair_time),
        )
        for row in rows
    }


def waiting_job(job: Job, now: datetime) -> WaitingJob:
    """The facts in a queued job's row about why it waits."""
    has_output = job.committed_sequence_number > job.reset_sequence_number
    is_line = job.lane is Lane.STANDARD and job.priority < MIN_PRIORITY
    return WaitingJob(
        job.lane,
        job.model_revision if has_output else None,
        is_held_line=is_line and job.num_dispatches == 0,
        is_delayed=job.available_at > now,
        is_following=job.attempt == 0 and job.available_at > max(now, job.created_at),
        is_paused=job.paused_at is not None,
    )


def read_waiting_job(row: Row[Any]) -> WaitingJob:
    """Of a row that has WAITING_JOB."""
    return WaitingJob(
        Lane(row.lane),
        row.revision,
        is_held_line=row.is_held_line,
        is_delayed=row.is_delayed,
        is_following=row.is_following,
        is_paused=row.is_paused,
    )


def position(session: Session, job_id: UUID) -> QueuePosition | None:
    """Like `positions`, for one job."""
    return positions(session, [job_id]).get(job_id)
