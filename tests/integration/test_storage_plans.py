"""The statements stay cheap where the planner knows least."""

import re
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from uuid import UUID, uuid4

import pytest
from sqlalchemy import TextClause, select, text, update
from sqlalchemy.orm import Session

from domain.jobs import JobStatus
from storage import (
    admission,
    job_accept,
    job_ends,
    job_queries,
    job_queues,
    job_statements,
    paces,
    running_sums,
)
from storage.tables import DEFAULT_TENANT_ID, Job, TenantLoad
from tests.conftest import MakeJob, MakeTenant
from tests.storage_samples import MODEL, chunk, new_job, result


def flush_parameters(ids: list[UUID]) -> dict[str, Any]:
    same: dict[str, object] = {
        "attempts": 1,
        "before": 0,
        "after": 1,
        "num_tokens": 1,
        "chunks": f"[{chunk(1).model_dump_json()}]",
        "last": 0,
        "statuses": "completed",
        "finish_reasons": "stop",
        "errors": None,
        "cached_tokens": 0,
        "reasoning_tokens": 0,
        "engine_seconds": 0.5,
        "results": result(1).model_dump_json(),
    }
    lists = {name: [value] * len(ids) for name, value in same.items()} | {"ids": ids}
    claim: dict[str, object] = {
        "model": MODEL,
        "limit": len(ids),
        "num_tenants": len(ids) + 8,
        "num_rows": 2 * len(ids) + 16,
        "num_slots": len(ids),
    }
    claim |= {"model_revision": "main", "lane": "standard", "min_suspicions": 0, "min_standing": 0}
    return {**job_ends.ERRORS, **lists, **claim, "lease_seconds": 60, "owner": uuid4()}


@pytest.mark.parametrize(
    ("statement", "status"),
    [
        (job_statements.COMMIT_CHUNKS, JobStatus.IN_PROGRESS),
        (job_ends.FINALISE, JobStatus.IN_PROGRESS),
        (job_statements.CLAIM, JobStatus.QUEUED),
    ],
    ids=["commit_chunks", "finalise", "claim"],
)
def test_a_statement_for_many_jobs_costs_in_proportion(
    session: Session, make_job: MakeJob, statement: TextClause, status: JobStatus
) -> None:
    """Ids compared one by one with all running or queued jobs: 1024 jobs touched 2,000 rows each. Counted in rows that
    the plan touches, where planning is at its worst: analysed while nothing ran, and no join but nested loops."""
    make_copies(session, make_job(status=JobStatus.COMPLETED), 3000)
    session.execute(text("ANALYZE jobs"))
    make_copies(session, make_job(status=status), 1023)
    ids = list(session.scalars(select(Job.id).where(Job.status == status)))
    for size in (128, 1024):
        num_rows_per_job = _rows_touched(session, statement, flush_parameters(ids[:size])) / size
        assert num_rows_per_job < 50, f"{num_rows_per_job} rows a job for {size} jobs"


@pytest.mark.parametrize("size", [1, 64])
def test_a_claims_plan_from_before_its_jobs_came_serves_it(session: Session, make_job: MakeJob, size: int) -> None:
    """It is kept for seconds, whatever the limit. Between two jobs of an idle system, it is made for an empty table."""
    values = {name: str(value) for name, value in flush_parameters([uuid4()] * size).items()}
    names = list(dict.fromkeys(re.findall(r"(?<!:):(\w+)", job_statements.CLAIM.text)))
    numbered = re.sub(r"(?<!:):(\w+)", lambda found: f"${names.index(found[1]) + 1}", job_statements.CLAIM.text)
    connection = session.connection()
    connection.exec_driver_sql("SET plan_cache_mode = force_generic_plan")
    connection.exec_driver_sql(f"PREPARE kept AS {numbered}")
    executed = f"EXECUTE kept ({', '.join(repr(values[name]) for name in names)})"
    assert connection.exec_driver_sql(executed).all() == []
    session.commit()
    make_copies(session, make_job(), 3000)
    [plan] = session.connection().exec_driver_sql(f"EXPLAIN (ANALYZE, FORMAT JSON) {executed}").scalar_one()
    assert plan["Plan"]["Actual Rows"] == size
    assert _sum_rows(plan["Plan"]) < 1000 + 50 * size
    session.rollback()
    session.connection().exec_driver_sql("DEALLOCATE kept")


@pytest.mark.parametrize("corrected", ["now", "6 seconds", "-1 hour"])
def test_what_is_asked_for_each_job_reads_no_running_ones_while_their_sums_are_kept(
    session: Session, make_job: MakeJob, corrected: str
) -> None:
    """For five seconds, and not longer if the clock is set back. Nor does an accept read the own tenant's queue because
    of a limit on its tokens."""
    make_copies(session, make_job(status=JobStatus.IN_PROGRESS), 3000)
    make_copies(session, make_job(), 3000)
    session.execute(text("ANALYZE jobs"))
    running_sums.correct(session)
    session.commit()
    accept = job_accept.of_new_jobs([new_job()]) | {"max_queued_jobs": 9000, "max_poison_jobs_per_hour": 9}
    claim = flush_parameters([new_job().id])
    for statement, given in [
        (job_statements.ACCEPT, accept),
        (job_statements.CLAIM, claim),
        (job_statements.NEXT_IN_TURN, claim),
        (job_statements.RECEIVED, {"tenant_ids": [DEFAULT_TENANT_ID]}),
        (paces.STANDINGS, {}),
    ]:
        age = "0 seconds" if corrected == "now" else corrected
        session.execute(text(f"UPDATE running_sums SET corrected_at = statement_timestamp() - interval '{age}'"))
        assert (_rows_touched(session, statement, given) < 300) == (corrected == "now")
    limited = {"tenant_ids": [], "key_ids": [], "whole_tenant_ids": [DEFAULT_TENANT_ID]}
    assert _rows_touched(session, admission.COUNT, limited) < 300


def test_looking_for_batch_lines_reads_no_other_jobs(session: Session, make_job: MakeJob) -> None:
    """It is part of each dispatch, also behind a million jobs none of which is a line."""
    make_copies(session, make_job(), 3000)
    session.execute(text("ANALYZE jobs"))
    parameters = {"model": MODEL, "limit": 8, "num_tenants": 16, "num_rows": 32}
    assert _rows_touched(session, job_statements.LET_LINES_IN, parameters) < 50


def test_looking_for_revisions_that_are_gone_reads_no_jobs_without_output(session: Session, make_job: MakeJob) -> None:
    """The janitor looks every few seconds, also where a million jobs wait for their first attempt."""
    make_copies(session, make_job(), 3000)
    session.execute(text("ANALYZE jobs"))
    assert _rows_touched(session, job_ends.GONE_REVISIONS, {"live_seconds": 15}) < 50


def test_figures_of_a_long_queue_read_none_but_its_ends(session: Session, make_job: MakeJob) -> None:
    make_copies(session, make_job(), 3000)
    session.execute(text("ANALYZE jobs"))
    queues = {"models": [MODEL], "tenant_ids": [DEFAULT_TENANT_ID]}
    assert _rows_touched(session, job_queues.LONG_WAITING_GROUPS, {"num_ends": 4} | queues) < 100
    assert _rows_touched(session, job_queues.QUEUES, {"limit": 100}) < 20


def test_the_limits_of_a_key_read_no_jobs_of_other_keys(session: Session, make_job: MakeJob) -> None:
    make_copies(session, make_job(key_id="another"), 3000)
    session.execute(text("ANALYZE jobs"))
    columns = {"tenant_ids": [DEFAULT_TENANT_ID], "key_ids": ["limited"], "whole_tenant_ids": []}
    assert _rows_touched(session, admission.COUNT, columns) < 50


def test_the_lines_of_a_batch_are_found_by_their_index(session: Session, make_job: MakeJob) -> None:
    make_copies(session, make_job(status=JobStatus.COMPLETED), 3000)
    session.execute(text("ANALYZE jobs"))
    lines = job_queries.lines_of(DEFAULT_TENANT_ID, "batch_01ARZ3NDEKTSV4RRFFQ69G5FAV")
    compiled = lines.compile(session.connection(), compile_kwargs={"literal_binds": True})
    assert _rows_touched(session, text(str(compiled).replace(":", "\\:")), {}) < 50


def make_copies(session: Session, job: Job, count: int) -> None:
    """`count` more jobs like `job`; the default tenant has no others unfinished."""
    columns = "".join(f", {column.name}" for column in Job.__table__.c if column.name != "id")
    copied = f"""
        WITH copies AS (INSERT INTO jobs (id{columns}) SELECT gen_random_uuid(){columns}
                        FROM jobs, generate_series(1, {count}) WHERE id = :id RETURNING id)
        INSERT INTO job_payloads
        SELECT copies.id, request, prompt_token_ids FROM copies, job_payloads WHERE job_id = :id"""
    session.execute(text(copied), {"id": job.id})
    if job.status is JobStatus.QUEUED:
        session.execute(update(TenantLoad).values(num_queued=count + 1))
    elif job.status is JobStatus.IN_PROGRESS:
        session.execute(update(TenantLoad).values(num_running=count + 1))
    session.commit()


def _rows_touched(session: Session, statement: TextClause, parameters: dict[str, Any]) -> float:
    session.execute(text("SET LOCAL enable_hashjoin = off"))
    session.execute(text("SET LOCAL enable_mergejoin = off"))
    explain = text("EXPLAIN (ANALYZE, FORMAT JSON) " + statement.text)
    bound = {name: value for name, value in parameters.items() if name in explain._bindparams}
    [plan] = session.execute(explain, bound).scalar_one()
    session.rollback()
    return _sum_rows(plan["Plan"])


def _sum_rows(node: dict[str, Any]) -> float:
    removed = node.get("Rows Removed by Join Filter", 0) + node.get("Rows Removed by Filter", 0)
    touched = float((node["Actual Rows"] + removed) * node["Actual Loops"])
    return touched + sum(_sum_rows(child) for child in node.get("Plans", []))


def test_ranking_a_long_queue_costs_in_proportion(session: Session, make_tenant: MakeTenant) -> None:
    """Whoever asks for the place of one job waits for the ranking of all, those of other tenants included."""
    tenants, jobs = [make_tenant().id for _ in range(2)], [new_job() for _ in range(1_600)]
    seconds = []
    for some in (jobs[:200], jobs[200:]):
        of_both = [replace(job, tenant_id=tenants[number % 2]) for number, job in enumerate(some)]
        job_accept.accept(session, of_both, max_queued_jobs=len(jobs))
        seconds.append(min(_seconds_of(job_queues.positions, session, [some[0].id]) for _ in range(4)))
    assert seconds[1] < 20 * seconds[0], "eight times as many; in proportion to the square, it would be sixty times"


def _seconds_of(function: Callable[..., object], *arguments: object) -> float:
    began_at = time.perf_counter()
    assert function(*arguments)
    return time.perf_counter() - began_at
