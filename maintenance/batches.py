"""What maintenance does for batches: read the file, feed its lines as jobs, see them end, freeze what came of them.

Every step is a transaction under the lock of the batch's row, so any number of processes may take them, and one that is
killed in the midst of a step has not taken it. A line's job is accepted in the step that notes it at the line: nothing
is fed twice, and nothing forgotten.
"""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import replace
from time import monotonic
from uuid import UUID

from sqlalchemy.orm import Session, sessionmaker

from domain.batches import BatchStatus, LineOutcome
from domain.errors import CeleriacError, Overloaded
from domain.ids import external_id
from domain.jobs import BATCH_PRIORITY
from maintenance.batch_validation import BatchValidation
from observability import describe_exception
from settings import Settings
from storage import batch_lines, batches, files, jobs, jobs_accept, tenants
from storage.batch_tables import Batch, BatchLine
from storage.database import OUTAGES, allow_idle
from storage.jobs_accept import AcceptOutcome, NewJob
from tasks.batch_files import read_ended, write_lines
from tasks.batch_surface import BatchSurface, LineRequest
from tasks.job_options import JobOptions
from tasks.models import ModelViews
from tasks.settler import Settler
from tasks.submit import make_job

logger = logging.getLogger(__name__)

BYTES_PER_FEED = 16_777_216  # of lines
FEED_SECONDS = 2.0  # then what is ready is accepted: the batch and its lock wait no longer
TURN_SECONDS = 2.0  # for one batch, then the next one has its turn
UNTIL_FROZEN_SECONDS = 315_360_000  # ten years: results are kept until their batch lets them go


class BatchWork:
    """One per process; its ticks never overlap."""

    def __init__(
        self,
        sessions: sessionmaker[Session],
        views: ModelViews,
        settings: Settings,
        surface: BatchSurface,
        *,
        on_turn: Callable[[], None] = lambda: None,
    ) -> None:
        """`on_turn` is called whenever the database has said which batches there are, and after each of their turns."""
        self._sessions = sessions
        self._views = views
        self._settings = settings
        self._surface = surface
        self._validation = BatchValidation(views, surface)
        self._on_turn = on_turn
        self._settler = Settler(views)
        self._loop = asyncio.new_event_loop()  # the settler's; it turns only within a step

    def tick(self) -> None:
        """Take every unfinished batch as far as it can go now."""
        batch_ids = self._unfinished_ids()
        if batch_ids is None:
            return
        self._on_turn()
        for batch_id in batch_ids:
            self._advance(batch_id)
            self._on_turn()

    def _unfinished_ids(self) -> list[UUID] | None:
        """None: the database does not answer."""
        try:
            with self._sessions() as session:
                return batches.unfinished_ids(session)
        except OUTAGES as exc:
            logger.warning("batches wait for the database: %s", describe_exception(exc))
            return None

    def _advance(self, batch_id: UUID) -> None:
        until = monotonic() + TURN_SECONDS
        try:
            while self.step(batch_id) and monotonic() < until:
                pass
        except Exception as exc:  # an outermost loop: the other batches must go on
            logger.warning(
                "a batch could not go on, will try again: %s",
                describe_exception(exc),
                extra={"batch_id": external_id(batch_id, "batch")},
            )

    def step(self, batch_id: UUID) -> bool:
        """One transaction's worth. True where the next step need not wait for anybody."""
        step_by_status: dict[BatchStatus, Callable[[Session, Batch], bool]] = {
            BatchStatus.VALIDATING: self._validation.step,
            BatchStatus.IN_PROGRESS: self._run,
            BatchStatus.CANCELLING: self._stop,
            BatchStatus.FINALIZING: self._freeze,
        }
        with self._sessions.begin() as session:
            batch = batches.lock(session, batch_id)
            return batch is not None and step_by_status[batch.status](session, batch)

    # Running

    def _run(self, session: Session, batch: Batch) -> bool:
        batch_lines.settle(session, batch)
        if batch.expires_at <= batches.now(session):
            batch.expired_at = batch.expired_at or batches.now(session)
            batch_lines.end_waiting(session, batch, LineOutcome.EXPIRED)
        else:
            self._feed(session, batch)
        return self._finish_if_done(session, batch)

    def _stop(self, session: Session, batch: Batch) -> bool:
        """A cancelled batch: nothing more is fed, what runs is asked to stop."""
        batch_lines.settle(session, batch)
        batch_lines.end_waiting(session, batch, LineOutcome.CANCELLED)
        jobs.request_cancel(session, batch_lines.in_flight_job_ids(session, batch.id))
        if batch.in_progress_at is None:
            batches.end(session, batch, job_ttl_seconds=self._settings.result_ttl_seconds)
            return True
        return self._is_done(batch) and self._freeze(session, batch)

    def _finish_if_done(self, session: Session, batch: Batch) -> bool:
        if not self._is_done(batch):
            return False
        batch.status, batch.finalizing_at = BatchStatus.FINALIZING, batches.now(session)
        return True

    def _is_done(self, batch: Batch) -> bool:
        return batch.num_completed + batch.num_failed >= batch.num_lines

    def _feed(self, session: Session, batch: Batch) -> None:
        """Make jobs of the next lines, as many as the tenant may have under way. Accepted last: until the commit behind
        it, the tenant's other submissions wait."""
        num_wanted = self._num_wanted(session, batch)
        waiting = batch_lines.waiting_lines(session, batch.id, limit=num_wanted, max_bytes=BYTES_PER_FEED)
        if not waiting:
            return
        ranges = [(line.first_byte, line.num_bytes) for line in waiting]
        new_jobs: dict[int, NewJob] = {}
        until = monotonic() + FEED_SECONDS
        for line, content in zip(waiting, files.read_ranges(session, batch.input_file_id, ranges), strict=True):
            if monotonic() > until:
                break  # the others come with the next step
            try:
                new_jobs[line.line] = self._job_of(batch, line, content)
            except Overloaded:
                break
            except CeleriacError as exc:
                batch_lines.refuse(batch, line, self._surface.refusal_of(exc))
        # Of one wave, whose jobs are equally old, the ids say who is first.
        ordered = sorted(new_job.id for new_job in new_jobs.values())
        new_jobs = {line: replace(job, id=id_) for (line, job), id_ in zip(new_jobs.items(), ordered, strict=True)}
        session.flush()
        allow_idle(session, self._settings.idle_transaction_seconds)
        accepted = jobs_accept.accept(session, list(new_jobs.values()), max_queued_jobs=self._settings.max_queued_jobs)
        taken = {
            line: (answer.job_id, new_job.num_sequences)
            for (line, new_job), answer in zip(new_jobs.items(), accepted, strict=True)
            if answer.outcome in (AcceptOutcome.ACCEPTED, AcceptOutcome.DUPLICATE)
        }
        batch_lines.attach(session, batch, taken)

    def _num_wanted(self, session: Session, batch: Batch) -> int:
        """A quarter of the tenant's queue at most: the rest is for its own requests."""
        tenant = tenants.get(session, batch.tenant_id)
        bound = tenant.max_queued if tenant is not None and tenant.max_queued is not None else None
        max_queued = self._settings.max_queued_jobs if bound is None else bound
        allowed = min(self._settings.batch_jobs_in_flight, max(1, max_queued // 4))
        return max(0, allowed - batches.num_in_flight(session, batch.tenant_id))

    def _job_of(self, batch: Batch, line: BatchLine, content: bytes) -> NewJob:
        """Raises CeleriacError."""
        asked = self._surface.read_line(content, batch.endpoint)
        try:
            settled = self._loop.run_until_complete(self._settler.settle(asked.request))
        except CeleriacError as exc:
            raise asked.in_words(exc) from None
        view, options = self._views.get(asked.request.model), _options(batch, line, asked)
        return make_job(batch.tenant_id, asked.request, options, view, settled, settings=self._settings)

    def close(self) -> None:
        self._loop.run_until_complete(self._settler.aclose())
        self._loop.close()

    # The end

    def _freeze(self, session: Session, batch: Batch) -> bool:
        """Write what the next lines came to; behind the last one the batch ends."""
        ended = read_ended(session, batch, after=batch.num_frozen)
        if not ended:
            batches.end(session, batch, job_ttl_seconds=self._settings.result_ttl_seconds)
            return False
        output: list[bytes] = []
        errors: list[bytes] = []
        for one, written in zip(ended, write_lines(session, batch, ended, self._surface), strict=True):
            is_completed = one.line.outcome is LineOutcome.COMPLETED
            (output if is_completed else errors).append(written)
            if is_completed and one.record is not None and one.record.result is not None:
                batch.cached_tokens += one.record.result.usage.cached_tokens
        assert batch.output_file_id is not None
        assert batch.error_file_id is not None
        files.extend(session, batch.output_file_id, b"".join(output))
        files.extend(session, batch.error_file_id, b"".join(errors))
        batch.num_frozen = ended[-1].line.line
        return True


def _options(batch: Batch, line: BatchLine, asked: LineRequest) -> JobOptions:
    """The key holds a blank, which no client's can: it is ours alone."""
    return JobOptions(
        priority=BATCH_PRIORITY,
        deadline_at=batch.expires_at,
        result_ttl_seconds=UNTIL_FROZEN_SECONDS,
        idempotency_key=f"{external_id(batch.id, 'batch')} {line.line}",
        metadata=dict(asked.metadata),
    )
