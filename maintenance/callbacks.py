"""Publishes Celery callbacks: the messages that continue clients' tasks when their jobs have ended."""

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from uuid import UUID

from kombu import Connection

from domain.callbacks import CeleryCallback
from domain.jobs import external_id
from observability import describe_exception
from settings import Settings
from tasks.webhook_http import WebhookResponse

CONNECT_SECONDS = 5.0
PUBLISHED, GONE = 202, 410  # as an HTTP receiver would answer


class CallbackPublisher:
    """One connection to the clients' broker, on a thread of its own."""

    def __init__(self, settings: Settings) -> None:
        self._broker_url = settings.callback_broker_url
        self._connection: Connection | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="callbacks")

    async def publish(
        self, callback: CeleryCallback | None, job_id: UUID, traceparent: str | None = None
    ) -> WebhookResponse:
        """`callback` is None if the job was deleted. `traceparent` is that of the job."""
        if callback is None:
            return WebhookResponse(GONE, "the job was deleted", 0.0)
        if self._broker_url is None:
            return WebhookResponse(None, "callbacks are off; set CELERIAC_CALLBACK_BROKER_URL for maintenance", 0.0)
        began = time.monotonic()
        loop = asyncio.get_running_loop()
        error = await loop.run_in_executor(self._thread, self._publish, callback, external_id(job_id), traceparent)
        return WebhookResponse(PUBLISHED if error is None else None, error, time.monotonic() - began)

    async def aclose(self) -> None:
        await asyncio.get_running_loop().run_in_executor(self._thread, self._disconnect)
        self._thread.shutdown()

    def _publish(self, callback: CeleryCallback, job_id: str, traceparent: str | None) -> str | None:
        """Returns why it could not be published."""
        body, headers = callback.message(job_id)
        if traceparent is not None:
            headers = {"traceparent": traceparent} | headers  # that of the client's own task, if it is traced
        try:
            connection = self._connection = self._connection or Connection(
                self._broker_url, transport_options={"socket_timeout": CONNECT_SECONDS, "max_retries": 0}
            )
            connection.ensure_connection(max_retries=1, timeout=CONNECT_SECONDS)
            # To the default exchange, where the routing key is the queue.
            connection.default_channel  # noqa: B018  (opens it)
            connection.Producer(serializer="json").publish(
                body,
                routing_key=callback.queue,
                headers=headers,
                correlation_id=callback.task_id,
                **({"reply_to": callback.reply_to} if callback.reply_to else {}),
                **({"priority": callback.priority} if callback.priority is not None else {}),
            )
        except Exception as exc:  # the errors of the transports and their libraries have no common base
            self._disconnect()
            return f"the broker does not answer: {describe_exception(exc)}"
        return None

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.release()
