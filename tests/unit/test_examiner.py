"""What PostgreSQL says when it refuses a connection becomes a reason with a remedy, and tells nobody where it is."""

import pytest
from sqlalchemy.exc import OperationalError

from api.examiner import refusal
from api.reasons import ReasonCode, silent_process_reasons, silent_worker_reasons, told_reasons
from domain.troubles import WORDS, Trouble
from settings import ROOT
from storage.troubles import SilentProcess, SilentWorker, Told

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
