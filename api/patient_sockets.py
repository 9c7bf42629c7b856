"""WebSockets that a stopping server does not cut off."""

from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol


class PatientSocket(WebSocketsSansIOProtocol):
    """One connection. uvicorn closes it on SIGTERM before the application hears of that; here the application does,
    once what runs on it is done or has had its time, and tells the client why."""

    def shutdown(self) -> None:
        if not self.handshake_complete or self.close_sent:
            super().shutdown()
