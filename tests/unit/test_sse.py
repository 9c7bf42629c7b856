"""Frames: no text can end one early or forge a field, and any decoder reads back what was sent."""

import asyncio
import gc
import json
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from api.limits import StreamPlaces
from api.signals import Signal
from api.sse import (
    HEARTBEAT,
    EventStream,
    frame,
)
from celeriac.client.protocol import parse_events

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
hostile = st.sampled_from(
    ["\n\nevent: forged\ndata: {}\n\n", "\r\r", "\u2028\u2029\x85", "\x0b\x0c\x1c\x1d\x1e", "data:"]
)


@given(text=texts | hostile, id_=st.none() | st.integers(1, 10**6))
def test_whatever_the_text_the_frame_is_one_event_that_holds_it(text: str, id_: int | None) -> None:
    sent = frame("output.delta", {"text": text}, id=id_) + HEARTBEAT + frame("job.completed", {"id": "x"})
    for lines in (sent.decode().split("\n"), sent.decode().splitlines()):
        first, last = parse_events([*lines, ""])
        assert (first.name, first.data, first.id) == ("output.delta", {"text": text}, None if id_ is None else str(id_))
        assert (last.name, last.data) == ("job.completed", {"id": "x"})


def test_a_frame_is_plain_to_read() -> None:
    data = {"index": 0, "text": "é"}
    assert frame("output.delta", data, id=7) == b'id: 7\nevent: output.delta\ndata: {"index":0,"text":"\xc3\xa9"}\n\n'
    assert json.loads(frame("job.queued", data).split(b"data: ")[1]) == data


@pytest.mark.anyio
async def test_a_client_that_leaves_at_the_very_end_leaves_no_error_behind() -> None:
    complaints: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, complaint: complaints.append(complaint))

    has_ended = asyncio.Event()

    async def one_frame() -> AsyncGenerator[bytes, None]:
        yield HEARTBEAT
        has_ended.set()  # the client leaves in the same turn of the loop in which the frames end

    async def receive() -> dict[str, Any]:
        await has_ended.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        await asyncio.sleep(0)

    slots, draining = StreamPlaces(1, is_shared=False), Signal()
    stream = EventStream(one_frame(), heartbeat_seconds=1, lifetime_seconds=9, slots=slots, draining=draining)
    await stream({"type": "http", "state": {"revocation": Signal}}, receive, send)
    gc.collect()
    assert complaints == []
    assert slots.num_taken == 0
