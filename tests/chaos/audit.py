"""A trigger that writes down every change of status and who made it, and what these changes must never show.

The table is part of the final SQL that the checker reads; the system does not know of it.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import psycopg

from domain.jobs import external_id
from tests.chaos.checker import TERMINAL, Violation
from tests.chaos.faults import Struck
from tests.chaos.plant import Incarnation, Part

TRIGGERS = """
CREATE TABLE chaos_changes (
    number bigserial PRIMARY KEY, at double precision, job_id uuid, old text, new text, attempt int, owner uuid,
    lease_left double precision, num_failures int, by text);
CREATE TABLE chaos_workers (id uuid, name text, at double precision);

CREATE FUNCTION chaos_note_change() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    INSERT INTO chaos_changes (at, job_id, old, new, attempt, owner, lease_left, num_failures, by) VALUES (
        extract(epoch FROM clock_timestamp()), new.id, old.status, new.status, new.attempt,
        coalesce(new.lease_owner, old.lease_owner),
        extract(epoch FROM old.lease_expires_at - statement_timestamp()), new.num_failures,
        current_setting('application_name'));
    RETURN new;
END $$;
CREATE TRIGGER chaos_change AFTER UPDATE OF status ON jobs FOR EACH ROW
    WHEN (old.status IS DISTINCT FROM new.status) EXECUTE FUNCTION chaos_note_change();

CREATE FUNCTION chaos_note_worker() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    INSERT INTO chaos_workers VALUES (new.id, split_part(new.hostname, '@', 1), extract(epoch FROM clock_timestamp()));
    RETURN new;
END $$;
CREATE TRIGGER chaos_worker AFTER INSERT ON workers FOR EACH ROW EXECUTE FUNCTION chaos_note_worker();
"""


@dataclass(frozen=True, slots=True)
class Owner:
    """An incarnation of a worker: the part's name, and when it first reported itself."""

    name: str
    at: float


@dataclass(frozen=True, slots=True)
class Change:
    """A job's status became another. `owner` is of the attempt that began or ended."""

    at: float
    job_id: UUID
    old: str
    new: str
    attempt: int
    owner: UUID | None
    lease_left: float | None
    num_failures: int
    by: str  # the part whose statement it was

    @property
    def is_claim(self) -> bool:
        return self.new == "in_progress"

    @property
    def is_rescue(self) -> bool:
        return self.old == "in_progress" and self.by == "maintenance"


def install(connection: "psycopg.Connection[Any]") -> None:
    connection.execute(TRIGGERS)
    connection.execute(ENDPOINT)


def read_changes(connection: "psycopg.Connection[Any]") -> list[Change]:
    rows = connection.execute(
        "SELECT at, job_id, old, new, attempt, owner, lease_left, num_failures, by FROM chaos_changes ORDER BY number"
    )
    return [Change(*row) for row in rows]


def read_findings(connection: "psycopg.Connection[Any]") -> dict[str, float]:
    """What the janitor counted by itself in this run."""
    rows = connection.execute("SELECT name, sum(value) FROM maintenance_figures GROUP BY name")
    return {name: float(value) for name, value in rows}


def read_attempts(connection: "psycopg.Connection[Any]", model: str) -> list[tuple[str, int, str, int]]:
    """Of each attempt at a job of the model: the job, its number, how it ended, the tokens that it committed."""
    rows = connection.execute(
        "SELECT a.job_id, a.attempt, a.outcome, a.num_tokens FROM job_attempts a JOIN jobs j ON j.id = a.job_id"
        " WHERE j.model = %s",
        [model],
    )
    return [(external_id(job_id), attempt, outcome, num_tokens) for job_id, attempt, outcome, num_tokens in rows]


def read_owners(connection: "psycopg.Connection[Any]") -> dict[UUID, Owner]:
    """Who the owners of leases were."""
    return {id_: Owner(name, at) for id_, name, at in connection.execute("SELECT id, name, at FROM chaos_workers")}


#: An endpoint that hears of every end, at a name that no resolver knows: what is judged is what was written down.
ENDPOINT = """
INSERT INTO webhook_endpoints (id, tenant_id, name, url, event_types, secret)
SELECT gen_random_uuid(), id, 'chaos', 'https://chaos.invalid/hook',
    '{job.completed,job.failed,job.cancelled,job.expired}', 'whsec_Y2hhb3M=' FROM tenants"""
UNTOLD = """
SELECT j.id, j.status, count(d.id) FROM jobs j LEFT JOIN webhook_deliveries d
    ON d.event_id = j.id AND d.type = 'job.' || j.status
WHERE j.finished_at IS NOT NULL GROUP BY j.id HAVING count(d.id) <> 1"""


def judge_webhooks(connection: "psycopg.Connection[Any]") -> list[Violation]:
    """Every end was written down once for the endpoint that `install` made."""
    rows = connection.execute(UNTOLD).fetchall()
    return [
        Violation("end not told once", external_id(id_), f"{status}, {number} webhooks") for id_, status, number in rows
    ]


def judge_changes(changes: Sequence[Change]) -> Iterator[Violation]:
    last_by_job: dict[UUID, Change] = {}
    for change in changes:
        job = external_id(change.job_id)
        last = last_by_job.get(change.job_id)
        if change.old in TERMINAL:
            yield Violation("terminal rewritten", job, f"{change.old} became {change.new}, by {change.by}")
        if change.is_claim and last is not None and change.attempt <= last.attempt:
            yield Violation("attempt reused", job, f"{change.attempt} after {last.attempt}")
        if change.is_rescue and change.lease_left is not None and change.lease_left > 0:
            yield Violation("rescued under a valid lease", job, f"{change.lease_left:.2f} s left")
        last_by_job[change.job_id] = change


def figures(
    changes: Sequence[Change],
    owners: Mapping[UUID, Owner],
    workers: Sequence[Part],
    struck: Sequence[Struck],
    *,
    lease_seconds: float,
) -> dict[str, Any]:
    rescues = [change for change in changes if change.is_rescue]
    restarts = [fault.ended_at for fault in struck if fault.kind == "postgres restart"]
    false_rescues = [
        change
        for change in rescues
        if (owner := _incarnation(change, owners, workers)) is not None
        and owner.was_well(change.at - lease_seconds - 1, change.at)
        and not any(_is_cut_off(fault, change.at, lease_seconds) for fault in struck)
    ]
    return {
        "claims": sum(change.is_claim for change in changes),
        "rescues": len(rescues),
        "rescues_of_well_workers": len(false_rescues),
        "rescues_of_well_workers_after_postgres_restart": sum(
            any(0 <= change.at - at < 2 * lease_seconds + 5 for at in restarts) for change in false_rescues
        ),
        "faults_around_them": sorted({_around(change, owners, struck, lease_seconds) for change in false_rescues}),
    }


def _is_cut_off(fault: Struck, at: float, lease_seconds: float) -> bool:
    """Whether this kept the workers, and them alone, from the database for what a renewed lease has left at least."""
    is_long = fault.ended_at - fault.began_at > lease_seconds * 2 / 3
    is_near = fault.began_at < at < fault.ended_at + lease_seconds
    return (fault.kind, fault.target) == ("half-open postgres", "gpu to postgres") and is_long and is_near


def _around(change: Change, owners: Mapping[UUID, Owner], struck: Sequence[Struck], lease_seconds: float) -> str:
    """Who was robbed when, and by what the lease may not have been renewed after all."""
    assert change.owner is not None
    since = change.at - 2 * lease_seconds
    faults = [fault for fault in struck if fault.target and fault.began_at < change.at and fault.ended_at > since]
    told = (
        f"{fault.kind} of {fault.target} from {fault.began_at - change.at:.1f} to {fault.ended_at - change.at:.1f} s"
        for fault in faults
    )
    return f"{owners[change.owner].name} at {change.at:.0f}: {'; '.join(told)}"


def _incarnation(change: Change, owners: Mapping[UUID, Owner], workers: Sequence[Part]) -> Incarnation | None:
    """The process that held the lease, if we know it."""
    owner = owners.get(change.owner) if change.owner is not None else None
    if owner is None:
        return None
    part = next(part for part in workers if part.name == owner.name)
    return next((i for i in part.incarnations if i.started_at < owner.at < (i.ended_at or math.inf)), None)
