"""Finds the job that crashes engines: the state machine of suspicion and quarantine.

When an engine dies, the jobs of its last step are accused. A job's state is then stored in SQL, in `lane` and
`num_suspicions`. The statements REPORT_CRASH (storage/job_ends.py) and COMMIT_CHUNKS (storage/job_statements.py) make
the transitions; this file decides what a worker does about them.

| state       | lane, num_suspicions | runs                   | accused of a crash   | 16 new tokens |
|-------------|----------------------|------------------------|----------------------|---------------|
| clear       | standard, 0          | with others            | suspected (+1) or quarantined (+2) | clear |
| suspected   | standard, 1          | with others            | quarantined          | clear         |
| quarantined | isolated, 2 or more  | alone: its trial       | failed: `poison_job` | clear         |
| confined    | isolated, 0          | alone, to its end      | failed: `poison_job` | confined      |

A confined job is an explicitly permitted retry of a poison job, or belongs to a tenant with many of them. "Alone" means
in an engine that has had no other job.

| the engine ended                                            | accused                                              |
|-------------------------------------------------------------|------------------------------------------------------|
| by a signal or exit code of its own, or killed as hung      | its last step: +2 for jobs that just came in, else +1 |
| killed from outside, and the kernel has counted an OOM kill | its last step, +1, unless the job ran alone          |
| killed from outside otherwise (an operator, a daemon)       | no job                                               |
| while idle, or before it was loaded                         | no job                                               |

An OOM kill never fails a job, since another process may have taken the memory.

A poison job therefore costs at most three engines, two of them shared. No job fails for a crash that it shared with
others, although each such crash counts as one of the failures that CELERIAC_MAX_FAILURES limits. Crashes may also be
due to the worker itself, its device or its installation: too many in a short time, or several that have no accused job
in common. Then the worker releases its jobs and exits.
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

from gpu_worker.engine.control_groups import groups
from gpu_worker.engine_process.signs_of_life import RecordedJob
from gpu_worker.engine_process.supervisor import EngineExit
from gpu_worker.job import RunningJob
from storage.job_statements import PROVEN_TOKENS

log = logging.getLogger(__name__)

RECENT_STEPS = 3  # a job that came in within this many steps is suspected more strongly
SYSTEM_ROOT = Path("/")  # holds proc and sys
COUNTER_FILES = {1: "memory.oom_control", 2: "memory.events"}  # by the version of the kernel's control groups
COUNTER = "oom_kill"  # the number of killed processes; all files use this name


@dataclass(frozen=True, slots=True)
class QuarantineRules:
    """How often a worker looks for jobs that must run alone, and how many crashes it takes to blame the worker."""

    idle_look_seconds: float = 2.0  # how often an idle worker looks
    busy_look_seconds: float = 30.0  # how often a busy worker looks for confined jobs, which run alone to their end
    busy_trial_look_seconds: float = 10.0  # how often it looks for quarantined jobs, whose trial is short
    neighbour_seconds: float = 1.0  # how long the others may continue before a trial; then they are released
    max_crashes: int = 5  # this many within `crash_seconds` are the worker's fault, whichever jobs are accused
    crash_seconds: float = 120.0
    max_unrelated_crashes: int = 3  # likewise within `unrelated_seconds`, if no two of them accuse the same job
    unrelated_seconds: float = 600.0


SHIPPED_RULES = QuarantineRules()


class Action(Enum):
    """What to do next for the job that must run alone."""

    WAIT = auto()
    RELEASE_OTHERS = auto()
    REPLACE_ENGINE = auto()
    START = auto()


@dataclass(frozen=True, slots=True)
class Crash:
    """A crash that was not part of a trial."""

    at: float
    accused: frozenset[UUID]
    is_outside_kill: bool


@dataclass(frozen=True, slots=True)
class Verdict:
    """The conclusions from one crash."""

    how: str  # it ended, in words for operators
    weight_by_job_id: dict[UUID, int]  # for all jobs in the engine; 0 if the job is not accused
    num_crashes_before: int  # recent crashes that were not part of a trial


class OomKills:
    """Tells whether a SIGKILL may have come from the OOM killer. Uses the kernel's count of OOM kills in our control
    group and below it, or else on the whole host."""

    def __init__(self, paths: Sequence[Path] | None = None) -> None:
        self._paths = _counters() if paths is None else paths
        self._num_seen = self._count()

    def is_possible(self) -> bool:
        """Whether the OOM killer has killed any process since the last call; True if the count cannot be read."""
        num_before, self._num_seen = self._num_seen, self._count()
        return self._num_seen is None or self._num_seen != num_before

    def _count(self) -> int | None:
        for path in self._paths:
            with suppress(OSError):
                words_by_line = [line.split() for line in path.read_text().splitlines()]
                return next((int(words[1]) for words in words_by_line if words[:1] == [COUNTER]), None)
        return None


def _counters() -> list[Path]:
    """Where the kernel may count, the nearest first: in the files of our control group, of those around it, and of the
    host. The root group of the second version has none."""
    paths = [folder / COUNTER_FILES[version] for folder, version in groups(SYSTEM_ROOT, "memory")]
    return [*paths, SYSTEM_ROOT / "proc/vmstat"]


class Quarantine:
    """One worker's view of suspects. Used only by the runner's thread. Its only I/O is reading the kernel's count of
    OOM kills."""

    def __init__(self, rules: QuarantineRules = SHIPPED_RULES, oom_kills: OomKills | None = None) -> None:
        self._rules = rules
        self._oom_kills = oom_kills or OomKills()
        self._crashes: deque[Crash] = deque(maxlen=rules.max_crashes)
        self._looked_at = self._looked_for_trials_at = -math.inf
        self.job: RunningJob | None = None  # the job that runs alone, or waits to; no other job is started meanwhile

    # When to look for a job that must run alone

    def take_look(self, now: float, *, is_resting: bool) -> int | None:
        """The least `num_suspicions` of a job to claim from the isolated lane now; None if it is not time to look."""
        look_seconds = self._rules.idle_look_seconds if is_resting else self._rules.busy_look_seconds
        if now - self._looked_at >= look_seconds:
            self._looked_at = self._looked_for_trials_at = now
            return 0
        if now - self._looked_for_trials_at >= self._rules.busy_trial_look_seconds:
            self._looked_for_trials_at = now
            return 1
        return None

    def look_soon(self) -> None:
        """Look for the next trial without waiting: the engine is fresh and still empty, or a trial has just ended."""
        self._looked_for_trials_at = -math.inf

    # The job that runs alone

    def admit(self, job: RunningJob) -> None:
        log.warning(
            "running a job alone, since it may crash the engine", extra={"job_id": job.name, "attempt": job.attempt}
        )
        self.job = job

    def discharge(self, job: RunningJob) -> None:
        """Call when the job has left this worker."""
        if job is self.job:
            self.job = None

    def discharge_if_clear(self) -> None:
        """Let other jobs join once the trial has succeeded. SQL clears the job when the same tokens are committed."""
        job = self.job
        if job is not None and job.claimed.num_suspicions > 0 and job.num_new_tokens >= PROVEN_TOKENS:
            log.info("a suspected job is cleared", extra={"job_id": job.name, "attempt": job.attempt})
            self.job = None
            self.look_soon()

    def next_action(self, now: float, *, is_alone: bool, is_engine_fresh: bool, is_engine_ready: bool) -> Action:
        """What to do next for `job`. Before a trial, the other jobs are soon released; a confined job waits until they
        have ended. The engine must be fresh, so that the job is not blamed for what another one left behind in it."""
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
        """Decide which of `jobs`, which were in the engine, are accused. Call once for each engine that ended
        unexpectedly."""
        now = monotonic()
        num_before = sum(now - crash.at < self._rules.crash_seconds for crash in self._crashes)
        is_trial = self.job is not None and list(jobs) == [self.job]
        is_memory_short = exit_.is_outside_kill and self._oom_kills.is_possible()
        weight_by_job_id = self._accuse(exit_, jobs, most=1 if is_memory_short and not is_trial else 0)
        accused = frozenset(job_id for job_id, weight in weight_by_job_id.items() if weight)
        if not (is_trial and accused):
            self._crashes.append(Crash(now, accused, exit_.is_outside_kill))
        how = exit_.description
        if exit_.is_outside_kill:
            how += ", probably by the kernel for want of memory" if is_memory_short else " by somebody else"
        return Verdict(how, weight_by_job_id, num_before)

    def _accuse(self, exit_: EngineExit, jobs: Sequence[RunningJob], *, most: int) -> dict[UUID, int]:
        """`most`: how strongly a kill from outside makes a job suspected."""
        recorded = {(job.job_id, job.attempt): weight_of(job) for job in exit_.last_step}
        weight_by_job_id = {job.id: recorded.get((job.name, job.attempt), 0) for job in jobs}
        if not exit_.is_outside_kill:
            return weight_by_job_id
        return {job_id: min(weight, most) for job_id, weight in weight_by_job_id.items()}

    def forget_crashes(self) -> None:
        """Call when the worker begins anew, so that it is judged by what happens from now on."""
        self._crashes.clear()

    @property
    def is_worker_at_fault(self) -> bool:
        """Whether there have been too many crashes to blame a job."""
        now, rules = monotonic(), self._rules
        if len(self._crashes) == rules.max_crashes and now - self._crashes[0].at < rules.crash_seconds:
            return True
        # A kill from outside does not tell anything about the device.
        recent = [c for c in self._crashes if now - c.at < rules.unrelated_seconds and not c.is_outside_kill]
        last = recent[-rules.max_unrelated_crashes :]
        num_accused = sum(len(crash.accused) for crash in last)
        are_unrelated = len(frozenset[UUID]().union(*(crash.accused for crash in last))) == num_accused
        return len(last) == rules.max_unrelated_crashes and are_unrelated


def weight_of(job: RecordedJob) -> int:
    """How strongly a job is suspected if the engine crashed in this step."""
    return 2 if job.is_prefill or job.num_steps <= RECENT_STEPS else 1
