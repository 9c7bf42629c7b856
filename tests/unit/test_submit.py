"""What a request becomes before it is accepted: bounds, defaults, and the hash that makes two requests one."""

import asyncio
import threading
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from domain.catalog import Catalog, ModelSpec
from domain.errors import ContextLengthExceeded, InvalidRequest, ServerOverloaded
from domain.eta import Eta
from domain.job_options import JobOptions
from domain.jobs import new_id
from domain.limits import ClientCall
from domain.requests import ChatMessage, GenerationRequest, SamplingParams
from settings import Settings
from storage.job_accept import Accepted, AcceptOutcome, NewJob, row_of, written_once
from storage.job_queries import JobRecord
from storage.tables import Job
from tasks import prepare
from tasks.prepare import DEFAULT_MAX_TOKENS, TokenizingPool, resolve_params
from tasks.submit import Submitter, request_hash
from text.model_files import GenerationDefaults
from text.models import ModelView, ModelViews, load_model_view

CONTEXT = 100
SPEC = ModelSpec(id="fake", path="fake", backend="fake", max_model_len=CONTEXT, max_num_seqs=4)


@pytest.fixture
def view() -> ModelView:
    return load_model_view(SPEC)


def make_request(**params: Any) -> GenerationRequest:
    return GenerationRequest(model="fake", prompt="Hello", params=SamplingParams(**params))


@given(num_prompt_tokens=st.integers(1, 200), max_tokens=st.none() | st.integers(1, 200))
def test_prompt_and_output_fit_the_context_or_are_refused(num_prompt_tokens: int, max_tokens: int | None) -> None:
    request, view = make_request(max_tokens=max_tokens), load_model_view(SPEC)
    if num_prompt_tokens + (max_tokens or 1) > CONTEXT:
        with pytest.raises(ContextLengthExceeded, match=str(num_prompt_tokens)):
            resolve_params(request, view, num_prompt_tokens)
    else:
        resolved = resolve_params(request, view, num_prompt_tokens)
        assert resolved.max_tokens == (max_tokens or CONTEXT - num_prompt_tokens)


def test_without_max_tokens_a_large_context_is_not_reserved_whole() -> None:
    view = load_model_view(SPEC.model_copy(update={"max_model_len": 1_000_000}))
    assert resolve_params(make_request(), view, 10).max_tokens == DEFAULT_MAX_TOKENS


def test_the_models_own_defaults_fill_what_the_request_leaves_open(view: ModelView) -> None:
    view.defaults = GenerationDefaults(
        temperature=0.6, top_p=0.9, top_k=20, min_p=0.1, repetition_penalty=1.1, max_new_tokens=7
    )
    open_ = resolve_params(make_request(), view, 5)
    assert (open_.temperature, open_.top_p, open_.top_k, open_.min_p) == (0.6, 0.9, 20, 0.1)
    assert (open_.repetition_penalty, open_.max_tokens) == (1.1, 7)
    given_ = resolve_params(make_request(temperature=0, top_k=0, min_p=0, repetition_penalty=1, max_tokens=9), view, 5)
    assert (given_.temperature, given_.top_k, given_.min_p, given_.repetition_penalty) == (0, 0, 0, 1)
    assert given_.max_tokens == 9


def test_a_seed_is_drawn_where_none_is_given(view: ModelView) -> None:
    seeds = {resolve_params(make_request(), view, 5).seed for _ in range(20)}
    assert len(seeds) == 20
    assert all(seed is not None and 0 <= seed < 2**63 for seed in seeds)
    assert resolve_params(make_request(seed=-5), view, 5).seed == -5


@pytest.mark.parametrize(
    ("params", "param"),
    [
        ({"n": 5}, "params.n"),
        ({"min_tokens": 96}, "params.min_tokens"),
        ({"logit_bias": {257: 1.0}}, "params.logit_bias"),
        ({"stop_token_ids": (10**9,)}, "params.stop_token_ids"),
        ({"bad_token_ids": (257,)}, "params.bad_token_ids"),
        ({"bad_token_ids": tuple(range(257))}, "params.bad_token_ids"),
    ],
)
def test_what_this_model_cannot_do_is_refused(view: ModelView, params: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        resolve_params(make_request(**params), view, 5)
    assert caught.value.param == param


def test_a_prompt_that_comes_to_nothing_is_refused(view: ModelView) -> None:
    with pytest.raises(InvalidRequest, match="has no tokens"):
        resolve_params(make_request(), view, 0)


def hash_of(request: GenerationRequest | None = None, **options: Any) -> bytes:
    return request_hash(request or make_request(), JobOptions(**options))


def test_the_same_request_has_the_same_hash_however_it_was_built() -> None:
    explicit = make_request(min_tokens=0, n=1, temperature=None)
    assert hash_of(explicit) == hash_of()
    assert hash_of(metadata={"a": "1", "b": "2"}) == hash_of(metadata={"b": "2", "a": "1"})
    assert hash_of(idempotency_key="x") == hash_of(idempotency_key="y")


def test_whatever_is_asked_for_changes_the_hash() -> None:
    at = datetime(2030, 1, 1, tzinfo=UTC)
    messages = (ChatMessage(role="user", content="Hello"),)
    hashes = [
        hash_of(),
        hash_of(make_request(temperature=0)),
        hash_of(make_request(seed=1)),
        hash_of(make_request(logit_bias={1: 1.0})),
        hash_of(GenerationRequest(model="fake", messages=messages)),
        hash_of(GenerationRequest(model="other", prompt="Hello")),
        hash_of(GenerationRequest(model="fake", prompt_token_ids=(72,))),
        hash_of(priority=1),
        hash_of(deadline_at=at),
        hash_of(deadline_at=at + timedelta(seconds=1)),
        hash_of(start_timeout_seconds=1.0),
        hash_of(run_timeout_seconds=1.0),
        hash_of(result_ttl_seconds=100),
        hash_of(metadata={"a": "b"}),
    ]
    assert len(set(hashes)) == len(hashes)


class SlowView:
    """A view whose tokenizer takes as long as the test says."""

    spec = SPEC
    max_model_len = 1_000_000

    def __init__(self) -> None:
        self.has_begun, self.may_end = threading.Event(), threading.Event()
        self.threads: set[str] = set()

    def encode(self, request: GenerationRequest) -> list[int]:
        self.threads.add(threading.current_thread().name)
        self.has_begun.set()
        assert self.may_end.wait(300)
        return [1, 2, 3]


async def test_long_prompts_leave_the_event_loop_free_and_short_ones_stay_on_it() -> None:
    slow, pool = SlowView(), TokenizingPool()
    long = GenerationRequest(model="fake", prompt="x" * (prepare.INLINE_CHARS + 1))
    work = asyncio.create_task(pool.encode(slow, long))  # type: ignore[arg-type]
    assert await asyncio.to_thread(slow.has_begun.wait, 10)
    slow.may_end.set()
    assert await work == [1, 2, 3]
    assert all(name.startswith("tokenizer") for name in slow.threads)
    slow.threads.clear()
    await pool.encode(slow, GenerationRequest(model="fake", prompt="short"))  # type: ignore[arg-type]
    assert slow.threads == {threading.current_thread().name}
    pool.close()


async def test_a_tokenizer_that_takes_too_long_is_given_up_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "TIMEOUT_SECONDS", 0.05)
    monkeypatch.setattr(prepare, "NUM_THREADS", 1)
    monkeypatch.setattr(prepare, "MAX_WAITING", 2)  # half of it for one tenant
    slow, pool = SlowView(), TokenizingPool()
    long = GenerationRequest(model="fake", prompt="x" * (prepare.INLINE_CHARS + 1))
    with pytest.raises(ServerOverloaded, match="not tokenized within"):
        await pool.encode(slow, long)  # type: ignore[arg-type]
    monkeypatch.setattr(prepare, "TIMEOUT_SECONDS", 300)
    waiting = asyncio.create_task(pool.encode(slow, long))  # type: ignore[arg-type]
    await asyncio.sleep(0)
    with pytest.raises(
        ServerOverloaded, match="1 of your long prompts are waiting"
    ):  # the first one's thread still runs
        await pool.encode(slow, long)  # type: ignore[arg-type]
    slow.may_end.set()
    assert await waiting == [1, 2, 3]
    pool.close()


async def test_an_endless_prompt_never_reaches_the_tokenizer(view: ModelView) -> None:
    pool = TokenizingPool()
    messages = tuple(ChatMessage(role="user", content="x" * 900) for _ in range(2))
    with pytest.raises(ContextLengthExceeded, match="1800 characters"):
        await pool.encode(view, GenerationRequest(model="fake", messages=messages))
    pool.close()


FAKE = """
[[models]]
id = "fake"
path = "fake"
backend = "fake"
max_model_len = {}
"""


async def test_what_was_prepared_by_an_entry_that_has_changed_is_not_known_afterwards(tmp_path: Path) -> None:
    """The answer arrives after the change: the model's files, so its revision, are as they were."""
    file = tmp_path / "models.toml"
    file.write_text(FAKE.format(64))
    views = ModelViews(Catalog.load(file))
    submitter = Submitter(Settings(), views, None, ring=lambda model, job_id: None)  # type: ignore[arg-type]
    request, tenant_id = make_request(temperature=0), UUID(int=1)

    accepted: list[NewJob] = []

    async def accept(new_job: NewJob) -> Accepted:
        file.write_text(FAKE.format(32))
        views.refresh()
        accepted.append(new_job)
        return Accepted(new_job.id, AcceptOutcome.ACCEPTED, datetime.now(UTC), JobRecord(Job(), request, None))

    for _ in range(2):
        await submitter.submit(tenant_id, request, JobOptions(), accept)
    assert [job.max_tokens + len(job.prompt_token_ids) for job in accepted] == [64, 32]
    await submitter.aclose()


@pytest.mark.parametrize(
    ("outcome", "is_answered", "num_rings"),
    [(AcceptOutcome.ACCEPTED, False, 1), (AcceptOutcome.ACCEPTED, True, 0), (AcceptOutcome.DUPLICATE, False, 0)],
)
async def test_workers_are_told_of_a_job_that_is_accepted_by_itself(
    tmp_path: Path, outcome: AcceptOutcome, is_answered: bool, num_rings: int
) -> None:
    file = tmp_path / "models.toml"
    file.write_text(FAKE.format(64))
    rung: list[UUID] = []
    views = ModelViews(Catalog.load(file))
    submitter = Submitter(Settings(), views, None, ring=lambda model, job_id: rung.append(job_id))  # type: ignore[arg-type]
    request = make_request(temperature=0)

    async def accept(new_job: NewJob) -> Accepted:
        record = JobRecord(Job(), request, None) if is_answered else None
        return Accepted(new_job.id, outcome, datetime.now(UTC), record)

    submitted = await submitter.submit(UUID(int=1), request, JobOptions(), accept)
    assert rung == [submitted.job_id] * num_rings
    await submitter.aclose()


def test_what_is_written_once_of_equal_jobs_is_what_each_would_write() -> None:
    first = NewJob(
        id=new_id(),
        tenant_id=UUID(int=1),
        request=make_request(max_tokens=3),
        prompt_token_ids=[1, 2],
        model_revision="r",
        max_tokens=3,
        seed=7,
        max_failures=3,
        result_ttl_seconds=60,
        request_hash=b"h",
        fingerprint=b"f",
        metadata={"a": "b"},
    )
    own: dict[str, Any] = {
        "id": new_id(),
        "idempotency_key": "key",
        "deadline_at": datetime.now(UTC),
        "retry_of": new_id(),
        "request_id": "req_1",
        "traceparent": "00-1",
        "key_id": "k",
        "eta": Eta.at(1.0),
        "call": ClientCall(1, 2, 3),
    }
    second = replace(first, **own)
    anew = orjson.loads(orjson.dumps(row_of(1, second, UUID(int=2))))
    assert orjson.loads(orjson.dumps(row_of(1, replace(second, written=written_once(first)), UUID(int=2)))) == anew
    assert anew["leader_id"] == str(UUID(int=2))
    assert set(own) - {"call"} <= set(anew)
    assert "adapter" not in anew
