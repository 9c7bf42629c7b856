"""Between the Celery side and the engine: claims deliveries, feeds the engine, and owns the threads that talk to SQL.

Nothing here runs on Celery's hub thread except the small thread-safe calls of `JobRunner`; the work is done in
gpu_worker/runner_loop.py.
"""

from collections.abc import Callable
from threading import Thread
from uuid import UUID

from domain.catalog import Catalog
from gpu_worker.intake import Offers
from gpu_worker.runner_events import RunnerEvent, RunnerStats, WorkerFailure
from gpu_worker.runner_loop import RunnerLoop
from settings import Settings, get_settings
from tasks.models import complete


class JobRunner:
    """One engine, one thread. Every method is thread-safe and returns at once; news comes through `on_event`, which is
    called on the runner's thread, in order. `on_unhealthy` is called once, when the engine cannot be kept alive: the
    jobs are released by then, and the process should end."""

    def __init__(
        self,
        *,
        model: str,
        owner: UUID,
        hostname: str,
        on_event: Callable[[RunnerEvent], None],
        on_unhealthy: Callable[[WorkerFailure], None] | None = None,
        settings: Settings | None = None,
    ) -> None:
        settings = settings or get_settings()
        self._offers = Offers()
        self._loop = RunnerLoop(
            spec=complete(Catalog.load(settings.models_file).get(model)),
            settings=settings,
            owner=owner,
            hostname=hostname,
            offers=self._offers,
            on_event=on_event,
            on_unhealthy=on_unhealthy or (lambda failure: None),
        )
        self._thread = Thread(target=self._loop.run, name="job-runner", daemon=True)

    def start(self) -> None:
        """Start the engine process and the thread."""
        self._thread.start()

    def offer(self, job_id: UUID) -> None:
        """A delivery in hand. It is claimed, with all others that fit, as soon as the engine has room."""
        self._offers.add(job_id)
        self._loop.mailbox.post(lambda: None)

    def withdraw(self) -> list[UUID]:
        """Take back every offered, unclaimed job, in order of arrival; no event follows for them."""
        return self._offers.take()

    def cancel(self, job_id: UUID) -> None:
        """Stop a running or offered job: the flag goes to SQL, so whoever owns it sees it; our engine hears at once."""
        self._loop.mailbox.post(lambda: self._loop.cancel(job_id))

    def begin_drain(self, *, release_after_seconds: float) -> None:
        """Claim nothing more; let running jobs end; release what still runs after the time given."""
        self._loop.mailbox.post(lambda: self._loop.begin_drain(release_after_seconds))

    def order_drain(self, *, release_after_seconds: float) -> None:
        """As `begin_drain`, written down for the worker's name: it outlives the process, until `order_resume`."""
        self._loop.mailbox.post(lambda: self._loop.order_drain(release_after_seconds))

    def order_resume(self) -> None:
        """Take back `order_drain`, whoever gave it."""
        self._loop.mailbox.post(self._loop.order_resume)

    def stop(self, *, release: bool) -> None:
        """End the thread and the engine process; with `release`, running jobs go back to the queue first. Blocks."""
        if not self._thread.is_alive():
            return
        self._loop.mailbox.post(lambda: self._loop.stop(release))
        self._thread.join()

    @property
    def num_free(self) -> int:
        """Sequences the engine could take now, beyond those claimed. 0 while it is not ready or draining."""
        return self._loop.num_free

    def stats(self) -> RunnerStats:
        return self._loop.stats
