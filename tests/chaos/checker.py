"""Judges a run by two things only: what the clients wrote down, and what SQL holds at the end.

The shape is that of Jepsen's total-queue: what was accepted must come out, once, whole, and as it was shown. A
violation is a sentence about one job; the report counts them by kind.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID
from zlib import crc32

import psycopg

from domain.jobs import external_id
from tests.chaos.clients import Connection, History

TERMINAL = frozenset({"completed", "failed", "cancelled", "expired"})
CHAINED_TEXT = re.compile(r"(?:[0-9a-f]{8} )+")  # by the fake back end with its knob `chained`


@dataclass(frozen=True, slots=True)
class Violation:
    kind: str
    job: str
    detail: str


@dataclass(slots=True)
class StoredJob:
    """A job as SQL has it. `chunks` are its texts by sequence number."""

    id: str
    model: str
    status: str
    attempt: int
    num_failures: int
    error_code: str | None
    committed: int
    chunks: dict[int, str]
    result: str | None


@dataclass(frozen=True, slots=True)
class Usage:
    prompt_tokens: int
    output_tokens: int
    num_ends: int


Counted = tuple[int, ...]  # jobs queued and running, tokens of the former, unused and excess ones of the latter
NOTHING: Counted = (0, 0, 0, 0, 0)


@dataclass(slots=True)
class Stored:
    """All that the checker reads of SQL."""

    jobs: dict[str, StoredJob]
    key_by_id: dict[str, str | None]
    counted: dict[str, Counted]  # by tenant, as the rows are
    counters: dict[str, Counted]  # and as tenant_load has it
    num_results: int = 0
    num_chunks: int = 0
    used: dict[str, Usage] = field(default_factory=dict)  # by job, as its view shows it
    recorded: dict[str, Usage] = field(default_factory=dict)  # the sums of its records in the ledger


# Output that a job has taken over from another one is in the records of that one.
USED = """
SELECT j.id, CASE WHEN j.attempt > 0 THEN j.num_prompt_tokens ELSE 0 END, j.num_committed_tokens - (
        SELECT coalesce(sum(json_array_length(coalesce(c.chunk->'token_ids', '[]'))), 0) FROM job_chunks c
        WHERE c.job_id = j.id AND c.attempt = 0),
    CASE WHEN j.finished_at IS NOT NULL THEN 1 ELSE 0 END
FROM jobs j"""

RECORDED = """
SELECT job_id, sum(num_prompt_tokens), sum(num_output_tokens), count(*) FILTER (WHERE is_end)
FROM usage_records GROUP BY job_id"""


# Attempts add to a counter what their jobs had not taken when they began, and subtract what they have not taken at
# their end. So without corrections, the counter is too high by what they took, which the ledger knows.
COUNTED = """
SELECT l.tenant_id::text, count(*) FILTER (WHERE status = 'queued'), count(*) FILTER (WHERE status = 'in_progress'),
    coalesce(sum(cost) FILTER (WHERE status = 'queued'), 0),
    coalesce(sum(cost - num_prompt_tokens - num_tokens_at_claim) FILTER (WHERE status = 'in_progress'), 0)
        + (SELECT coalesce(sum(num_output_tokens), 0) FROM usage_records u
            WHERE u.tenant_id = l.tenant_id AND is_attempt), 0
FROM tenant_load l LEFT JOIN jobs j USING (tenant_id) GROUP BY l.tenant_id"""

# After a correction, it is anything from there down to what has not been taken by now. Of the excess no more is known
# than that it is a part of that, so it is shown as 0 where it may be right.
COUNTERS = f"""
SELECT l.tenant_id::text, l.num_queued, l.num_running, l.num_queued_tokens,
    CASE WHEN EXISTS (SELECT FROM running_sums) AND l.num_unused_tokens BETWEEN r.unused AND c.highest
        THEN c.highest ELSE l.num_unused_tokens END,
    CASE WHEN l.num_excess_tokens BETWEEN 0 AND l.num_unused_tokens THEN 0 ELSE l.num_excess_tokens END
FROM tenant_load l JOIN ({COUNTED}) AS c(tenant_id, queued, running, tokens, highest, excess)
    ON c.tenant_id = l.tenant_id::text
CROSS JOIN LATERAL (
    SELECT coalesce(sum(cost - num_prompt_tokens - num_committed_tokens), 0) AS unused FROM jobs j
    WHERE j.tenant_id = l.tenant_id AND j.status = 'in_progress') r"""


def _usage_by_job(connection: "psycopg.Connection[Any]", query: str) -> dict[str, Usage]:
    rows = connection.execute(query.encode())
    return {external_id(id_): Usage(int(prompt), int(output), ends) for id_, prompt, output, ends in rows}


def read_stored(connection: "psycopg.Connection[Any]") -> Stored:
    """Meant for a database at rest."""
    chunks: dict[UUID, dict[int, str]] = {}
    for job_id, number, text in connection.execute(
        "SELECT job_id, sequence_number, chunk->>'text' FROM job_chunks ORDER BY job_id, sequence_number"
    ):
        chunks.setdefault(job_id, {})[number] = text or ""
    results: dict[UUID, str] = {
        job_id: "".join(choice["text"] for choice in result["choices"])
        for job_id, result in connection.execute("SELECT job_id, result FROM job_results")
    }
    jobs, keys = {}, {}
    for job_id, model, status, attempt, num_failures, error_code, committed, key in connection.execute(
        "SELECT id, model, status, attempt, num_failures, error->>'code', committed_sequence_number, idempotency_key"
        " FROM jobs"
    ):
        name = external_id(job_id)
        own_chunks, result = chunks.get(job_id, {}), results.get(job_id)
        jobs[name] = StoredJob(name, model, status, attempt, num_failures, error_code, committed, own_chunks, result)
        keys[name] = key
    return Stored(
        jobs=jobs,
        key_by_id=keys,
        counted={tenant: tuple(map(int, numbers)) for tenant, *numbers in connection.execute(COUNTED)},
        counters={tenant: tuple(map(int, numbers)) for tenant, *numbers in connection.execute(COUNTERS)},
        num_results=len(results),
        used=_usage_by_job(connection, USED),
        recorded=_usage_by_job(connection, RECORDED),
        num_chunks=sum(map(len, chunks.values())),
    )


@dataclass(slots=True)
class Verdict:
    violations: list[Violation] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)

    def num_by_kind(self) -> dict[str, int]:
        return dict(Counter(violation.kind for violation in self.violations))


def judge(histories: Sequence[History], stored: Stored) -> Verdict:
    """Everything that must hold, over all jobs."""
    violations: list[Violation] = []
    for history in histories:
        violations += judge_job(history, stored.jobs.get(history.job_id or ""))
    violations += _judge_totals(histories, stored)
    violations += _judge_ledger(stored)
    for job in stored.jobs.values():
        violations += _judge_stored(job)
    return Verdict(violations, _figures(histories, stored))


def judge_job(history: History, job: StoredJob | None) -> list[Violation]:
    """What its client saw against what SQL holds."""
    if history.job_id is None:
        return []  # never accepted, or its client does not know of it: `_judge_totals` looks for doubles
    if job is None:
        return [Violation("lost", history.job_id, "accepted, and not in SQL")]
    found = [*_judge_connections(history, job), *_judge_refusals(history), *_judge_ends(history, job)]
    return [Violation(kind, job.id, detail) for kind, detail in found]


Finding = tuple[str, str]


def _judge_connections(history: History, job: StoredJob) -> Iterator[Finding]:
    text_by_number: dict[int, str] = {}
    for connection in history.connections:
        yield from _judge_order(connection)
        if connection.snapshot is not None:
            number, text = connection.snapshot
            if text != "".join(job.chunks.get(n, "?") for n in range(1, number + 1)):
                yield "wrong snapshot", f"up to {number}: {text[:80]!r}"
        for delta in connection.deltas:
            text_by_number[delta.number] = delta.text
            if delta.number not in job.chunks:
                yield "uncommitted chunk seen", f"{delta.number} of {job.committed}"
            elif job.chunks[delta.number] != delta.text:
                yield "wrong chunk", f"{delta.number} was {delta.text!r}, SQL has {job.chunks[delta.number]!r}"
        if connection.ended == "terminal" and _reached(connection) < job.committed:
            yield "stream ended early", f"at {_reached(connection)} of {job.committed}"
    if any(connection.ended == "terminal" for connection in history.connections):
        snapshots = [connection.snapshot for connection in history.connections if connection.snapshot is not None]
        covered = max((number for number, _ in snapshots), default=0)
        missing = [n for n in range(1, job.committed + 1) if n not in text_by_number and n > covered]
        if missing:
            yield "missing chunk", f"never seen: {missing[:5]}"
        elif not covered and "".join(text_by_number[n] for n in sorted(text_by_number)) != (job.result or ""):
            yield "stream is not the result", f"{len(text_by_number)} chunks"


def _reached(connection: Connection) -> int:
    before = connection.snapshot[0] if connection.snapshot else connection.cursor
    return connection.deltas[-1].number if connection.deltas else before


def _judge_order(connection: Connection) -> Iterator[Finding]:
    """Within one connection every chunk comes once, in order, without a hole."""
    last = connection.snapshot[0] if connection.snapshot else connection.cursor
    for delta in connection.deltas:
        if delta.number <= last:
            yield "duplicate chunk", f"{delta.number} after {last}"
        elif delta.number > last + 1:
            yield "missing chunk", f"{delta.number} after {last}"
        last = delta.number


def _judge_refusals(history: History) -> Iterator[Finding]:
    for _, status, code in history.refusals:
        if code == "invalid_cursor":
            yield "cursor refused", "a chunk that was seen is not in SQL"
        elif code == "job_not_found":
            yield "lost", "accepted, and then not found"
        elif status not in (429, 503):
            yield "error answer", f"{status} {code}"


def _judge_ends(history: History, job: StoredJob) -> Iterator[Finding]:
    if job.status not in TERMINAL:
        yield "stuck", f"{job.status}, attempt {job.attempt}"
    for view in history.ends_seen:
        if view["status"] != job.status:
            yield "terminal rewritten", f"{view['status']} became {job.status}"
        output = (view["output"] or {}).get("text")
        if output != job.result and not (output in (None, "") and job.result is None):
            yield "wrong result", f"{(output or '')[-40:]!r} but SQL has {(job.result or '')[-40:]!r}"
    if history.accepted_at is not None and not history.ends_seen and job.status in TERMINAL:
        yield "end not seen", f"{job.status} in SQL; the client never heard"


def _judge_stored(job: StoredJob) -> Iterator[Violation]:
    """What SQL holds against itself."""
    text = "".join(job.chunks[number] for number in sorted(job.chunks))
    if sorted(job.chunks) != list(range(1, job.committed + 1)):
        yield Violation("hole in the chunks", job.id, f"{len(job.chunks)} chunks, committed {job.committed}")
    if job.status == "completed" and job.result is None:
        yield Violation("no result", job.id, "completed")
    if job.status in TERMINAL and (job.result or "") != text:
        yield Violation("result is not the chunks", job.id, f"{len(job.result or '')} and {len(text)} characters")
    if CHAINED_TEXT.fullmatch(text) and (place := broken_link(text)) is not None:
        yield Violation("spliced text", job.id, f"at token {place} of attempt {job.attempt}")


def broken_link(text: str) -> int | None:
    """Where a text of the fake back end's chained tokens is not what one attempt after another wrote."""
    before = 0
    for place, word in enumerate(text.split()):
        if int(word, 16) & 0xFFFFFF != before:
            return place
        before = crc32(word.encode(), before) & 0xFFFFFF
    return None


def _judge_totals(histories: Sequence[History], stored: Stored) -> Iterator[Violation]:
    known = {history.key for history in histories}
    by_key: dict[str, list[str]] = {}
    for job_id, key in stored.key_by_id.items():
        if key is not None:
            by_key.setdefault(key, []).append(job_id)
        if key not in known:
            yield Violation("unexpected", job_id, f"nobody submitted {key}")
    for key, job_ids in by_key.items():
        if len(job_ids) > 1:
            yield Violation("accepted twice", job_ids[0], f"{key} is {len(job_ids)} jobs")
    for tenant in stored.counters.keys() | stored.counted.keys():
        counters, counted = stored.counters.get(tenant, NOTHING), stored.counted.get(tenant, NOTHING)
        if counters != counted:
            yield Violation("counter drift", tenant, f"tenant_load says {counters}, the rows {counted}")


def _judge_ledger(stored: Stored) -> Iterator[Violation]:
    """The records of each job add up to its usage, to the token."""
    nothing = Usage(0, 0, 0)
    for job_id, used in stored.used.items():
        if (recorded := stored.recorded.get(job_id, nothing)) != used:
            yield Violation("ledger differs", job_id, f"the ledger has {recorded}, the job {used}")


def _figures(histories: Sequence[History], stored: Stored) -> dict[str, Any]:
    accepted = [history for history in histories if history.job_id is not None]
    connections = [connection for history in accepted for connection in history.connections]
    return {
        "jobs_accepted": len(accepted),
        "jobs_unconfirmed": sum(history.began_at > 0 and history.job_id is None for history in histories),
        "submissions_repeated": sum(history.num_tries - 1 for history in accepted),
        "jobs_by_status": dict(Counter(job.status for job in stored.jobs.values())),
        "failures_by_code": dict(Counter(job.error_code for job in stored.jobs.values() if job.error_code)),
        "results": stored.num_results,
        "chunks": stored.num_chunks,
        "chunks_seen": sum(len(connection.deltas) for connection in connections),
        "attempts": sum(job.attempt for job in stored.jobs.values()),
        "jobs_charged": sum(job.num_failures > 0 for job in stored.jobs.values()),
        "max_attempt": max((job.attempt for job in stored.jobs.values()), default=0),
        "connections": len(connections),
        "min_connections_per_job": min((len(history.connections) for history in accepted), default=0),
    }


def percentiles(seconds: Iterable[float]) -> dict[str, float]:
    """p50, p99 and the largest, rounded; empty for nothing."""
    ordered = sorted(seconds)
    if not ordered:
        return {}
    at = {"p50": 0.5, "p99": 0.99, "max": 1.0}
    return {name: round(ordered[min(len(ordered) - 1, int(share * len(ordered)))], 2) for name, share in at.items()}
