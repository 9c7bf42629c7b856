"""The text of a stream token: what is read from it, and what its signature covers."""

import time
from uuid import UUID, uuid4

import pytest

from domain.jobs import external_id
from domain.stream_tokens import NO_KEY, StreamToken

JOB, KEY = UUID(int=5), UUID(int=7)


def token(**fields: object) -> StreamToken:
    return StreamToken(**{"key_id": "abcD1234", "job_id": JOB, "expires_at": 2_000_000_000, **fields})  # type: ignore[arg-type]


def test_what_is_signed_is_read_again_and_only_with_its_key() -> None:
    for key_id in ("abcD1234", NO_KEY):
        read = StreamToken.read(token(key_id=key_id).signed(KEY))
        assert (read.key_id, read.job_id, read.expires_at) == (key_id, JOB, 2_000_000_000)
        assert read.is_signed_with(KEY)
        assert not read.is_signed_with(uuid4())


@pytest.mark.parametrize(
    "change", [{"key_id": "abcD1235"}, {"job_id": UUID(int=6)}, {"expires_at": 2_000_000_001}], ids=str
)
def test_every_part_is_signed(change: dict[str, object]) -> None:
    signature = token().signed(KEY).rpartition(".")[2]
    assert not token(**change, signature=signature).is_signed_with(KEY)


@pytest.mark.parametrize(
    "text",
    [
        *("", "st", "sk_abc_def", "st.a.b.c.d", "st." + "a" * 5000),
        *(f"st.a.{external_id(JOB)}.{expiry}.{'x' * 43}" for expiry in ("٣٣", "-5", "0", "1" * 20)),
        *(token().signed(KEY) + end for end in ("x", "\n", "=")),
    ],
)
def test_anything_else_is_no_token_and_is_not_repeated(text: str) -> None:
    with pytest.raises(ValueError, match="has the form") as caught:
        StreamToken.read(text)
    assert len(text) < 9 or text not in str(caught.value)


def test_a_token_expires(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", lambda: 2_000_000_000.0)
    assert token().is_expired
    assert not token(expires_at=2_000_000_001).is_expired
