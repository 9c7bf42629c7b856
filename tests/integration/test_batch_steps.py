"""The steps of batches: taken with nothing locked, one tenant after another, each once, and never for ever."""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import text, update
from sqlalchemy.orm import Session, sessionmaker

from api.openai.batches import BatchView, batch_object
from dialects import openai_batches
from dialects.openai_batches import LineRequest
from domain.access import Limits
from domain.job_options import NO_TIMEOUTS, Timeouts
from domain.jobs import PIECE_BYTES, BatchStatus, LineOutcome, external_id
from maintenance.batches import BatchWork
from metrics import jobs_submitted_total
from settings import Settings
from storage import administration, batch_lines, batch_waits, batches, files
from storage.administration import TenantChanges
from storage.files import Batch, BatchLine
from storage.tables import DEFAULT_TENANT_ID, Job
from tasks import tracing
from tests.conftest import MakeTenant
from tests.integration.api_harness import CATALOG
from text.models import ModelViews

CHAT = "/v1/chat/completions"
ReadLine = Callable[[bytes, str, ModelViews], LineRequest]


def line(number: int, **body: Any) -> bytes:
    fields = {"model": "fake", "messages": [{"role": "user", "content": f"Number {number}"}], "max_tokens": 8} | body
    request = {"custom_id": f"line-{number}", "method": "POST", "url": CHAT, "body": fields}
    return json.dumps(request).encode() + b"\n"


@dataclass
class Bench:
    """A database with batches, and as many maintenance processes as a test wants."""

    sessions: sessionmaker[Session]
    settings: Settings
    monkeypatch: pytest.MonkeyPatch
    works: list[BatchWork] = field(default_factory=list)

    def make_batch(self, content: bytes, tenant_id: UUID = DEFAULT_TENANT_ID, timeouts: Timeouts = NO_TIMEOUTS) -> UUID:
        with self.sessions.begin() as session:
            file_id = files.begin_upload(session, tenant_id, max_bytes=10**10)
            for number, start in enumerate(range(0, len(content), PIECE_BYTES)):
                files.append(session, file_id, number, content[start : start + PIECE_BYTES])
            given: dict[str, Any] = {"filename": "in.jsonl", "purpose": "batch", "ttl_seconds": 3600}
            files.finish_upload(session, file_id, tenant_id, max_bytes=10**10, **given)
            batch = batches.create(
                session,
                tenant_id,
                input_file_id=file_id,
                endpoint=CHAT,
                completion_window="24h",
                window_seconds=86_400,
                metadata={},
                output_ttl_seconds=3600,
                timeouts=timeouts,
            )
        return batch.id

    def work(self, wrap: Callable[[ReadLine], ReadLine] = lambda read_line: read_line) -> BatchWork:
        """`wrap` changes how lines are read, by all works from now on."""
        self.monkeypatch.setattr(openai_batches, "read_line", wrap(openai_batches.read_line))
        work = BatchWork(self.sessions, ModelViews(CATALOG), self.settings)
        self.works.append(work)
        return work

    def batch(self, batch_id: UUID) -> Batch:
        with self.sessions() as session:
            return session.get_one(Batch, batch_id)

    def lines(self, batch_id: UUID) -> Sequence[BatchLine]:
        with self.sessions() as session:
            return session.query(BatchLine).filter_by(batch_id=batch_id).order_by(BatchLine.line).all()

    def num_jobs(self) -> int:
        with self.sessions() as session:
            return session.query(Job).count()

    def num_idle_transactions(self) -> int:
        """Of other connections to this database."""
        statement = text("""SELECT count(*) FROM pg_stat_activity
            WHERE datname = current_database() AND pid <> pg_backend_pid() AND state LIKE 'idle in transaction%'""")
        with self.sessions() as session:
            return int(session.execute(statement).scalar_one())


@pytest.fixture
def bench(
    session_factory: sessionmaker[Session], database_url: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Bench]:
    bench = Bench(session_factory, Settings(database_url=database_url), monkeypatch)
    yield bench
    for work in bench.works:
        work.close()


def test_each_line_is_a_trace_that_is_linked_to_the_request_for_the_batch(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("opentelemetry.sdk")
    from tests.integration.test_traces import Recorded

    recorded = Recorded()
    monkeypatch.setattr(tracing, "tracer", lambda: recorded.provider.get_tracer("celeriac"))
    batch_id = bench.make_batch(line(1, temperature=0) + line(2))
    trace, span = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    with bench.sessions.begin() as session:
        session.execute(update(Batch).values(traceparent=f"00-{trace}-{span}-01"))
    work = bench.work()
    while work.step(batch_id):
        pass
    jobs = {number: one.job_id for number, one in enumerate(bench.lines(batch_id), start=1)}
    for number, job_id in jobs.items():
        assert job_id is not None
        found = recorded.of_trace(job_id.hex)["batch line"]
        [link] = found.links
        assert (f"{link.context.trace_id:032x}", f"{link.context.span_id:016x}") == (trace, span)
        facts = dict(found.attributes or {})
        assert (facts["celeriac.batch.id"], facts["celeriac.batch.line"]) == (external_id(batch_id, "batch"), number)
    told = [str(one.to_json()) for one in recorded.exporter.get_finished_spans()]
    assert len(told) == 2 * 2, "an accept and a batch line for each"
    assert not any("Number" in one for one in told), "which are in the prompts"


def error_codes(batch: Batch) -> list[tuple[int | None, str]]:
    return [(error.line, error.code) for error in (batch.errors.data if batch.errors else ())]


# Nothing is locked


def test_no_transaction_is_open_while_lines_are_read_and_prepared(bench: Bench) -> None:
    found: list[int] = []

    def watched(read_line: ReadLine) -> ReadLine:
        def read(content: bytes, url: str, views: ModelViews) -> LineRequest:
            found.append(bench.num_idle_transactions())
            return read_line(content, url, views)

        return read

    batch_id = bench.make_batch(b"".join(map(line, range(3))))
    bench.work(watched).tick()
    assert bench.batch(batch_id).status is BatchStatus.IN_PROGRESS
    assert bench.num_jobs() == 3
    assert found == [0] * 6, "once to validate the file, and once to make jobs of its lines"


def test_lines_have_the_timeouts_of_their_batch_or_their_own(bench: Bench) -> None:
    bench.make_batch(line(1) + line(2, start_timeout=7), timeouts=Timeouts(60, 30))
    bench.work().tick()
    with bench.sessions() as session:
        found = session.query(Job).order_by(Job.id).all()
    seconds = [(job.start_deadline_at - job.created_at).total_seconds() for job in found if job.start_deadline_at]
    assert (seconds, [job.run_timeout_seconds for job in found]) == ([60, 7], [30, 30])


@pytest.mark.parametrize("reading", [1, 2], ids=["validating", "feeding"])
def test_a_batch_is_cancelled_at_once_while_its_lines_are_prepared(bench: Bench, reading: int) -> None:
    num_read = 0

    def cancelling(read_line: ReadLine) -> ReadLine:
        def read(content: bytes, url: str, views: ModelViews) -> LineRequest:
            nonlocal num_read
            num_read += 1
            if num_read == reading:
                with bench.sessions.begin() as session:
                    session.execute(text("SET LOCAL lock_timeout = '1s'"))
                    batches.cancel(session, batch_id, DEFAULT_TENANT_ID)
            return read_line(content, url, views)

        return read

    batch_id = bench.make_batch(line(1))
    work = bench.work(cancelling)
    work.tick()
    work.tick()
    assert bench.batch(batch_id).status is BatchStatus.CANCELLED
    assert bench.num_jobs() == 0


@pytest.mark.parametrize("reading", [1, 4], ids=["validating", "feeding"])
def test_a_step_that_another_process_has_taken_meanwhile_is_not_taken_twice(bench: Bench, reading: int) -> None:
    num_read = 0

    def overtaken(read_line: ReadLine) -> ReadLine:
        def read(content: bytes, url: str, views: ModelViews) -> LineRequest:
            nonlocal num_read
            num_read += 1
            if num_read == reading:
                assert bench.work().step(batch_id)
            return read_line(content, url, views)

        return read

    batch_id = bench.make_batch(b"".join(map(line, range(3))))
    work = bench.work(overtaken)
    for _ in range(3):
        work.tick()
    assert bench.batch(batch_id).num_lines == bench.num_jobs() == 3
    assert len({one.job_id for one in bench.lines(batch_id)}) == 3


def test_lines_of_a_disabled_tenant_wait_until_it_is_enabled(bench: Bench, make_tenant: MakeTenant) -> None:
    tenant = make_tenant()
    batch_id = bench.make_batch(line(1), tenant.id)
    work = bench.work()
    for is_enabled, num_jobs in ((False, 0), (True, 1)):
        with bench.sessions.begin() as session:
            changes = TenantChanges(is_enabled=is_enabled)
            administration.change_tenant(session, tenant.name, changes, actor="test")
        work.tick()
        work.tick()
        assert bench.batch(batch_id).status is BatchStatus.IN_PROGRESS
        assert bench.num_jobs() == num_jobs


# Nothing goes on for ever


class Panic(BaseException):
    """What a library in Rust raises when it panics is no Exception."""


@pytest.mark.parametrize("kind", [RecursionError, ArithmeticError, Panic])
@pytest.mark.parametrize("is_read", [False, True], ids=["validating", "feeding"])
def test_whatever_a_line_does_to_its_parser_is_that_lines_error(
    bench: Bench, kind: type[BaseException], is_read: bool
) -> None:
    num_read = 0

    def failing(read_line: ReadLine) -> ReadLine:
        def read(content: bytes, url: str, views: ModelViews) -> LineRequest:
            nonlocal num_read
            num_read += 1
            if b"Number 2" in content and (num_read > 3) == is_read:
                raise kind("it is too much")
            return read_line(content, url, views)

        return read

    batch_id = bench.make_batch(b"".join(map(line, range(1, 4))))
    bench.work(failing).tick()
    batch = bench.batch(batch_id)
    if not is_read:
        assert (batch.status, error_codes(batch)) == (BatchStatus.FAILED, [(2, "server_error")])
        return
    assert (batch.status, bench.num_jobs()) == (BatchStatus.IN_PROGRESS, 2)
    [refused] = [one for one in bench.lines(batch_id) if one.outcome is LineOutcome.FAILED]
    assert refused.refusal is not None
    assert (refused.line, refused.refusal.status_code, refused.refusal.code) == (2, 500, "server_error")


def fail_at_attach(monkeypatch: pytest.MonkeyPatch, kinds: Iterator[type[Exception]]) -> None:
    def attach(*_: object) -> None:
        raise next(kinds)("it cannot be noted")

    monkeypatch.setattr(batch_lines, "attach_jobs", attach)


def test_a_step_that_fails_three_times_in_the_same_way_fails_its_batch_alone(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch_id = bench.make_batch(line(1))
    work = bench.work()
    with monkeypatch.context() as broken:
        fail_at_attach(broken, iter([ArithmeticError] * 9))
        work.tick()
        work.tick()
        assert bench.batch(batch_id).status is BatchStatus.IN_PROGRESS
        work.tick()
    batch = bench.batch(batch_id)
    assert (batch.status, error_codes(batch)) == (BatchStatus.FAILED, [(None, "server_error")])
    assert batch.errors is not None
    assert "ArithmeticError: it cannot be noted" in batch.errors.data[0].message
    assert batch.failed_at is not None
    other = bench.make_batch(line(2))
    work.tick()
    assert bench.batch(other).num_in_flight == 1


def test_steps_that_fail_in_different_ways_or_in_between_are_tried_again(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch_id = bench.make_batch(line(1))
    work = bench.work()
    with monkeypatch.context() as broken:
        fail_at_attach(broken, iter([ArithmeticError, ArithmeticError, KeyError, ArithmeticError, ArithmeticError]))
        for _ in range(5):
            work.tick()
    assert bench.batch(batch_id).num_step_failures == 2
    work.tick()
    batch = bench.batch(batch_id)
    assert (batch.num_step_failures, batch.step_failure, batch.num_in_flight) == (0, None, 1)


@pytest.mark.parametrize("kind", [OSError, MemoryError])
def test_trouble_of_the_machine_is_no_batchs_failure(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, kind: type[Exception]
) -> None:
    batch_id = bench.make_batch(line(1))
    work = bench.work()
    with monkeypatch.context() as broken:
        fail_at_attach(broken, iter([kind] * 9))
        for _ in range(4):
            work.tick()
    work.tick()
    assert bench.batch(batch_id).num_in_flight == 1


def test_a_window_that_closes_while_the_file_is_read_expires_the_batch(bench: Bench) -> None:
    batch_id = bench.make_batch(line(1))
    with bench.sessions.begin() as session:
        session.execute(update(Batch).values(expires_at=datetime.now(UTC) - timedelta(seconds=1)))
    bench.work().tick()
    batch = bench.batch(batch_id)
    assert (batch.status, batch.expired_at is not None, bench.num_jobs()) == (BatchStatus.EXPIRED, True, 0)


def test_a_line_that_is_known_as_poison_is_refused_alone(bench: Bench) -> None:
    batch_id = bench.make_batch(line(1) + line(2))
    bench.work().tick()
    with bench.sessions.begin() as session:
        session.execute(
            text("""INSERT INTO poison_requests (tenant_id, fingerprint, job_id, created_at)
            SELECT j.tenant_id, p.fingerprint, j.id, now() FROM jobs j JOIN job_payloads p ON p.job_id = j.id
            JOIN batch_lines l ON l.job_id = j.id WHERE l.line = 1""")
        )
    again = bench.make_batch(line(1) + line(2))
    bench.work().tick()
    assert [one.refusal and one.refusal.code for one in bench.lines(again)] == ["poison_request", None]
    assert bench.batch(again).num_failed == 1
    assert bench.batch(batch_id).num_failed == 0


# Nobody waits for a neighbour


def test_a_neighbours_long_files_do_not_hold_up_a_line(bench: Bench, make_tenant: MakeTenant) -> None:
    """However many batches he has. Counted in lines, of which each takes a known time."""
    num_slow = 0

    def slow(read_line: ReadLine) -> ReadLine:
        def read(content: bytes, url: str, views: ModelViews) -> LineRequest:
            nonlocal num_slow
            if b"slow" in content:
                num_slow += 1
                time.sleep(0.05)
            return read_line(content, url, views)

        return read

    neighbour = make_tenant()
    long_file = b"".join(line(number, metadata={"kind": "slow"}) for number in range(200))
    for _ in range(12):
        bench.make_batch(long_file, neighbour.id)
    short = bench.make_batch(line(1))
    work = bench.work(slow)
    while num_slow < 100 and not bench.batch(short).num_in_flight:
        work.tick()
    assert bench.batch(short).num_in_flight == 1
    assert num_slow < 100, "of 2,400"


def test_a_batch_whose_lines_wait_for_a_spent_budget_says_so_and_until_when(
    bench: Bench, make_tenant: MakeTenant
) -> None:
    tenant = make_tenant()
    batch_id, work = bench.make_batch(line(1) + line(2), tenant.id), bench.work()
    with bench.sessions.begin() as session:
        limits = TenantChanges(limits=Limits(tokens_per_day=5))
        administration.change_tenant(session, tenant.name, limits, actor="test")
        session.execute(
            text(
                "UPDATE limit_usage SET day = (now() AT TIME ZONE 'UTC')::date, tokens_on_day = 9 WHERE tenant_id = :id"
            ),
            {"id": tenant.id},
        )
    while work.step(batch_id):
        pass

    def seen() -> BatchView:
        with bench.sessions() as session:
            told = batch_waits.get(session, batch_id, tenant.id)
            assert told is not None
            assert batch_waits.list_batches(session, tenant.id, after=None, limit=9)[0].wait == told.wait
        return batch_object(told)

    midnight = (datetime.now(UTC) + timedelta(days=1)).replace(hour=0, minute=0, second=0, microsecond=0)
    view = seen()
    assert (view["status"], bench.num_jobs()) == ("in_progress", 0)
    wait = view["waiting_for"]
    assert wait is not None
    assert (wait["code"], wait["until"]) == ("tokens_per_day_exceeded", midnight.timestamp())
    assert wait["message"].startswith("your tenant has used 9 tokens today, and may use 5 a day; the lines ")
    with bench.sessions.begin() as session:
        limits = TenantChanges(limits=Limits(tokens_per_day=None))
        administration.change_tenant(session, tenant.name, limits, actor="test")
    assert seen()["waiting_for"] is None
    while work.step(batch_id):
        pass
    assert (seen()["waiting_for"], bench.num_jobs()) == (None, 2)


def test_the_batches_of_a_tenant_take_turns_too(bench: Bench) -> None:
    def slow(read_line: ReadLine) -> ReadLine:
        def read(content: bytes, url: str, views: ModelViews) -> LineRequest:
            if b"slow" in content:
                time.sleep(0.05)
            return read_line(content, url, views)

        return read

    long_file = b"".join(line(number, metadata={"kind": "slow"}) for number in range(400))
    first, last = bench.make_batch(long_file), bench.make_batch(line(1))
    work = bench.work(slow)
    while bench.batch(first).status is BatchStatus.VALIDATING and not bench.batch(last).num_in_flight:
        work.tick()
    assert bench.batch(last).num_in_flight == 1
    assert bench.batch(first).status is BatchStatus.VALIDATING


def test_the_costliest_line_there_may_be_is_an_error_at_once(bench: Bench, make_tenant: MakeTenant) -> None:
    """A megabyte of names of which the last one comes twice: once it took minutes, and all batches waited for it."""
    names = [*range(85_000), 84_999]
    costly = b'{"metadata":{' + b",".join(b'"%d":"0"' % name for name in names) + b"}}"
    content = line(1).replace(b'"body": {', b'"body": {"metadata": ' + costly[len(b'{"metadata":') : -1] + b", ")
    assert len(content) > 900_000
    batch_id, other = bench.make_batch(content, make_tenant().id), bench.make_batch(line(2))
    work = bench.work()
    began = time.process_time()
    while not bench.batch(batch_id).status.is_terminal:
        work.tick()
    assert time.process_time() - began < 5
    assert error_codes(bench.batch(batch_id)) == [(1, "invalid_value")]
    assert bench.batch(other).num_in_flight == 1


# What they leave


def test_lines_count_in_the_metrics_like_other_jobs(bench: Bench) -> None:
    counter = jobs_submitted_total.labels("fake", "accepted")
    before = counter._value.get()
    bench.make_batch(b"".join(map(line, range(5))))
    bench.work().tick()
    assert counter._value.get() - before == 5


def test_lines_become_jobs_as_the_limits_allow_and_wait_meanwhile(bench: Bench) -> None:
    with bench.sessions.begin() as session:
        changes = TenantChanges(limits=Limits(unfinished_jobs=4))  # of which lines leave half to requests
        administration.change_tenant(session, "default", changes, actor="test")
    work = bench.work()
    batch_id = bench.make_batch(b"".join(line(number) for number in range(5)))
    for _ in range(4):
        work.tick()
    assert bench.num_jobs() == 2
    assert bench.batch(batch_id).status is BatchStatus.IN_PROGRESS
    with bench.sessions.begin() as session:
        administration.change_tenant(
            session, "default", TenantChanges(limits=Limits(unfinished_jobs=None)), actor="test"
        )
    work.tick()
    assert bench.num_jobs() == 5
