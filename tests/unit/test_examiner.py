"""What PostgreSQL says when it refuses a connection becomes a reason with a remedy, and tells nobody where it is. What
was seen is as old as the beginning of the look."""

import asyncio
import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, cast
from uuid import uuid4

import pytest
from sqlalchemy.exc import OperationalError

from api.examiner import Examiner, refusal
from api.reasons import FATAL, Reason, ReasonCode, silent_process_reasons, silent_worker_reasons, told_reasons
from domain.troubles import WORDS, Trouble
from settings import ROOT
from storage.processes import ProcessKind, ProcessReport
from storage.troubles import ServerState, SilentProcess, SilentWorker, Told
from tests.waiting import wait_until_async

WHERE = 'connection failed: connection to server at "10.1.2.3", port 5432 failed: '


@pytest.mark.parametrize(
    ("said", "code", "words"),
    [
        ("Connection refused", ReasonCode.DATABASE_UNAVAILABLE, "nothing listens there"),
        ("FATAL:  sorry, too many clients already", ReasonCode.DATABASE_CONNECTIONS, "raise its max_connections"),
        ("FATAL:  the database system is starting up", ReasonCode.DATABASE_UNAVAILABLE, "it is starting"),
        ("fe_sendauth: no password supplied", ReasonCode.DATABASE_UNAVAILABLE, "refuses our user"),
        ('FATAL:  password authentication failed for user "x"', ReasonCode.DATABASE_UNAVAILABLE, "refuses our user"),
        ('FATAL:  pg_hba.conf rejects connection for host "10.1.2.3"', ReasonCode.DATABASE_UNAVAILABLE, "our address"),
        ('FATAL:  database "x" does not exist', ReasonCode.DATABASE_UNAVAILABLE, "no such database"),
        ('FATAL:  role "x" does not exist', ReasonCode.DATABASE_UNAVAILABLE, "no such user"),
        ("SSL connection has been closed unexpectedly", ReasonCode.DATABASE_UNAVAILABLE, "it ended or is cut off"),
        ("SSL error: certificate verify failed", ReasonCode.DATABASE_UNAVAILABLE, "TLS fails"),
        (
            "failed to resolve host 'db.here': [Errno -2] Name or service not known",
            ReasonCode.DATABASE_UNAVAILABLE,
            "its name is not known",
        ),
        ("something new", ReasonCode.DATABASE_UNAVAILABLE, "hangs or is cut off"),
    ],
)
def test_a_refusal_is_a_reason(said: str, code: ReasonCode, words: str) -> None:
    reason = refusal(OperationalError("SELECT 1", None, Exception(WHERE + said)))
    assert reason.code is code
    assert words in reason.sentence
    assert "10.1.2.3" not in reason.sentence


def test_a_database_that_does_not_answer_in_time_is_one_that_hangs() -> None:
    assert "does not answer within 2 s" in refusal(TimeoutError()).sentence


def test_processes_that_are_silent_or_troubled_are_counted_and_not_named() -> None:
    silent = [SilentProcess("api", "api 1 on host", 11.0), SilentProcess("api", "api 2 on host", 12.0)]
    [reason] = silent_process_reasons(silent)
    assert (reason.code, reason.sentence[:32]) == (ReasonCode.PROCESS_SILENT, "an API is silent (for 11 s, for ")
    assert "host" not in reason.sentence
    told = [Told("worker", name, "m", "process_redis", "words") for name in ("w1", "w2")]
    assert [reason.code for reason in told_reasons(told, set())] == [ReasonCode.PROCESS_REDIS]
    assert list(told_reasons(told, {ReasonCode.REDIS_UNAVAILABLE})) == [], "which is everybody's trouble"
    slow = [Told("worker", "w1", "m", "process_database", "words")]
    assert [reason.code for reason in told_reasons(slow, set())] == [ReasonCode.PROCESS_DATABASE]
    assert list(told_reasons(slow, {ReasonCode.DATABASE_SLOW})) == [], "also this"


def test_of_many_silent_workers_the_first_are_told() -> None:
    silent = [SilentWorker(f"gpu-{number}", f"m{number}", 20.0) for number in range(50)]
    [reason] = silent_worker_reasons(silent)
    assert (
        "(of m0 for 20 s, of m1 for 20 s, of m2 for 20 s, of m3 for 20 s, of m4 for 20 s and 45 more)"
        in reason.sentence
    )
    [reason] = silent_worker_reasons(silent[:5])
    assert "more" not in reason.sentence


def test_every_trouble_has_words_and_a_code_of_the_metric() -> None:
    assert WORDS.keys() == set(Trouble)
    assert {trouble.value for trouble in Trouble} <= {code.value for code in ReasonCode}


def test_the_runbook_has_every_code() -> None:
    runbook = (ROOT / "docs/runbooks.md").read_text()
    assert [code for code in ReasonCode if f"`{code.value}`" not in runbook] == []


class Looks(Examiner):
    """Its questions are counted. Once it `hangs`, PostgreSQL answers none of them."""

    def __init__(self) -> None:
        async def none() -> list[Reason]:
            return []

        redis: Any = SimpleNamespace(reasons=none, servers=[])
        report = ProcessReport(uuid4(), ProcessKind.API, "api 1 on host", "1")
        super().__init__(cast(Any, None), redis, lambda seen: iter(()), report)
        self.asked: list[str] = []
        self.hangs_after: str | None = None
        self.may_answer = asyncio.Event()
        self.may_answer.set()

    async def _ask(self, function: Callable[..., Any], *args: Any) -> Any:
        self.asked.append(function.__name__)
        await self.may_answer.wait()
        if self.hangs_after in self.asked[:-1]:
            raise TimeoutError
        if function.__name__ == "server_state":
            return ServerState(time.time(), is_standby=False, num_connections=1, max_connections=100, num_reserved=3)
        return []


async def codes_of(looks: Looks, **options: float) -> Sequence[ReasonCode]:
    return [reason.code for reason in (await looks.look(**options)).reasons]


def test_a_hang_that_begins_during_a_look_is_told_by_that_look() -> None:
    async def look(after: str) -> None:
        looks = Looks()
        assert await codes_of(looks, max_age_seconds=0.0) == []
        assert after in looks.asked
        looks.asked.clear()
        looks.hangs_after = after
        looks._written_at = looks._certificates_due_at = float("-inf")
        looks._was_away_at = float("-inf")
        assert await codes_of(looks, max_age_seconds=0.0) == [ReasonCode.DATABASE_UNAVAILABLE]
        assert looks.asked[-1] == "_nothing"
        assert len(looks.asked) - looks.asked.index(after) <= 4, "each question takes seconds"
        assert ReasonCode.DATABASE_UNAVAILABLE in FATAL

    for after in ("server_state", "blockers", "_beat"):
        asyncio.run(look(after))


def test_what_was_seen_is_as_old_as_the_beginning_of_the_look() -> None:
    async def look() -> None:
        looks = Looks()
        looks.may_answer.clear()
        slow = asyncio.create_task(looks.look(max_age_seconds=60.0))
        await wait_until_async(lambda: bool(looks.asked))
        late = asyncio.create_task(looks.look(max_age_seconds=0.0))  # it asks after the look has begun
        patient = asyncio.create_task(looks.look(max_age_seconds=60.0))
        looks.may_answer.set()
        await asyncio.gather(slow, late, patient)
        assert looks.asked.count("server_state") == 2

    asyncio.run(look())
