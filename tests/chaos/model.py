"""The job protocol as a small state machine: two workers, one job, two tokens, one client, and everything that goes
wrong. `model_checker` walks through all of it.

What the statements of `storage/job_statements.py` and the reader of `storage/streams.py` do is written here once more,
each as one step that may fall between any two others. Two attempts never draw the same token (a token is named by the
model revision and the attempt that drew it and by its place), so whatever splices two texts is seen. Chunks that a
reset made void stay in the model's log, for what a client saw to be judged by. A paused worker needs no step of its
own: it is one that takes no step for a while, and its lease may lapse meanwhile.

Live messages lie in a set that nothing is taken out of: so they come late, twice, in any order, or never. A worker
that dies between its commit and its publishing is one whose messages never come. A message in the queue lets its taker
claim whatever is queued by then. One that is missing is sent again, and one may be too many, since whoever found it
missing sends it later.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

NUM_TOKENS = 2
MAX_MESSAGES = 1  # in the queue, beside those in hand; one more is one that was lost

QUEUED, IN_PROGRESS, COMPLETED, FAILED, CANCELLED = "queued", "in_progress", "completed", "failed", "cancelled"

Text = tuple[int, ...]  # tokens: 121 is the first one that attempt 2 drew, which ran revision 1
RESET = 0  # in the log: what came before is void


class Worker(NamedTuple):
    """A worker that runs the job, or believes so."""

    attempt: int
    text: Text
    num_committed: int  # as its last answer said
    is_told_to_cancel: bool = False
    base: int = 0  # the chunk behind which its text begins
    revision: int = 0


IDLE = None
HOLDS_MESSAGE = "holds a message"
WorkerState = Worker | str | None


class Budget(NamedTuple):
    """How often each thing may still go wrong."""

    kills: int = 1  # of a worker, or of its engine
    lapses: int = 1  # of the lease of a worker that lives
    flushes: int = 1  # of Redis
    lost_answers: int = 1  # the connection dies while a statement commits
    api_kills: int = 1
    releases: int = 1
    cancels: int = 0
    errors: int = 0  # the engine refuses the job for good
    upgrades: int = 0  # to another revision of the model, and back again


class State(NamedTuple):
    # The row
    status: str | None = None  # None: not accepted
    attempt: int = 0
    chunks: Text = ()  # the log, with all that was in it
    is_lease_valid: bool = False
    is_cancel_requested: bool = False
    num_failures: int = 0
    result: Text | None = None
    revision: int = 0
    # Redis
    num_messages: int = 0
    live: frozenset[tuple[int, int]] = frozenset()  # (sequence number, token) on their way to the client's API
    # Processes
    workers: tuple[WorkerState, WorkerState] = (IDLE, IDLE)
    is_push_pending: bool = False  # somebody has accepted the job, or found a message missing, and will send one
    is_rescue_pending: bool = False  # only where the janitor acts on a stale snapshot
    served: int = 0  # the revision of workers that claim from now on
    # The client
    has_accepted: bool = False  # it got its 202
    stream: str = "closed"  # closed, behind, live, ended
    seen: Text = ()
    budget: Budget = Budget()


@dataclass(frozen=True)
class Protocol:
    """The protocol as it is; each field taken away makes a mutant of it."""

    checks_attempt: bool = True
    checks_sequence_number: bool = True
    rescues_on_locked_row: bool = True  # else: on what a snapshot said before
    commits_before_publishing: bool = True
    continues_committed_text: bool = True  # else: starts from scratch
    fills_gaps: bool = True
    sends_missing: bool = True  # messages; else only the API sends one, after the accept
    pins_revision: bool = True  # a job with output goes on under the revision that it came from
    writes_revision: bool = True  # at a claim
    restarts: bool = True  # begins anew where that revision is gone
    polls: bool = False  # an idle worker claims straight from SQL
    max_failures: int = 3


class Step(NamedTuple):
    name: str
    after: State
    is_fault: bool = False  # else the system does it by itself, sooner or later
    by_attempt: int = 0  # of the worker that did it


def text_of(chunks: Text) -> Text:
    """What the log amounts to."""
    return chunks[base_of(chunks) :]


def base_of(chunks: Text) -> int:
    return len(chunks) - chunks[::-1].index(RESET) if RESET in chunks else 0


def is_over(state: State) -> bool:
    """The job has ended and its client has seen all of it."""
    return state.stream == "ended"


def is_terminal(status: str | None) -> bool:
    return status in (COMPLETED, FAILED, CANCELLED)


def steps(state: State, protocol: Protocol) -> Iterator[Step]:
    """Everything that can happen next. Where all is over only workers remain, whom no row answers any more."""
    if is_over(state):
        return
    yield from _client_steps(state, protocol)
    if state.status is None:
        return
    yield from _dispatch_steps(state, protocol)
    yield from _janitor_steps(state, protocol)
    first, second = state.workers
    yield from _worker_steps(state, first, second, protocol)
    if second != first:
        yield from _worker_steps(state, second, first, protocol)


# The client and its API


def _client_steps(state: State, protocol: Protocol) -> Iterator[Step]:
    budget = state.budget
    if not state.has_accepted:
        row = state._replace(status=QUEUED) if state.status is None else state  # else: a duplicate
        is_new = state.status is None
        yield Step("accept", row._replace(has_accepted=True, is_push_pending=is_new or state.is_push_pending))
        if state.status is None and budget.lost_answers:
            fewer = budget._replace(lost_answers=budget.lost_answers - 1)
            yield Step("accept, answer lost", row._replace(budget=fewer), is_fault=True)
        return
    if state.stream == "closed":
        yield Step("subscribe", state._replace(stream="behind", live=frozenset()))
    elif state.stream == "behind":
        yield Step("read log", _look(state))
    elif state.stream == "live":
        if _look(state) != state:
            yield Step("break the silence", _look(state))
        for sequence_number, token in state.live:
            if sequence_number == len(state.seen) + 1 or not protocol.fills_gaps:
                yield Step("receive", _dropping_old(state._replace(seen=(*state.seen, token))))
            else:
                yield Step("find a gap", state._replace(stream="behind"))
    if budget.api_kills and state.stream != "ended":
        fewer = budget._replace(api_kills=budget.api_kills - 1)
        gone = state._replace(stream="closed", live=frozenset(), is_push_pending=False, budget=fewer)
        yield Step("kill API", gone, is_fault=True)
    if budget.cancels and not is_terminal(state.status):
        fewer = budget._replace(cancels=budget.cancels - 1)
        asked = state._replace(is_cancel_requested=True, budget=fewer)
        yield Step("cancel", _ended(asked, CANCELLED) if state.status == QUEUED else asked, is_fault=True)


def _look(state: State) -> State:
    """The reader reads SQL: the status, then the chunks."""
    seen = state.seen + state.chunks[len(state.seen) :]
    return _dropping_old(state._replace(seen=seen, stream="ended" if is_terminal(state.status) else "live"))


def _dropping_old(state: State) -> State:
    """Messages that the reader would drop are no part of the state."""
    return state._replace(live=frozenset(message for message in state.live if message[0] > len(state.seen)))


# Dispatch, janitor, Redis


def _dispatch_steps(state: State, protocol: Protocol) -> Iterator[Step]:
    budget = state.budget
    is_missing = _is_claimable(state, protocol) and not state.num_messages
    if is_missing and not state.is_push_pending and protocol.sends_missing:
        yield Step("find a message missing", state._replace(is_push_pending=True))
    if state.is_push_pending:
        num_messages = min(state.num_messages + 1, MAX_MESSAGES)
        yield Step("push", state._replace(is_push_pending=False, num_messages=num_messages))
    if budget.flushes and (state.num_messages or state.live):
        fewer = budget._replace(flushes=budget.flushes - 1)
        yield Step("flush Redis", state._replace(num_messages=0, live=frozenset(), budget=fewer), is_fault=True)


def _janitor_steps(state: State, protocol: Protocol) -> Iterator[Step]:
    budget = state.budget
    if state.status == IN_PROGRESS and state.is_lease_valid:
        lapsed = state._replace(is_lease_valid=False)
        if not any(isinstance(worker, Worker) and worker.attempt == state.attempt for worker in state.workers):
            yield Step("lease lapses", lapsed)
        elif budget.lapses:
            fewer = budget._replace(lapses=budget.lapses - 1)
            yield Step("lease lapses under its owner", lapsed._replace(budget=fewer), is_fault=True)
    if budget.upgrades:
        fewer = budget._replace(upgrades=budget.upgrades - 1)
        yield Step("upgrade", state._replace(served=1 - state.served, budget=fewer), is_fault=True)
    is_gone = bool(text_of(state.chunks)) and state.revision != state.served
    if protocol.restarts and state.status == QUEUED and is_gone:
        yield Step("restart", state._replace(chunks=(*state.chunks, RESET)))
    is_lapsed = state.status == IN_PROGRESS and not state.is_lease_valid
    if protocol.rescues_on_locked_row:
        if is_lapsed:
            yield Step("rescue", _charge(state, protocol))
        return
    if is_lapsed and not state.is_rescue_pending:
        yield Step("find a lapsed lease", state._replace(is_rescue_pending=True))
    if state.is_rescue_pending:
        yield Step("rescue what was found", _charge(state, protocol)._replace(is_rescue_pending=False))


def _charge(state: State, protocol: Protocol) -> State:
    """An attempt was lost: queued again with the committed text kept, or over."""
    num_failures = state.num_failures + 1
    charged = state._replace(num_failures=num_failures)
    if num_failures > protocol.max_failures and not state.is_cancel_requested:
        return _ended(charged, FAILED)
    return _given_back(charged)


def _given_back(state: State) -> State:
    if state.is_cancel_requested:
        return _ended(state, CANCELLED)
    return state._replace(status=QUEUED, is_lease_valid=False)


def _ended(state: State, status: str) -> State:
    """Over; what was committed is its result."""
    return state._replace(status=status, is_lease_valid=False, result=text_of(state.chunks))


# Workers


def _worker_steps(state: State, worker: WorkerState, other: WorkerState, protocol: Protocol) -> Iterator[Step]:
    budget = state.budget
    if worker is not IDLE and budget.kills:
        fewer = budget._replace(kills=budget.kills - 1)
        yield Step("kill worker", _with(state, IDLE, other)._replace(budget=fewer), is_fault=True)
    if isinstance(worker, Worker):
        for step in _running_steps(state, worker, other, protocol):
            yield step._replace(by_attempt=worker.attempt)
        return
    if worker is IDLE and state.num_messages:
        taken = state._replace(num_messages=state.num_messages - 1)
        yield Step("take a message", _with(taken, HOLDS_MESSAGE, other))
    if worker == HOLDS_MESSAGE or (protocol.polls and state.status == QUEUED):
        yield from _claim_steps(state, other, protocol)


def _is_claimable(state: State, protocol: Protocol) -> bool:
    is_ours = not text_of(state.chunks) or state.revision == state.served or not protocol.pins_revision
    return state.status == QUEUED and is_ours


def _claim_steps(state: State, other: WorkerState, protocol: Protocol) -> Iterator[Step]:
    prefix = text_of(state.chunks)
    if not _is_claimable(state, protocol):
        yield Step("find nothing to claim", _with(state, IDLE, other))
        return
    attempt = state.attempt + 1
    row = state._replace(status=IN_PROGRESS, attempt=attempt, is_lease_valid=True)
    if protocol.writes_revision:
        row = row._replace(revision=state.served)
    text = prefix if protocol.continues_committed_text else ()
    claimed = Worker(attempt, text, len(prefix), base=base_of(state.chunks), revision=state.served)
    yield Step("claim", _with(row, claimed, other))
    if budget := _one_lost_answer_less(state):
        yield Step("claim, answer lost", _with(row._replace(budget=budget), IDLE, other), is_fault=True)


def _running_steps(state: State, worker: Worker, other: WorkerState, protocol: Protocol) -> Iterator[Step]:
    if len(worker.text) < NUM_TOKENS and not worker.is_told_to_cancel:
        token = 100 * worker.revision + 10 * worker.attempt + len(worker.text) + 1
        longer = worker._replace(text=(*worker.text, token))
        known = state if protocol.commits_before_publishing else _published(state, longer)
        yield Step("generate", _with(known, longer, other))
    if len(worker.text) > worker.num_committed:
        yield from _commit_steps(state, worker, other, protocol)
    if worker.is_told_to_cancel or worker.num_committed == NUM_TOKENS:
        status = CANCELLED if worker.is_told_to_cancel else COMPLETED
        yield from _finalise_steps(state, worker, other, protocol, status)
    yield from _other_running_steps(state, worker, other, protocol)


def _other_running_steps(state: State, worker: Worker, other: WorkerState, protocol: Protocol) -> Iterator[Step]:
    budget = state.budget
    is_ours = _is_ours(state, worker, protocol)
    if not is_ours:
        yield Step("renew: fenced", _with(state, IDLE, other))
    elif not state.is_lease_valid or worker.is_told_to_cancel != state.is_cancel_requested:
        held = worker._replace(is_told_to_cancel=state.is_cancel_requested)
        yield Step("renew", _with(state._replace(is_lease_valid=True), held, other))
    if budget.releases:
        fewer = state._replace(budget=budget._replace(releases=budget.releases - 1))
        yield Step("release", _with(_given_back(fewer) if is_ours else fewer, IDLE, other), is_fault=True)
    if budget.kills:
        fewer = state._replace(budget=budget._replace(kills=budget.kills - 1))
        returned = _charge(fewer, protocol) if is_ours else fewer
        yield Step("engine crash", _with(returned, IDLE, other), is_fault=True)
    if budget.errors:
        fewer = state._replace(budget=budget._replace(errors=budget.errors - 1))
        for step in _finalise_steps(fewer, worker, other, protocol, FAILED):
            yield step._replace(is_fault=True)


def _commit_steps(state: State, worker: Worker, other: WorkerState, protocol: Protocol) -> Iterator[Step]:
    before, after = worker.num_committed, len(worker.text)
    is_next = len(state.chunks) - worker.base in (before, after) or not protocol.checks_sequence_number
    if not _is_ours(state, worker, protocol) or not is_next:
        yield Step("commit: fenced", _with(state, IDLE, other))
        return
    row = state._replace(is_lease_valid=True)
    if len(state.chunks) - worker.base == before or not protocol.checks_sequence_number:  # else: a repeated commit
        row = row._replace(chunks=state.chunks + worker.text[before:])
    held = worker._replace(num_committed=after, is_told_to_cancel=state.is_cancel_requested)
    yield Step("commit", _with(_published(row, worker), held, other))
    if budget := _one_lost_answer_less(state):
        yield Step("commit, answer lost", _with(row._replace(budget=budget), worker, other), is_fault=True)


def _published(state: State, worker: Worker) -> State:
    """Its newest tokens are on their way to whoever listens."""
    if state.stream == "closed":
        return state
    places = enumerate(worker.text, start=1)
    news = {(worker.base + place, token) for place, token in places if place > worker.num_committed}
    return _dropping_old(state._replace(live=state.live | news))


def _finalise_steps(
    state: State, worker: Worker, other: WorkerState, protocol: Protocol, status: str
) -> Iterator[Step]:
    is_last = len(state.chunks) - worker.base == worker.num_committed or not protocol.checks_sequence_number
    if not _is_ours(state, worker, protocol) or not is_last:
        yield Step("finalise: fenced", _with(state, IDLE, other))
        return
    row = _ended(state, status)._replace(result=worker.text[: worker.num_committed])
    yield Step(f"finalise {status}", _with(row, IDLE, other))
    if budget := _one_lost_answer_less(state):
        yield Step("finalise, answer lost", _with(row._replace(budget=budget), worker, other), is_fault=True)


def _is_ours(state: State, worker: Worker, protocol: Protocol) -> bool:
    return state.status == IN_PROGRESS and (state.attempt == worker.attempt or not protocol.checks_attempt)


def _one_lost_answer_less(state: State) -> Budget | None:
    budget = state.budget
    return budget._replace(lost_answers=budget.lost_answers - 1) if budget.lost_answers else None


def _with(state: State, worker: WorkerState, other: WorkerState) -> State:
    """The workers are alike, so their order is no part of the state."""
    pair = (worker, other) if _order(worker) <= _order(other) else (other, worker)
    return state._replace(workers=pair)


def _order(worker: WorkerState) -> tuple[int, tuple[object, ...]]:
    if isinstance(worker, Worker):
        return 2, tuple(worker)
    return (0 if worker is IDLE else 1), ()
