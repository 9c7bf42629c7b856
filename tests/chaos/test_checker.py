"""A clean history passes, and each way of going wrong is told by its name."""

import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from gpu_worker.engine.fake_tokens import chained_token, next_link
from tests.chaos.audit import Change, Owner, figures, judge_changes
from tests.chaos.checker import NOTHING, Counted, Stored, StoredJob, Usage, broken_link, judge
from tests.chaos.clients import Connection, Delta, History
from tests.chaos.faults import Struck
from tests.chaos.plant import Incarnation, Part
from tests.chaos.takeover import times_without

TEXTS = ("one ", "two ", "three ")


def make_run() -> tuple[History, Stored]:
    """One job in three chunks, watched in two connections, and seen to its end."""
    first = Connection("start", 0, 1.0, "api", [Delta(1, "one ", 1.1)], ended="left")
    rest = [Delta(2, "two ", 1.3), Delta(3, "three ", 1.4)]
    second = Connection("last-event-id", 1, 1.2, "api", rest, ended="terminal")
    end = {"id": "job_a", "status": "completed", "output": {"text": "".join(TEXTS)}}
    history = History("key", {}, 1.0, 1, 1.0, "job_a", [first, second], [], [end], 1.5)
    chunks = dict(enumerate(TEXTS, start=1))
    job = StoredJob("job_a", "fake", "completed", 1, 0, None, 3, chunks, "".join(TEXTS))
    counters: dict[str, Counted] = {"tenant": NOTHING}
    stored = Stored({"job_a": job}, {"job_a": "key"}, dict(counters), dict(counters))
    stored.used = {"job_a": Usage(5, 3, 1)}
    stored.recorded = dict(stored.used)
    return history, stored


def test_a_clean_run_has_no_violations() -> None:
    history, stored = make_run()
    verdict = judge([history], stored)
    assert verdict.violations == []
    assert verdict.figures["chunks_seen"] == 3


def _lose(history: History, stored: Stored) -> None:
    stored.jobs.clear()


def _repeat(history: History, stored: Stored) -> None:
    history.connections[1].deltas.insert(1, Delta(2, "two ", 1.35))


def _skip(history: History, stored: Stored) -> None:
    del history.connections[1].deltas[0]


def _swap(history: History, stored: Stored) -> None:
    history.connections[1].deltas.reverse()


def _splice(history: History, stored: Stored) -> None:
    history.connections[0].deltas[0].text = "uno "


def _run_ahead(history: History, stored: Stored) -> None:
    history.connections[1].deltas.append(Delta(4, "four ", 1.5))


def _end_early(history: History, stored: Stored) -> None:
    history.connections[1].deltas.pop()


def _rewrite_end(history: History, stored: Stored) -> None:
    stored.jobs["job_a"] = replace(stored.jobs["job_a"], status="failed")


def _change_result(history: History, stored: Stored) -> None:
    stored.jobs["job_a"] = replace(stored.jobs["job_a"], result="one two ")


def _leave_hole(history: History, stored: Stored) -> None:
    del stored.jobs["job_a"].chunks[2]


def _stick(history: History, stored: Stored) -> None:
    history.ends_seen.clear()
    stored.jobs["job_a"] = replace(stored.jobs["job_a"], status="queued", result=None)


def _refuse_cursor(history: History, stored: Stored) -> None:
    history.refusals.append((1.3, 400, "invalid_cursor"))


def _fail_request(history: History, stored: Stored) -> None:
    history.refusals.append((1.3, 500, "server_error"))


def _accept_twice(history: History, stored: Stored) -> None:
    stored.jobs["job_b"] = replace(stored.jobs["job_a"], id="job_b")
    stored.key_by_id["job_b"] = "key"


def _drift(history: History, stored: Stored) -> None:
    stored.counters["tenant"] = (0, 0, 0, 3, 0)


def _invent(history: History, stored: Stored) -> None:
    stored.key_by_id["job_a"] = "somebody else's"


def _misbill(history: History, stored: Stored) -> None:
    stored.recorded["job_a"] = Usage(5, 4, 1)


def _forget_to_bill(history: History, stored: Stored) -> None:
    stored.recorded.clear()


@pytest.mark.parametrize(
    ("spoil", "kind"),
    [
        (_lose, "lost"),
        (_repeat, "duplicate chunk"),
        (_skip, "missing chunk"),
        (_swap, "missing chunk"),
        (_splice, "wrong chunk"),
        (_run_ahead, "uncommitted chunk seen"),
        (_end_early, "stream ended early"),
        (_rewrite_end, "terminal rewritten"),
        (_change_result, "wrong result"),
        (_leave_hole, "hole in the chunks"),
        (_stick, "stuck"),
        (_refuse_cursor, "cursor refused"),
        (_fail_request, "error answer"),
        (_accept_twice, "accepted twice"),
        (_drift, "counter drift"),
        (_invent, "unexpected"),
        (_misbill, "ledger differs"),
        (_forget_to_bill, "ledger differs"),
    ],
)
def test_a_violation_is_called_by_its_name(spoil: Callable[[History, Stored], None], kind: str) -> None:
    history, stored = make_run()
    spoil(history, stored)
    assert kind in judge([history], stored).num_by_kind()


def chained(*attempts: int) -> str:
    """A text of the fake back end's chained tokens, one token for each attempt named."""
    link, words = 0, []
    for attempt in attempts:
        token = chained_token(attempt, link)
        link = next_link(link, token)
        words.append(f"{token:08x} ")
    return "".join(words)


def test_a_chained_text_of_attempts_in_turn_adds_up_and_a_spliced_one_does_not() -> None:
    text = chained(1, 1, 2, 2, 3)
    assert broken_link(text) is None
    assert broken_link(chained(1, 2) + text[18:]) == 2
    assert broken_link(text[:9] + text[18:]) == 1


def change(old: str, new: str, **fields: Any) -> Change:
    defaults: dict[str, Any] = {
        "at": 1.0,
        "job_id": UUID(int=1),
        "attempt": 1,
        "owner": UUID(int=2),
        "lease_left": None,
    }
    return Change(**(defaults | {"old": old, "new": new, "num_failures": 0, "by": "gpu-1"} | fields))


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ([change("completed", "queued")], "terminal rewritten"),
        ([change("in_progress", "queued", by="maintenance", lease_left=1.2)], "rescued under a valid lease"),
        ([change("queued", "in_progress"), change("queued", "in_progress")], "attempt reused"),
        ([change("in_progress", "queued", by="maintenance", lease_left=-0.6)], None),
        ([change("queued", "in_progress"), change("in_progress", "completed", lease_left=2.0)], None),
    ],
)
def test_changes_of_status_are_judged(changes: list[Change], kind: str | None) -> None:
    assert [violation.kind for violation in judge_changes(changes)] == ([kind] if kind else [])


def test_a_rescue_from_a_well_worker_is_told_with_the_faults_around_it(tmp_path: Path) -> None:
    worker = Part("gpu-1", ["true"], {}, tmp_path / "log", tmp_path)
    done = subprocess.Popen(["true"])
    done.wait()
    worker.incarnations.append(Incarnation(done, started_at=10.0))
    struck = [
        Struck("half-open postgres", "gpu to postgres", 93.0, 94.5),
        Struck("postgres restart", "postgres", 92.0, 93.0),
        Struck("api kill", "api-1", 60.0, 60.0),
        Struck("worker kill", "", 95.0, 95.0),
    ]
    rescue = change("in_progress", "queued", by="maintenance", at=98.0)
    owners = {UUID(int=2): Owner("gpu-1", 11.0)}
    told = figures([rescue], owners, [worker], struck, lease_seconds=3.0)
    assert told["rescues_of_well_workers"] == 1
    assert told["rescues_of_well_workers_after_postgres_restart"] == 1
    assert told["faults_around_them"] == [
        "gpu-1 at 98: half-open postgres of gpu to postgres from -5.0 to -3.5 s; "
        "postgres restart of postgres from -6.0 to -5.0 s"
    ]
    cut_off = Struck("half-open postgres", "gpu to postgres", 94.5, 97.5)
    assert figures([rescue], owners, [worker], [*struck, cut_off], lease_seconds=3.0)["rescues_of_well_workers"] == 0


def test_the_times_without_any_api_are_known(tmp_path: Path) -> None:
    done = subprocess.Popen(["true"])
    done.wait()
    apis = [Part(f"api-{number}", ["true"], {}, tmp_path / "log", tmp_path) for number in (1, 2)]
    apis[0].incarnations.append(Incarnation(done, started_at=0.0, ended_at=20.0))
    apis[1].incarnations.append(Incarnation(done, started_at=18.0))  # its first answer is due three seconds later
    spans = times_without(apis, 10.0, 30.0)
    assert sum(until - since for since, until in spans) == pytest.approx(1.0, abs=0.2)
    assert all(19.9 < since < until < 21.1 for since, until in spans)
