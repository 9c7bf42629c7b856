"""What the client says of Redis becomes a reason with a remedy, and tells nobody where it is."""

import pytest
from redis.exceptions import ConnectionError as RedisConnectionError

from api.reasons import ReasonCode
from api.redis_examiner import eviction_reasons, outage


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("Error 111 connecting to 10.1.2.3:6379. Connect call failed ('10.1.2.3', 6379).", "nothing listens there"),
        ("Error -2 connecting to 10.1.2.3:6379. Name or service not known.", "its name is not known"),
        ("max number of clients reached", "its maxclients are in use"),
        ("Redis is loading the dataset in memory", "it is reading its data"),
        ("[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: certificate has expired", "TLS fails"),
        ("Timeout reading from 10.1.2.3:6379", "does not answer within 2 s"),
    ],
)
def test_an_outage_is_a_reason(said: str, words: str) -> None:
    reason = outage(RedisConnectionError(said))
    assert reason.code is ReasonCode.REDIS_UNAVAILABLE
    assert words in reason.sentence
    assert "10.1.2.3" not in reason.sentence


def test_a_policy_matters_where_there_is_a_limit() -> None:
    [reason] = eviction_reasons({"maxmemory": 1, "maxmemory_policy": "volatile-lru"})
    assert (reason.code, "volatile-lru" in reason.sentence) == (ReasonCode.REDIS_EVICTS, True)
    assert list(eviction_reasons({"maxmemory": 0, "maxmemory_policy": "volatile-lru"})) == []
    assert list(eviction_reasons({"maxmemory": 1, "maxmemory_policy": "noeviction"})) == []
    assert list(eviction_reasons({})) == [], "it may not be asked"
