"""What a run comes to: every violation that the checker, the audit and the known answers find, and the figures."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from typing import Any

from tests.chaos import audit, takeover
from tests.chaos.checker import Verdict, Violation, judge, percentiles, read_stored
from tests.chaos.clients import Connection, History
from tests.chaos.faults import Struck
from tests.chaos.plant import Plant
from tests.chaos.stalls import Stall, find_stalls, read_written
from tests.chaos.workload import FAKE_MODEL, POISON_SEED, REAL_MODEL

REAL_WORKER = "gpu-real"
NUM_STALLS_SHOWN = 3


def judge_run(
    plant: Plant,
    histories: Sequence[History],
    struck: Sequence[Struck],
    *,
    lease_seconds: float,
    drawn: "Counter[tuple[str, int]]",
) -> Verdict:
    """Reads the database, which must be at rest. `drawn` are the tokens of the fake engines, by job and attempt."""
    with plant.connect() as connection:
        stored = read_stored(connection)
        changes, owners = audit.read_changes(connection), audit.read_owners(connection)
        untold = audit.judge_webhooks(connection)
        findings = audit.read_findings(connection)
        attempts = audit.read_attempts(connection, FAKE_MODEL)
        stalls = list(find_stalls(histories, read_written(connection)))
    verdict = judge(histories, stored)
    verdict.violations += audit.judge_changes(changes)
    verdict.violations += untold
    verdict.violations += [
        Violation("found by the janitor", name, f"{value:.0f}")
        for name, value in findings.items()
        if value and name in ("load_drift", "orphans")
    ]
    verdict.violations += _judge_known_answers(histories)
    faults = Counter(fault.kind for fault in struck if fault.target)
    away = takeover.times_away(struck) + takeover.times_without(
        plant.apis, min(fault.began_at for fault in struck), max(fault.ended_at for fault in struck)
    )
    # A job of the real model waits for its only worker to come back; takeovers are about the model that several serve.
    shared = [part for part in plant.workers if part.name != REAL_WORKER]
    verdict.figures = {
        "num_faults": sum(faults.values()),
        "faults": dict(sorted(faults.items())),
        **verdict.figures,
        **_figures_of_poison(histories, attempts),
        **_figures_of_tokens(drawn, attempts),
        **audit.figures(changes, owners, plant.workers, struck, lease_seconds=lease_seconds),
        **takeover.figures(changes, owners, shared, plant.maintenance, struck),
        "maintenance_findings": findings,
        "stall_seconds_after_a_cut": {
            "num": len(stalls),
            "raw": percentiles(stall.raw for stall in stalls),
            "ours": percentiles(stall.ours(away) for stall in stalls),
            "longest": list(_describe(stalls, away)),
        },
        "processes_started": sum(len(part.incarnations) for part in plant.parts),
        "errors_in_logs": dict(_errors_in_logs(part.log() for part in plant.parts).most_common()),
    }
    return verdict


#: A line of an error by its logger and how it begins, or of what ended an interpreter without one.
ERROR = re.compile(r"^\S+ \S+ (?:ERROR|CRITICAL) +(\S+: .{1,30})|^(Traceback) \(most recent", re.MULTILINE)


def _errors_in_logs(logs: Iterable[str]) -> "Counter[str]":
    found = (match[1] or match[2] for log in logs for match in ERROR.finditer(log))
    return Counter(re.sub(r"[0-9a-f-]{6,}|[0-9]+", "..", words) for words in found)


def _describe(stalls: Sequence[Stall], away: Sequence[tuple[float, float]]) -> Iterator[str]:
    """The longest of ours: where to look in the logs."""
    for stall in sorted(stalls, key=lambda stall: stall.ours(away), reverse=True)[:NUM_STALLS_SHOWN]:
        clock = datetime.fromtimestamp(stall.cut_at, UTC).strftime("%H:%M:%S.%f")[:-3]
        tries = "; ".join(_describe_way_back(way, stall.cut_at) for way in stall.ways_back)
        yield f"{stall.ours(away):.1f} of {stall.raw:.1f} s, cut at {clock}: {stall.job_id} ({tries})"


def _describe_way_back(way: Connection, cut_at: float) -> str:
    return f"{way.how} {way.url[-5:]} from {way.opened_at - cut_at:.1f} to {way.ended_at - cut_at:.1f} s, {way.ended}"


def _judge_known_answers(histories: Sequence[History]) -> Iterator[Violation]:
    """What must come out is known of greedy jobs (the same text for the same prompt) and of poison (a failure)."""
    text_by_prompt: dict[tuple[str, int], str] = {}
    for history in histories:
        end, params = history.end, history.body["params"]
        if end is None:
            continue
        if params["seed"] == POISON_SEED and end["status"] == "completed":
            yield Violation("poison completed", end["id"], "it cannot have run")
        if params["seed"] != POISON_SEED and end["status"] == "failed":
            yield Violation("innocent failed", end["id"], f"{end['error']}, attempt {end['attempt']}")
        if history.body["model"] == REAL_MODEL and end["status"] == "completed":
            text = end["output"]["text"]
            known = text_by_prompt.setdefault((history.body["prompt"], params["max_tokens"]), text)
            if known != text:
                yield Violation("greedy text differs", end["id"], f"{known!r} {text!r}")


def _figures_of_poison(histories: Sequence[History], attempts: Sequence[tuple[str, int, str, int]]) -> dict[str, Any]:
    poison = {history.job_id for history in histories if history.body["params"]["seed"] == POISON_SEED}
    crashes = Counter(job_id for job_id, _, outcome, _ in attempts if job_id in poison and outcome == "crashed")
    return {"poison_jobs": len(crashes), "max_poison_crashes": max(crashes.values(), default=0)}


def _figures_of_tokens(
    drawn: "Counter[tuple[str, int]]", attempts: Sequence[tuple[str, int, str, int]]
) -> dict[str, Any]:
    """Those drawn and not committed were drawn again by the next attempt, or came after a job's end."""
    num_drawn, num_committed = drawn.total(), sum(num_tokens for *_, num_tokens in attempts)
    wasted = Counter[str]()
    for job_id, number, outcome, num_tokens in attempts:
        wasted[outcome] += drawn[job_id, number] - num_tokens
    return {
        "tokens_drawn": num_drawn,
        "tokens_committed": num_committed,
        "tokens_wasted_share": round((num_drawn - num_committed) / max(num_drawn, 1), 5),
        "tokens_wasted_by_outcome": dict(wasted.most_common()),
    }
