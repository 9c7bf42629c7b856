"""Runs batches: reads the file, submits its lines as jobs, follows the jobs to their ends, and writes the output files.

A step reads the batch's progress, works without an open transaction, and saves the result in a short transaction, under
the lock on the batch's row and only if the progress is unchanged. Any number of processes may therefore take steps, and
a step that is killed midway has no effect. A line's job is accepted in the same transaction that records it in the
line, so no line is submitted twice or forgotten.

Tenants take turns: each gets a slice of every round, however many batches it has and however large they are.
"""

import asyncio
import logging
import random
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from time import monotonic
from uuid import UUID

from sqlalchemy.orm import Session, sessionmaker

from dialects import openai_batches
from dialects.openai_batches import LineRequest, refusal_of
from domain.errors import CeleriacError, Overloaded
from domain.job_options import JobOptions, Timeouts
from domain.jobs import BATCH_PRIORITY, BatchError, BatchStatus, LineOutcome, LineRefusal, external_id
from domain.shares import current_tenant
from maintenance.batch_validation import BatchValidation
from observability import describe_exception, key_id_context
from settings import Settings
from storage import batch_lines, batches, files, job_accept, jobs, tenants
from storage.database import OUTAGES, statement_factory
from storage.files import Batch, BatchLine
from storage.job_accept import Accepted, AcceptOutcome, NewJob
from tasks import job_log
from tasks.batch_files import read_ended, write_line
from tasks.known_requests import ReadyRequest
from tasks.prepare import RequestPreparer
from tasks.submit import fingerprint, make_job, raise_refusal, request_hash
from text.models import ModelViews

log = logging.getLogger(__name__)

BYTES_PER_FEED = 16_777_216  # total length of the lines that are prepared at a time
FEED_SECONDS = 0.5  # after this much time, the lines prepared so far are accepted
SLICE_SECONDS = 0.25  # per tenant and turn; a step that has started is finished
TICK_SECONDS = 2.0
UNTIL_FROZEN_SECONDS = 315_360_000  # ten years: results are kept until their batch releases them


class BatchWork:
    """Advances all batches. There is one per process, and its ticks do not overlap."""

    def __init__(
        self,
        sessions: sessionmaker[Session],
        views: ModelViews,
        settings: Settings,
        *,
        on_turn: Callable[[], None] = lambda: None,
    ) -> None:
        """`on_turn` is called each time the batches have been read from the database, and after each tenant's turn."""
        self._sessions = sessions
        self._statements = statement_factory(sessions)
        self._views = views
        self._settings = settings
        self._on_turn = on_turn
        self._validation = BatchValidation(sessions, views)
        self._preparer = RequestPreparer(views)
        self._loop = asyncio.new_event_loop()  # the preparer's; it runs only within a step
        self._failed_ids: set[UUID] = set()  # batches that are skipped until the next tick
        self._last_by_tenant: dict[UUID, UUID] = {}  # the batch that had a tenant's last turn

    def tick(self) -> bool:
        """Advance every unfinished batch as far as possible. True if time ran out while some could go further."""
        until = monotonic() + TICK_SECONDS
        self._failed_ids.clear()
        while is_moving := self._round():
            if monotonic() > until:
                break
        return is_moving

    def _round(self) -> bool:
        """Give each tenant a turn. True if some batches can continue in the next round."""
        ids_by_tenant = self._unfinished_ids()
        if ids_by_tenant is None:
            return False
        self._on_turn()
        self._last_by_tenant = {
            tenant: last for tenant, last in self._last_by_tenant.items() if tenant in ids_by_tenant
        }
        # In random order, so that several processes rarely prepare the same lines.
        tenant_ids = random.sample(list(ids_by_tenant), len(ids_by_tenant))
        is_moving = False
        for tenant_id in tenant_ids:
            is_moving |= self._turn(tenant_id, ids_by_tenant[tenant_id])
            self._on_turn()
        return is_moving

    def _turn(self, tenant_id: UUID, batch_ids: Sequence[UUID]) -> bool:
        """Advance the tenant's batches one after another, starting after the one that had the last turn. True if time
        ran out while some could go further."""
        current_tenant.set(tenant_id)
        until = monotonic() + SLICE_SECONDS
        last = self._last_by_tenant.get(tenant_id)
        in_turn = sorted(batch_ids, key=lambda batch_id: (last is not None and batch_id <= last, batch_id))
        has_moved = False
        for batch_id in in_turn:
            self._last_by_tenant[tenant_id] = batch_id
            while self._advance(batch_id):
                has_moved = True
                if monotonic() > until:
                    return True
            if monotonic() > until:
                return has_moved
        return False

    def _unfinished_ids(self) -> dict[UUID, list[UUID]] | None:
        """The unfinished batches by tenant; None if the database does not answer."""
        try:
            with self._statements() as session:
                return batches.unfinished_ids(session)
        except OUTAGES as exc:
            log.warning("batches are waiting for the database: %s", describe_exception(exc))
            return None

    def _advance(self, batch_id: UUID) -> bool:
        """Take a step. True if the next one need not wait."""
        if batch_id in self._failed_ids:
            return False
        about = {"batch_id": external_id(batch_id, "batch")}
        try:
            return self.step(batch_id)
        except (*OUTAGES, OSError, MemoryError) as exc:  # the machine is at fault, not the batch
            log.warning("a batch has to wait: %s", describe_exception(exc), extra=about)
        except Exception as exc:  # an outermost loop: the other batches must continue
            log.exception("a step of a batch failed: %s", describe_exception(exc), extra=about)
            self._failed_ids.add(batch_id)
            self._note_failure(batch_id, exc)
        return False

    def _note_failure(self, batch_id: UUID, exc: Exception) -> None:
        """Count a failed step. A batch whose steps keep failing in the same way is failed, since it would never end."""
        place = traceback.extract_tb(exc.__traceback__)[-1]
        way = f"{type(exc).__name__} at {Path(place.filename).name}:{place.lineno}"  # messages contain ids and numbers
        try:
            with self._sessions.begin() as session:
                if not batches.note_step_failure(session, batch_id, way):
                    return
                asked = jobs.request_cancel(session, batch_lines.in_flight_job_ids(session, batch_id))
                message = f"the server failed {batches.MAX_STEP_FAILURES} times to advance this batch:  "
                message += describe_exception(exc)
                error = BatchError(code=CeleriacError.code, message=message)
                batches.give_up(session, batch_id, error, job_ttl_seconds=self._settings.result_ttl_seconds)
            job_log.ended_without_worker(job for job in asked if job.status.is_terminal)
        except OUTAGES as outage:
            log.warning("a failed step could not be recorded: %s", describe_exception(outage))

    def step(self, batch_id: UUID) -> bool:
        """Take one step. True if the next one need not wait."""
        step_by_status: dict[BatchStatus, Callable[[Batch], bool]] = {
            BatchStatus.VALIDATING: self._validation.step,
            BatchStatus.IN_PROGRESS: self._run,
            BatchStatus.CANCELLING: self._stop,
            BatchStatus.FINALIZING: self._freeze,
        }
        with self._sessions() as session:
            batch = batches.find_unfinished(session, batch_id)
        if batch is None:
            return False
        is_moving = step_by_status[batch.status](batch)
        if batch.num_step_failures:
            with self._sessions.begin() as session:
                batches.forget_step_failures(session, batch_id)
        return is_moving

    # Running

    def _run(self, batch: Batch) -> bool:
        with self._sessions.begin() as session:
            locked = batches.lock(session, batch.id, BatchStatus.IN_PROGRESS)
            if locked is None:
                return False
            batch_lines.record_ended(session, locked)
            if locked.expires_at <= batches.now(session):
                locked.expired_at = locked.expired_at or batches.now(session)
                batch_lines.end_waiting_lines(session, locked, LineOutcome.EXPIRED)
            if _is_done(locked):
                locked.status, locked.finalizing_at = BatchStatus.FINALIZING, batches.now(session)
                return True
            num_wanted = self._num_wanted(session, locked)
            waiting = batch_lines.waiting_lines(session, batch.id, limit=num_wanted, max_bytes=BYTES_PER_FEED)
            ranges = [(line.first_byte, line.num_bytes) for line in waiting]
            contents = files.read_ranges(session, batch.input_file_id, ranges) if waiting else []
        return bool(waiting) and self._feed(batch, dict(zip(waiting, contents, strict=True)))

    def _feed(self, batch: Batch, content_by_line: dict[BatchLine, bytes]) -> bool:
        """Submit as many of these lines as can be prepared in time. True if there may be more to submit."""
        new_jobs: dict[int, NewJob] = {}
        refusals: dict[int, LineRefusal] = {}
        until = monotonic() + FEED_SECONDS
        for line, content in content_by_line.items():
            try:
                new_jobs[line.line] = self._job_of(batch, line, content)
            except Overloaded:
                break
            except CeleriacError as exc:
                refusals[line.line] = refusal_of(exc)
            if monotonic() > until:
                break  # the next step submits the others
        # Jobs accepted together are equally old, so their ids determine the order.
        ordered = sorted(new_job.id for new_job in new_jobs.values())
        new_jobs = {
            line: replace(job, id=id_, is_limited=True)
            for (line, job), id_ in zip(new_jobs.items(), ordered, strict=True)
        }
        if not new_jobs and not refusals:
            return False
        with self._sessions.begin() as session:
            accepted, refused = self._accept(session, batch, new_jobs, refusals)
        line_by_id = {new_job.id: line for line, new_job in new_jobs.items()}
        for new_job in accepted:
            job_log.accepted(new_job)
            job_log.of_batch(new_job, batch, line_by_id[new_job.id])
        for refusal in refused:
            job_log.submitted(str(batch.model), refusal.code)
        return bool(accepted or refusals)

    def _accept(
        self, session: Session, batch: Batch, new_jobs: dict[int, NewJob], refusals: dict[int, LineRefusal]
    ) -> tuple[list[NewJob], list[LineRefusal]]:
        """Record the outcomes of lines that are still waiting. Returns the new jobs and the refusals. Jobs are accepted
        last, because the tenant's other submissions have to wait from then until the commit."""
        locked = batches.lock(session, batch.id, BatchStatus.IN_PROGRESS)
        if locked is None or locked.expires_at <= batches.now(session):
            return [], []
        waiting = batch_lines.still_waiting(session, batch.id, [*new_jobs, *refusals])
        refused = {line: refusal for line, refusal in refusals.items() if line in waiting}
        num_wanted = self._num_wanted(session, locked)
        fed = dict([(line, job) for line, job in new_jobs.items() if line in waiting][:num_wanted])
        session.flush()
        answers = job_accept.accept(session, list(fed.values()), max_queued_jobs=self._settings.max_queued_jobs)
        outcomes = list(zip(fed.items(), answers, strict=True))
        taken = {
            line: (answer.job_id, new_job.num_sequences)
            for (line, new_job), answer in outcomes
            if answer.outcome in (AcceptOutcome.ACCEPTED, AcceptOutcome.DUPLICATE)
        }
        if taken:
            batch_lines.attach_jobs(session, locked, taken)
        refused |= {
            line: self._refusal_of(answer) for (line, _), answer in outcomes if answer.outcome is AcceptOutcome.POISON
        }
        for line, refusal in refused.items():
            batch_lines.refuse_line(locked, waiting[line], refusal)
        accepted = [new_job for (_, new_job), answer in outcomes if answer.outcome is AcceptOutcome.ACCEPTED]
        return accepted, list(refused.values())

    def _refusal_of(self, answer: Accepted) -> LineRefusal:
        try:
            raise_refusal(answer, JobOptions())
        except CeleriacError as exc:
            return refusal_of(exc)
        raise AssertionError(f"{answer.outcome} is not a refusal")

    def _num_wanted(self, session: Session, batch: Batch) -> int:
        """How many more jobs to submit. Batches use at most a quarter of the tenant's queue; the rest is left for its
        live requests."""
        tenant = tenants.get_tenant(session, batch.tenant_id)
        bound = tenant.max_queued if tenant is not None and tenant.max_queued is not None else None
        max_queued = self._settings.max_queued_jobs if bound is None else bound
        allowed = min(self._settings.batch_jobs_in_flight, max(1, max_queued // 4))
        return max(0, allowed - batches.num_in_flight(session, batch.tenant_id))

    def _job_of(self, batch: Batch, line: BatchLine, content: bytes) -> NewJob:
        """Make a line into a job. Raises CeleriacError, even for unexpected errors, so that only this line fails."""
        try:
            asked = openai_batches.read_line(content, batch.endpoint, self._views)
            view = self._views.get(asked.request.model)
            preparing = self._preparer.prepare(asked.request, batch.tenant_id, view)
            try:
                prepared = self._loop.run_until_complete(preparing)
            except CeleriacError as exc:
                raise asked.in_words(exc) from None
            options = _options(batch, line, asked)
            key_id_context.set(batch.key_id)
            mark = fingerprint(view.revision, prepared.prompt_token_ids, asked.request)
            ready = ReadyRequest(prepared, mark, answer_key=None)
            hashed = request_hash(asked.request, options)
            return make_job(batch.tenant_id, options, view, ready, settings=self._settings, asked=hashed)
        except (CeleriacError, OSError, MemoryError, KeyboardInterrupt, SystemExit, asyncio.CancelledError):
            raise  # a refusal, or the machine is at fault, not the line
        except BaseException as exc:  # a panic in a Rust library is not an Exception
            log.exception(
                "a batch line could not be made into a job: %s",
                describe_exception(exc),
                extra={"batch_id": external_id(batch.id, "batch"), "line": line.line},
            )
            raise CeleriacError(f"the server failed on this line ({type(exc).__name__}); report this error") from exc

    def close(self) -> None:
        self._loop.run_until_complete(self._preparer.aclose())
        self._loop.close()

    # The end

    def _stop(self, batch: Batch) -> bool:
        """Stop a cancelled batch: submit no more lines, and ask running jobs to stop."""
        with self._sessions.begin() as session:
            locked = batches.lock(session, batch.id, BatchStatus.CANCELLING)
            if locked is None:
                return False
            batch_lines.record_ended(session, locked)
            batch_lines.end_waiting_lines(session, locked, LineOutcome.CANCELLED)
            asked = jobs.request_cancel(session, batch_lines.in_flight_job_ids(session, batch.id))
            is_begun, is_done = locked.in_progress_at is not None, _is_done(locked)
            if not is_begun:
                batches.end(session, locked, job_ttl_seconds=self._settings.result_ttl_seconds)
        job_log.ended_without_worker(job for job in asked if job.status.is_terminal)
        return not is_begun or (is_done and self._freeze(batch))

    def _freeze(self, batch: Batch) -> bool:
        """Write the results of the next lines; after the last one, end the batch."""
        with self._sessions() as session:
            lines = read_ended(session, batch, after=batch.num_frozen)
        output: list[bytes] = []
        errors: list[bytes] = []
        cached_tokens = 0
        for line in lines:
            is_completed = line.ended.line.outcome is LineOutcome.COMPLETED
            (output if is_completed else errors).append(write_line(batch, line, self._views))
            record = line.ended.record
            if is_completed and record is not None and record.result is not None:
                cached_tokens += record.result.usage.cached_tokens
        with self._sessions.begin() as session:
            locked = batches.lock(session, batch.id, batch.status)
            if locked is None or locked.num_frozen != batch.num_frozen:
                return False  # another process has advanced it
            if not lines:
                batches.end(session, locked, job_ttl_seconds=self._settings.result_ttl_seconds)
                return False
            assert locked.output_file_id is not None
            assert locked.error_file_id is not None
            files.extend(session, locked.output_file_id, b"".join(output))
            files.extend(session, locked.error_file_id, b"".join(errors))
            locked.cached_tokens += cached_tokens
            locked.num_frozen = lines[-1].ended.line.line
        return True


def _is_done(batch: Batch) -> bool:
    return batch.num_completed + batch.num_failed >= batch.num_lines


def _options(batch: Batch, line: BatchLine, asked: LineRequest) -> JobOptions:
    """The options of a line's job. Its idempotency key contains a space, which clients' keys cannot contain, so the two
    never collide."""
    timeouts = asked.timeouts.or_else(Timeouts(batch.start_timeout_seconds, batch.run_timeout_seconds))
    return JobOptions(
        priority=BATCH_PRIORITY,
        start_timeout_seconds=timeouts.start_seconds,
        run_timeout_seconds=timeouts.run_seconds,
        deadline_at=batch.expires_at,
        result_ttl_seconds=UNTIL_FROZEN_SECONDS,
        idempotency_key=f"{external_id(batch.id, 'batch')} {line.line}",
        metadata=dict(asked.metadata),
    )
