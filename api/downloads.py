"""Downloads of files: held to the places of their tenant, and cut if the client stops reading."""

import asyncio
from collections.abc import AsyncIterator, Mapping

from starlette.responses import StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from api.limits import RequestPlaces
from api.sse import (
    SEND_TIMEOUT_SECONDS,
)


class Download(StreamingResponse):
    """Check `places.refuse_if_full()` before anything else, too, so that a refusal costs no query."""

    def __init__(
        self, content: AsyncIterator[bytes], places: RequestPlaces, *, headers: Mapping[str, str], media_type: str
    ) -> None:
        """Raises ServerOverloaded: of the requests that looked up their files together, each found places free."""
        places.refuse_if_full()
        super().__init__(content, headers=headers, media_type=media_type)
        self._places = places

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_in_time(message: Message) -> None:
            async with asyncio.timeout(SEND_TIMEOUT_SECONDS):
                await send(message)

        with self._places.hold():
            await super().__call__(scope, receive, send_in_time)
