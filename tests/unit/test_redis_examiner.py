"""What the client says of Redis becomes a reason with a remedy, and tells nobody where it is."""

import asyncio

import pytest
from redis.exceptions import ConnectionError as RedisConnectionError

from api.reasons import ReasonCode
from api.redis_examiner import RedisExaminer, eviction_reasons, outage


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


@pytest.mark.anyio
async def test_one_that_was_slow_and_then_answers_no_more_in_time_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("api.redis_examiner.SLOW_SECONDS", 0.0)  # so that the first answer is slow
    writes: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := await reader.readline():
            words = line.strip()
            writes.extend([words] if words == b"SET" else [])
            if words == b"HELLO":
                writer.write(b"%1\r\n+proto\r\n:3\r\n")
            elif words == b"CLIENT" or (words == b"SET" and len(writes) == 1):
                writer.write(b"+OK\r\n")
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        examiner = RedisExaminer(f"redis://127.0.0.1:{port}/0")
        [reason] = await examiner.reasons()
        await examiner.close()
    assert (reason.code, len(writes)) == (ReasonCode.REDIS_SLOW, 2)
