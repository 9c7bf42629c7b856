"""Which jobs may have crashed an engine, and how the guilty one is found: the state machine of suspicion.

When an engine dies, the jobs of its last step are accused. What a job is from then on is kept in SQL, as its `lane` and
its `num_suspicions`; the transitions are made by the statements REPORT_CRASH (storage/job_ends.py) and
COMMIT_CHUNKS (storage/job_statements.py). What a worker does about them is decided here.

| state       | lane, num_suspicions | runs                   | accused of a crash   | 16 new tokens |
|-------------|----------------------|------------------------|----------------------|---------------|
| clear       | standard, 0          | with others            | suspected (+1) or quarantined (+2) | clear |
| suspected   | standard, 1          | with others            | quarantined          | clear         |
| quarantined | isolated, 2 or more  | alone: its trial       | failed: `poison_job` | clear         |
| confined    | isolated, 0          | alone, to its end      | failed: `poison_job` | confined      |

A confined job is a permitted retry of a poison job, or belongs to a tenant with many of them. "Alone" means in an
engine that has had no other job.

| the engine ended                                            | accused                                            |
|-------------------------------------------------------------|----------------------------------------------------|
| by a signal or an exit code of its own, or killed as hung   | its last step: +2 for who just came in, +1 for others |
| killed from outside, and the kernel has counted an OOM kill | its last step, +1; nobody who ran alone            |
| killed from outside otherwise (an operator, a daemon)       | nobody                                             |
| at rest, or before it was loaded                            | nobody                                             |

An OOM kill convicts nobody, since the memory may have been another process's.
So a poisonous job costs at most three engines, two of them shared, and no job fails for a crash that it shared with
others (but each counts as one of the failures that CELERIAC_MAX_FAILURES bounds). Crashes may also be the worker's own
fault, its device's or its installation's: too many in a short time, or several in which no two accused the same job.
Then the worker releases its jobs and ends.
"""

import logging
import math
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path
from time import monotonic
from uuid import UUID

from gpu_worker.engine_process.signs_of_life import RecordedJob
from gpu_worker.engine_process.supervisor import EngineExit
from gpu_worker.job import RunningJob
from storage.job_statements import PROVEN_TOKENS

log = logging.getLogger(__name__)

RECENT_STEPS = 3  # a job that came in this lately is suspected first
OWN_CGROUPS = Path("/proc/self/cgroup")
CGROUP_ROOT = Path("/sys/fs/cgroup")
HOST_COUNTERS = Path("/proc/vmstat")
COUNTER = "oom_kill"  # of processes killed, by that name in both files


@dataclass(frozen=True, slots=True)
class QuarantineRules:
    """How soon a worker looks for jobs that must run alone, and how many crashes are its own fault."""

    idle_look_seconds: float = 2.0  # between two looks of a worker without jobs
    busy_look_seconds: float = 30.0  # between two looks of a busy worker: whoever is confined runs alone to the end
    busy_trial_look_seconds: float = 10.0  # the same for quarantined jobs, whose trial is short
    neighbour_seconds: float = 1.0  # how long the others may go on before a trial; then they are released
    max_crashes: int = 5  # within `crash_seconds`, whoever is accused of them: one more than a worker may have
    crash_seconds: float = 120.0
    max_unrelated_crashes: int = 3  # within `unrelated_seconds`, no two of which accuse the same job
    unrelated_seconds: float = 600.0


SHIPPED_RULES = QuarantineRules()


class Action(Enum):
    """What the job that must run alone needs next."""

    WAIT = auto()
    RELEASE_OTHERS = auto()
    REPLACE_ENGINE = auto()
    START = auto()


@dataclass(frozen=True, slots=True)
class Crash:
    """One that no trial explains."""

    at: float
    accused: frozenset[UUID]
    is_outside_kill: bool


@dataclass(frozen=True, slots=True)
class Verdict:
    """On one crash."""

    weight_by_job_id: dict[UUID, int]  # of all the engine's jobs; 0: it is not accused
    num_crashes_before: int  # lately, without those that a trial explains


class OomKills:
    """The kernel's count of OOM kills in our own control group and below (cgroup v2), or else on the whole host: tells
    whether lack of memory explains a SIGKILL."""

    def __init__(self, paths: Sequence[Path] | None = None) -> None:
        self._paths = [*_own_group(), HOST_COUNTERS] if paths is None else paths
        self._num_seen = self._count()

    def is_possible(self) -> bool:
        """Whether the OOM killer has killed since the last call; True if the kernel's count cannot be read."""
        num_before, self._num_seen = self._num_seen, self._count()
        return self._num_seen is None or self._num_seen != num_before

    def _count(self) -> int | None:
        for path in self._paths:
            with suppress(OSError):
                words_by_line = [line.split() for line in path.read_text().splitlines()]
                return next((int(words[1]) for words in words_by_line if words[:1] == [COUNTER]), None)
        return None


def _own_group() -> list[Path]:
    """`memory.events` of the group that we and the engine belong to; the root group has none."""
    with suppress(OSError):
        groups = [line.removeprefix("0::/") for line in OWN_CGROUPS.read_text().splitlines() if line.startswith("0::/")]
        return [CGROUP_ROOT / group / "memory.events" for group in groups]
    return []


class Quarantine:
    """One worker's. Belongs to the runner's thread; does no I/O but reading the kernel's count of OOM kills."""

    def __init__(self, rules: QuarantineRules = SHIPPED_RULES, oom_kills: OomKills | None = None) -> None:
        self._rules = rules
        self._oom_kills = oom_kills or OomKills()
        self._crashes: deque[Crash] = deque(maxlen=rules.max_crashes)
        self._looked_at = self._looked_for_trials_at = -math.inf
        self.job: RunningJob | None = None  # it waits until it is alone, or runs alone; the others wait for it

    # When to look for one

    def take_look(self, now: float, *, is_resting: bool) -> int | None:
        """Whether to claim a job of the isolated lane now: the least `num_suspicions` it must have; None: not yet."""
        look_seconds = self._rules.idle_look_seconds if is_resting else self._rules.busy_look_seconds
        if now - self._looked_at >= look_seconds:
            self._looked_at = self._looked_for_trials_at = now
            return 0
        if now - self._looked_for_trials_at >= self._rules.busy_trial_look_seconds:
            self._looked_for_trials_at = now
            return 1
        return None

    def look_soon(self) -> None:
        """For a trial: the engine is fresh and still empty, or a trial has ended and there may be more to do."""
        self._looked_for_trials_at = -math.inf

    # The job that runs alone

    def admit(self, job: RunningJob) -> None:
        log.warning("a job is run alone", extra={"job_id": job.name, "attempt": job.attempt})
        self.job = job

    def discharge(self, job: RunningJob) -> None:
        """It is not this worker's any more."""
        if job is self.job:
            self.job = None

    def discharge_if_clear(self) -> None:
        """Let others join a job whose trial has ended well. SQL clears it with the commit of the same tokens."""
        job = self.job
        if job is not None and job.claimed.num_suspicions > 0 and job.num_new_tokens >= PROVEN_TOKENS:
            log.info("a suspect is cleared", extra={"job_id": job.name, "attempt": job.attempt})
            self.job = None
            self.look_soon()

    def next_action(self, now: float, *, is_alone: bool, is_engine_fresh: bool, is_engine_ready: bool) -> Action:
        """For a trial the others make room soon, and go on elsewhere or after it; a confined job waits for their ends.
        The engine must be fresh: what another job left behind in it must not be blamed on this one."""
        job = self.job
        if job is None or job.is_in_engine or job.is_over:
            return Action.WAIT
        if not is_alone:
            is_due = job.claimed.num_suspicions > 0 and now - job.started_at > self._rules.neighbour_seconds
            return Action.RELEASE_OTHERS if is_due else Action.WAIT
        if not is_engine_fresh:
            return Action.REPLACE_ENGINE
        return Action.START if is_engine_ready else Action.WAIT

    # Crashes

    def judge(self, exit_: EngineExit, jobs: Sequence[RunningJob]) -> Verdict:
        """Who is accused; `jobs` were in the engine. To be called once for each end that nobody asked for."""
        now = monotonic()
        num_before = sum(now - crash.at < self._rules.crash_seconds for crash in self._crashes)
        is_trial = self.job is not None and list(jobs) == [self.job]
        weight_by_job_id = self._accuse(exit_, jobs, is_trial=is_trial)
        accused = frozenset(job_id for job_id, weight in weight_by_job_id.items() if weight)
        if not (is_trial and accused):
            self._crashes.append(Crash(now, accused, exit_.is_outside_kill))
        return Verdict(weight_by_job_id, num_before)

    def _accuse(self, exit_: EngineExit, jobs: Sequence[RunningJob], *, is_trial: bool) -> dict[UUID, int]:
        recorded = {(job.job_id, job.attempt): weight_of(job) for job in exit_.last_step}
        weight_by_job_id = {job.id: recorded.get((job.name, job.attempt), 0) for job in jobs}
        if not exit_.is_outside_kill:
            return weight_by_job_id
        is_memory_short = self._oom_kills.is_possible()
        most = 1 if is_memory_short and not is_trial else 0
        return {job_id: min(weight, most) for job_id, weight in weight_by_job_id.items()}

    @property
    def is_worker_at_fault(self) -> bool:
        """So much has gone wrong that it cannot be a job."""
        now, rules = monotonic(), self._rules
        if len(self._crashes) == rules.max_crashes and now - self._crashes[0].at < rules.crash_seconds:
            return True
        # A kill from outside says nothing about the device.
        recent = [c for c in self._crashes if now - c.at < rules.unrelated_seconds and not c.is_outside_kill]
        last = recent[-rules.max_unrelated_crashes :]
        num_accused = sum(len(crash.accused) for crash in last)
        are_unrelated = len(frozenset[UUID]().union(*(crash.accused for crash in last))) == num_accused
        return len(last) == rules.max_unrelated_crashes and are_unrelated


def weight_of(job: RecordedJob) -> int:
    """How strongly a job is suspected when this step was the last."""
    return 2 if job.is_prefill or job.num_steps <= RECENT_STEPS else 1
