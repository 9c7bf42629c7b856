"""The queues of all models: what waits and runs in each, and where single jobs stand."""

# ruff: noqa: S608  (only constants of the storage are inserted into the text; values are bound)

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import Row, text
from sqlalchemy.orm import Session

from domain.eta import Load
from domain.jobs import MIN_PRIORITY, Lane, WaitingJob
from storage.job_statements import BEGUN, CHARGE, CLOCK, EXCESS, FAIR_TIME, LIFTED, RANK, STANDING, lead
from storage.tables import Job

# The reason why a queued job waits depends on these columns and on the live workers.
WAITING_JOB = f"""j.lane, CASE WHEN {BEGUN} THEN j.model_revision END AS revision,
    j.lane = 'standard' AND j.priority < {MIN_PRIORITY} AND j.num_dispatches = 0 AS is_held_line,
    j.available_at > {CLOCK} AS is_delayed, j.paused_at IS NOT NULL AS is_paused"""


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
FROM jobs j LEFT JOIN job_followers f ON f.job_id = j.id WHERE j.status = 'queued' GROUP BY 1, 2, 3, 4, 5, 6, 7
""")

MAX_READ = 20_000  # queued jobs; it takes a tenth of a second

MIN_ENDS = 4  # jobs at each end of a long queue

NUMS_QUEUED = text("SELECT num_queued FROM tenant_load WHERE num_queued > 0 ORDER BY num_queued")

_READ = """j.id, j.tenant_id, j.model, j.model_revision, j.lane, j.priority, j.num_dispatches, j.available_at,
            j.paused_at, j.attempt, j.cost, j.num_prompt_tokens, j.num_committed_tokens, j.committed_sequence_number,
            j.reset_sequence_number, j.created_at"""

# Of each tenant's queue for a model, the first and the last :num_ends jobs. Those in between, whose number is known
# from tenant_load, are taken to be like them. Only if a tenant has several long queues are their jobs counted.
LONG_WAITING_GROUPS = text(f"""
WITH RECURSIVE models AS (
    (SELECT model FROM jobs WHERE status = 'queued' ORDER BY model LIMIT 1)
    UNION ALL
    SELECT (SELECT j.model FROM jobs j WHERE j.status = 'queued' AND j.model > m.model ORDER BY j.model LIMIT 1)
    FROM models m WHERE m.model IS NOT NULL
),
ends AS (
    SELECT j.* FROM models m CROSS JOIN tenant_load l CROSS JOIN LATERAL (
        (SELECT {_READ} FROM jobs j WHERE j.status = 'queued' AND j.model = m.model AND j.tenant_id = l.tenant_id
            ORDER BY {RANK}, j.id LIMIT :num_ends)
        UNION
        (SELECT {_READ} FROM jobs j WHERE j.status = 'queued' AND j.model = m.model AND j.tenant_id = l.tenant_id
            ORDER BY {RANK} DESC, j.id DESC LIMIT :num_ends)
    ) j WHERE l.num_queued > 0
),
groups AS ({WAITING} FROM ends j LEFT JOIN job_followers f ON f.job_id = j.id GROUP BY 1, 2, 3, 4, 5, 6, 7),
read AS (
    SELECT model, tenant_id, sum(num_jobs)::float8 AS num_read, sum(num_jobs) >= 2 * :num_ends AS is_long
    FROM groups GROUP BY model, tenant_id
),
sized AS (
    SELECT r.model, r.tenant_id, CASE WHEN NOT r.is_long THEN 1
        WHEN count(*) FILTER (WHERE r.is_long) OVER of_tenant = 1
            THEN greatest(1, (l.num_queued - sum(r.num_read) OVER of_tenant + r.num_read) / r.num_read)
        ELSE (SELECT count(*) FROM jobs j
            WHERE j.status = 'queued' AND j.model = r.model AND j.tenant_id = r.tenant_id) / r.num_read END AS times
    FROM read r JOIN tenant_load l USING (tenant_id) WINDOW of_tenant AS (PARTITION BY r.tenant_id)
)
SELECT g.model, g.lane, g.revision, g.is_held_line, g.is_delayed, g.is_paused, g.tenant_id,
    round(g.num_jobs * s.times)::int AS num_jobs, round(g.num_to_run * s.times)::int AS num_to_run,
    round(g.cost * s.times)::bigint AS cost, round(g.num_tokens * s.times)::bigint AS num_tokens, g.oldest_seconds
FROM groups g JOIN sized s USING (model, tenant_id)
""")


RUNNING_FIGURES = text("""
SELECT model, count(*)::int AS num_jobs,
    sum(greatest(0, cost - num_prompt_tokens - num_committed_tokens))::bigint AS cost,
    sum(cost - num_prompt_tokens)::bigint AS allowed, sum(num_committed_tokens)::bigint AS committed
FROM jobs WHERE status = 'in_progress' GROUP BY model
""")


# A follower has the place of its leader: the first one if that runs. It is not ahead of anybody.
POSITIONS = text(f"""
WITH {EXCESS},
timed AS (
    SELECT j.id, j.model, j.tenant_id, {RANK} AS rank, {CHARGE} AS cost, {TOKENS_LEFT} AS num_tokens,
        {STANDING} AS standing, l.num_running,
        {FAIR_TIME} + (sum({CHARGE}) OVER (PARTITION BY j.model, j.tenant_id ORDER BY {RANK}, j.id)
            - {CHARGE} - {lead("j", "t")}) / t.weight AS fair_time
    FROM jobs j JOIN tenant_load l USING (tenant_id) JOIN tenants t ON t.id = j.tenant_id
        LEFT JOIN excess e ON e.tenant_id = j.tenant_id
    WHERE j.status = 'queued' AND j.model IN (SELECT model FROM jobs WHERE id = ANY(CAST(:ids AS uuid[])))
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
)
SELECT j.id, coalesce(r.num_ahead, 0) AS num_ahead, coalesce(r.cost_ahead, 0) AS cost_ahead,
    coalesce(r.tokens_ahead, 0) AS tokens_ahead, coalesce(r.num_tokens, 0) AS num_tokens, j.tenant_id, r.fair_time,
    {WAITING_JOB}
FROM jobs j LEFT JOIN job_followers f ON f.job_id = j.id LEFT JOIN ranked r ON r.id = coalesce(f.leader_id, j.id)
WHERE j.id = ANY(CAST(:ids AS uuid[])) AND j.status = 'queued' AND (r.id IS NOT NULL OR f.job_id IS NOT NULL)
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
    """Of all queued jobs, if these are at most MAX_READ. Of more, the ends of long queues are read: then all but the
    number that each tenant has queued are estimates."""
    nums_queued = list(session.scalars(NUMS_QUEUED))
    if sum(nums_queued) <= MAX_READ:
        return session.execute(WAITING_GROUPS).all()
    return session.execute(LONG_WAITING_GROUPS, {"num_ends": num_ends(nums_queued)}).all()


def num_ends(nums_queued: Sequence[int]) -> int:
    """How many jobs to read at each end of a queue, so that at most about MAX_READ are read in queues of these lengths,
    which ascend."""
    num_left = MAX_READ
    for place, num_queued in enumerate(nums_queued):
        share = num_left // (len(nums_queued) - place)  # of each of the queues from here on
        if num_queued > share:
            return max(MIN_ENDS, share // 2)
        num_left -= num_queued
    return MAX_READ


def figures_of(rows: QueueRows) -> dict[str, QueueFigures]:
    """Figures by model; models without unfinished jobs are left out."""
    groups: dict[str, dict[WaitingJob, WaitingGroup]] = {}
    loads: dict[str, dict[UUID, Load]] = {}
    for row in rows.waiting:
        job, own = read_waiting_job(row), groups.setdefault(row.model, {})
        group = own.get(job, WaitingGroup(job, 0, 0, 0.0))
        oldest_seconds = max(group.oldest_seconds, row.oldest_seconds)
        own[job] = WaitingGroup(job, group.num_jobs + row.num_jobs, group.cost + row.cost, oldest_seconds)
        if row.num_to_run and not job.is_held_line:
            by_tenant = loads.setdefault(row.model, {})
            load = Load(row.num_to_run, row.cost, row.num_tokens)
            by_tenant[row.tenant_id] = by_tenant.get(row.tenant_id, Load()).plus(load)
    running = {row.model: row for row in rows.running}
    return {
        model: _figures(list(groups.get(model, {}).values()), running.get(model), loads.get(model, {}))
        for model in groups | running
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
        is_paused=job.paused_at is not None,
    )


def read_waiting_job(row: Row[Any]) -> WaitingJob:
    """Of a row that has WAITING_JOB."""
    return WaitingJob(Lane(row.lane), row.revision, row.is_held_line, row.is_delayed, row.is_paused)


def position(session: Session, job_id: UUID) -> QueuePosition | None:
    """Like `positions`, for one job."""
    return positions(session, [job_id]).get(job_id)
