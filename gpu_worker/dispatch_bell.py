"""Asks for a dispatch when room was made, off everybody's critical path: one thread, at most fifty times a second."""

import logging
from threading import Event, Thread

import redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session, sessionmaker

from domain.catalog import ModelSpec
from observability import describe_exception
from settings import Settings
from tasks.dispatch import dispatch

logger = logging.getLogger(__name__)

PAUSE_SECONDS = 0.02
PAUSE_AFTER_FAILURE_SECONDS = 1.0  # the janitor dispatches every second anyway
REDIS_TIMEOUT_SECONDS = 0.2


class DispatchBell:
    """`ring` from any thread; rings during a dispatch become one more after it."""

    def __init__(self, sessions: sessionmaker[Session], spec: ModelSpec, settings: Settings) -> None:
        self._sessions = sessions
        self._spec = spec
        self._settings = settings
        self._client = redis.Redis.from_url(
            settings.redis_url,
            socket_timeout=REDIS_TIMEOUT_SECONDS,
            socket_connect_timeout=REDIS_TIMEOUT_SECONDS,
            retry=Retry(NoBackoff(), 0),
        )
        self._rung = Event()
        self._stopping = Event()
        self._thread = Thread(target=self._run, name="dispatch-bell", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def ring(self) -> None:
        self._rung.set()

    def stop(self) -> None:
        """Returns at once; a dispatch under way may end later."""
        self._stopping.set()
        self._rung.set()

    def _run(self) -> None:
        while self._rung.wait() and not self._stopping.is_set():
            self._rung.clear()
            self._stopping.wait(PAUSE_SECONDS if self._dispatch() else PAUSE_AFTER_FAILURE_SECONDS)
        self._client.close()

    def _dispatch(self) -> bool:
        try:
            dispatch(self._sessions, self._client, self._spec, self._settings)
        except (RedisError, SQLAlchemyError, OSError) as exc:
            logger.warning("dispatch failed, left to the janitor: %s", describe_exception(exc))
            return False
        return True
