"""What a worker says and does while it cannot reach Redis: one line of advice, and a look whether its servers moved."""

import os
import sys
from collections.abc import Callable
from time import monotonic

from celery.utils.log import get_logger

from observability import describe_exception
from settings import PREFIX, Settings, moved_servers

logger = get_logger(__name__)

PATIENCE_SECONDS = 5.0


class BrokerOutage:
    """Hears of every try to connect. `leave` gives the worker's jobs back; it is called before a new start."""

    def __init__(self, settings: Settings, leave: Callable[[], None]) -> None:
        self._settings = settings
        self._leave = leave
        self._since: float | None = None
        self._is_told = False

    def failed(self, exc: Exception) -> None:
        self._since = self._since or monotonic()
        if monotonic() - self._since < PATIENCE_SECONDS:
            return
        if not self._is_told:
            self._is_told = True
            logger.error(
                "Redis does not answer: %s; start it, name another in CELERIAC_REDIS_URL, or start everything with "
                "`celeriac up`; trying again",
                describe_exception(exc),
            )
        if moved := moved_servers(self._settings.data_dir):
            logger.warning("`celeriac up` runs with other servers now; starting anew with those")
            self._leave()
            os.environ.update({PREFIX + name.upper(): url for name, url in moved.items()})
            os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])  # noqa: S606

    def ended(self) -> None:
        self._since, self._is_told = None, False
