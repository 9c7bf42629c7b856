"""Signals call back, once each, whoever still waits."""

import pytest

from api.signals import Signal


@pytest.mark.anyio
async def test_a_signal_calls_those_who_still_wait_and_those_who_come_later() -> None:
    signal, called = Signal(), list[str]()

    def first() -> None:
        called.append("first")

    def second() -> None:
        called.append("second")
        signal.forget(second)

    signal.call(first)
    signal.call(second)
    assert signal.is_awaited
    signal.forget(first)
    signal.set()
    assert called == ["second"]
    assert not signal.is_awaited
    signal.call(first)
    assert called == ["second", "first"]
    await signal.wait()
