"""What PostgreSQL says when it refuses a connection becomes a reason with a remedy, and tells nobody where it is."""

import pytest
from sqlalchemy.exc import OperationalError

from api.examiner import refusal
from api.reasons import ReasonCode

WHERE = 'connection failed: connection to server at "10.1.2.3", port 5432 failed: '


@pytest.mark.parametrize(
    ("said", "code", "words"),
    [
        ("Connection refused", ReasonCode.DATABASE_UNAVAILABLE, "nothing listens there"),
        ("FATAL:  sorry, too many clients already", ReasonCode.DATABASE_CONNECTIONS, "raise its max_connections"),
        ("FATAL:  the database system is starting up", ReasonCode.DATABASE_UNAVAILABLE, "it is starting"),
        ('FATAL:  password authentication failed for user "x"', ReasonCode.DATABASE_UNAVAILABLE, "refuses our user"),
        ('FATAL:  pg_hba.conf rejects connection for host "10.1.2.3"', ReasonCode.DATABASE_UNAVAILABLE, "our address"),
        ('FATAL:  database "x" does not exist', ReasonCode.DATABASE_UNAVAILABLE, "no such user or database"),
        ("SSL error: certificate verify failed", ReasonCode.DATABASE_UNAVAILABLE, "TLS fails"),
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
