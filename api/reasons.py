"""What may be wrong with an installation: a code for each trouble, and a sentence with its remedy.

Anyone may read the sentences, in /health: they hold no address, no path and nothing about single jobs.
"""

import asyncio
from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import dataclass
from enum import StrEnum
from itertools import groupby

from api.queue_monitor import STALE_SECONDS, Finding, QueueMonitor
from domain.catalog import Catalog
from domain.jobs import IN_GOOD_ORDER, WaitingFor
from domain.troubles import WORDS, Trouble
from storage.troubles import SilentProcess, SilentWorker, Told


class ReasonCode(StrEnum):
    """The label of the metric; a sentence goes with each."""

    DATABASE_UNAVAILABLE = "database_unavailable"
    DATABASE_CONNECTIONS = "database_connections"
    DATABASE_FULL = "database_full"
    DATABASE_READ_ONLY = "database_read_only"
    DATABASE_LOCKED = "database_locked"
    DATABASE_SLOW = "database_slow"
    DATABASE_SCHEMA = "database_schema"
    DATABASE_NEGLECTED = "database_neglected"
    CLOCK = "clock"
    CERTIFICATE = "certificate"
    REDIS_UNAVAILABLE = "redis_unavailable"
    REDIS_FULL = "redis_full"
    REDIS_REFUSES = "redis_refuses"
    REDIS_SLOW = "redis_slow"
    REDIS_EVICTS = "redis_evicts"
    NO_WORKER = "no_worker"
    WORKER_SILENT = "worker_silent"
    PROCESS_SILENT = "process_silent"
    PROCESS_REDIS = "process_redis"
    PROCESS_DATABASE = "process_database"
    ENGINE_STUCK = "engine_stuck"
    ENGINE_ENDED = "engine_ended"
    MODEL_FAILED = "model_failed"
    CLAIMS_FAIL = "claims_fail"
    LOG_FAILED = "log_failed"
    ARCHIVE_FAILED = "archive_failed"
    MAINTENANCE_SILENT = "maintenance_silent"
    STOPPING = "stopping"
    JOBS_WAIT = "jobs_wait"
    MODEL_UNAVAILABLE = "model_unavailable"


#: With any of these, no job can be accepted.
FATAL = frozenset({ReasonCode.DATABASE_UNAVAILABLE, ReasonCode.DATABASE_FULL, ReasonCode.DATABASE_READ_ONLY})
#: With any of these, that the queues cannot be read needs no reason of its own.
EXPLAIN_SILENCE = FATAL | {
    ReasonCode.DATABASE_LOCKED,
    ReasonCode.DATABASE_CONNECTIONS,
    ReasonCode.DATABASE_SLOW,
    ReasonCode.DATABASE_SCHEMA,
}
OF_REDIS = frozenset({ReasonCode.REDIS_UNAVAILABLE, ReasonCode.REDIS_FULL, ReasonCode.REDIS_REFUSES})


#: A process that tells the trouble has it for these reasons, as all others do.
EVERYBODYS = {
    Trouble.REDIS: OF_REDIS | {ReasonCode.REDIS_SLOW},
    Trouble.DATABASE: frozenset({ReasonCode.DATABASE_SLOW, ReasonCode.DATABASE_LOCKED}),
}

NO_JOBS = "no job can be accepted"


@dataclass(frozen=True, slots=True)
class Reason:
    code: ReasonCode
    sentence: str  # what is wrong, a colon, and what to do


MAX_NAMED = 5

KINDS = {"worker": "a worker", "api": "an API", "maintenance": "a maintenance process"}


def _first(names: Sequence[str]) -> str:
    """Of a rack that was switched off, some: a sentence with fifty models is not read."""
    others = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return ", ".join(names[:MAX_NAMED]) + others


def silent_worker_reasons(silent: Sequence[SilentWorker]) -> Iterator[Reason]:
    """All silent workers in one sentence, which does not name their hosts to everybody."""
    if silent:
        told = _first([f"of {worker.model} for {worker.seconds:.0f} s" for worker in silent])
        remedy = "it was killed, is frozen or cut off, restart it or see its log; celeriac doctor names it"
        yield Reason(ReasonCode.WORKER_SILENT, f"a worker is silent ({told}): {remedy}")


def silent_process_reasons(silent: Sequence[SilentProcess]) -> Iterator[Reason]:
    for kind, alike in groupby(silent, key=lambda process: process.kind):
        told = _first([f"for {process.seconds:.0f} s" for process in alike])
        remedy = "it was killed, is frozen or cut off, restart it or see its log; celeriac doctor names it"
        yield Reason(ReasonCode.PROCESS_SILENT, f"{KINDS.get(kind, kind)} is silent ({told}): {remedy}")


def told_reasons(told: Iterable[Told], codes: Set[ReasonCode]) -> Iterator[Reason]:
    """What processes find wrong with themselves, a sentence for each kind of trouble. `codes` is what is wrong with the
    servers that all of them use."""
    known = [one for one in told if one.code in set(Trouble)]
    known = [one for one in known if not codes & EVERYBODYS.get(Trouble(one.code), frozenset())]
    for (code, kind), alike in groupby(sorted(known, key=_trouble), key=_trouble):
        models = _first(sorted({one.model for one in alike if one.model}))
        what, remedy = WORDS[Trouble(code)]
        who = KINDS.get(kind, kind) + (f" of {models}" if models else "")
        yield Reason(ReasonCode(code), f"{who} {what}: {remedy}; celeriac doctor names it")


def _trouble(told: Told) -> tuple[str, str]:
    return told.code, told.kind


#: What an operator should do, by what the jobs wait for.
ADVICE = {
    WaitingFor.WORKER: "this model has no live worker: start one with celeriac worker --model {model}",
    WaitingFor.MODEL_LOAD: "its workers are loading the model or busy with others, or its remote server is away: see "
    "celeriac workers, and their logs",
    WaitingFor.REVISION: "they started with a revision of the model that no worker serves any more: see "
    "CELERIAC_REVISION_POLICY, or cancel and retry them",
    WaitingFor.ISOLATION: "they must run alone, as their tenant's jobs have crashed an engine: see the workers' logs",
    WaitingFor.LIMIT: "batch jobs have used up their share of the slots: see CELERIAC_BATCH_RESERVE",
    WaitingFor.PAUSE: "the model is unloaded, or its workers are draining: load it, or resume or start a worker",
}


def advice(finding: Finding) -> str:
    return ADVICE[finding.reason].format(model=finding.model)


def installation_reasons(
    monitor: QueueMonitor, catalog: Catalog, draining: asyncio.Event, seen: Iterable[Reason]
) -> Iterator[Reason]:
    """What the queue monitor knows. While the database is at fault, which `seen` tells, nobody else is blamed."""
    codes = {reason.code for reason in seen}
    if not codes & EXPLAIN_SILENCE and not monitor.is_fresh:
        how_long = f"for {STALE_SECONDS:g} s" if monitor.has_read else "yet"
        remedy = "the database is slow, see what runs in pg_stat_activity"
        yield Reason(ReasonCode.DATABASE_SLOW, f"the queues could not be read {how_long}: {remedy}")
    if monitor.is_fresh:
        yield from _absences(monitor)
    if draining.is_set():
        yield Reason(ReasonCode.STOPPING, "this API process is stopping")
    for finding in monitor.findings:
        if finding.reason not in IN_GOOD_ORDER:
            waiting = f"jobs of {finding.model} have been waiting for {finding.reason.value}"
            yield Reason(ReasonCode.JOBS_WAIT, f"{waiting}: {advice(finding)}")
    for model in catalog.unavailable:
        yield Reason(ReasonCode.MODEL_UNAVAILABLE, f"model {model} is unavailable: /v1/models says why")


def _absences(monitor: QueueMonitor) -> Iterator[Reason]:
    if not any(queue.num_workers for queue in monitor.queues.values()):
        remedy = "start one with celeriac worker, or see the logs of those that are loading"
        yield Reason(ReasonCode.NO_WORKER, f"no worker is ready: {remedy}")
    if silent := monitor.silent_clocks:
        named = ", ".join(silent)
        remedy = "start celeriac maintenance, or see its log"
        yield Reason(ReasonCode.MAINTENANCE_SILENT, f"maintenance is silent ({named}): {remedy}")
