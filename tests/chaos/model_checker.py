"""Walks through every state of the modelled job protocol: none may be unsafe, and from each the job must be able to
finish, and its client with it, without another fault.

    python -m tests.chaos.model_checker --kills 2 --lapses 2      the larger bound: minutes
    python -m tests.chaos.model_checker --mutant fills_gaps       what goes wrong without one rule, step by step
"""

import argparse
import dataclasses
import json
import sys
import time
from array import array
from dataclasses import dataclass, field

from tests.chaos.model import (
    COMPLETED,
    IN_PROGRESS,
    NUM_TOKENS,
    Budget,
    Protocol,
    State,
    Step,
    Worker,
    is_over,
    is_terminal,
    steps,
    text_of,
)

NONE = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class Violation:
    """What went wrong, and the shortest way there."""

    what: str
    trace: list[str]


@dataclass(slots=True)
class Verdict:
    num_states: int
    num_steps: int
    seconds: float
    unsafe: Violation | None = None
    stuck: Violation | None = None
    num_stuck: int = 0
    statuses: set[str | None] = field(default_factory=set)

    @property
    def is_sound(self) -> bool:
        return self.unsafe is None and self.stuck is None


def check(protocol: Protocol, budget: Budget) -> Verdict:
    """Breadth first, so that the trace of a violation is a shortest one. Ends at the first unsafe state."""
    return _Search(protocol, budget).run()


class _Search:
    def __init__(self, protocol: Protocol, budget: Budget) -> None:
        self._protocol = protocol
        start = State(budget=budget)
        self._states = [start]
        self._place_of = {start: 0}
        self._came_from = array("I", [NONE])
        self._came_by = [""]
        # Steps without a fault, as linked lists by their target: what is walked backwards for liveness.
        self._newest_in = array("I", [NONE])
        self._next_in = array("I")
        self._sources = array("I")

    def run(self) -> Verdict:
        began_at = time.perf_counter()
        num_steps = place = 0
        unsafe: Violation | None = None
        while place < len(self._states) and unsafe is None:
            state = self._states[place]
            for step in steps(state, self._protocol):
                num_steps += 1
                self._add(place, step)
                if what := unsafety(state, step):
                    unsafe = Violation(what, [*self._trace(place), step.name])
                    break
            place += 1
        verdict = Verdict(len(self._states), num_steps, 0.0, unsafe)
        if unsafe is None:
            self._find_stuck(verdict)
        verdict.statuses = {state.status for state in self._states}
        verdict.seconds = time.perf_counter() - began_at
        return verdict

    def _add(self, source: int, step: Step) -> None:
        place = self._place_of.setdefault(step.after, len(self._states))
        if place == len(self._states):
            self._states.append(step.after)
            self._came_from.append(source)
            self._came_by.append(step.name)
            self._newest_in.append(NONE)
        if not step.is_fault:
            self._next_in.append(self._newest_in[place])
            self._newest_in[place] = len(self._sources)
            self._sources.append(source)

    def _find_stuck(self, verdict: Verdict) -> None:
        """Walk backwards from every end; what is not met cannot get there."""
        can_finish = bytearray(len(self._states))
        todo = [place for place, state in enumerate(self._states) if is_over(state)]
        for place in todo:
            can_finish[place] = 1
        while todo:
            edge = self._newest_in[todo.pop()]
            while edge != NONE:
                source = self._sources[edge]
                if not can_finish[source]:
                    can_finish[source] = 1
                    todo.append(source)
                edge = self._next_in[edge]
        verdict.num_stuck = can_finish.count(0)
        if verdict.num_stuck:
            verdict.stuck = Violation("job or client cannot finish any more", self._trace(can_finish.index(0)))

    def _trace(self, place: int) -> list[str]:
        names = []
        while place:
            names.append(self._came_by[place])
            place = self._came_from[place]
        return names[::-1]


def unsafety(before: State, step: Step) -> str | None:
    """What must never happen, judged by what a client and the table show."""
    after = step.after
    if after.seen != after.chunks[: len(after.seen)]:
        return "the client saw what is not committed"
    if after.chunks[: len(before.chunks)] != before.chunks:
        return "a committed chunk changed"
    if is_terminal(before.status) and (after.status, after.chunks, after.result) != (
        before.status,
        before.chunks,
        before.result,
    ):
        return "a terminal job changed"
    if is_terminal(after.status) and after.result != text_of(after.chunks):
        return "the result is not the text of the stream"
    if after.status == COMPLETED and len(text_of(after.chunks)) != NUM_TOKENS:
        return "the job completed with another number of tokens"
    if after.stream == "ended" and (after.seen != after.chunks or not is_terminal(after.status)):
        return "the client's stream ended early"
    if before.has_accepted and after.status is None:
        return "an accepted job is gone"
    if len({token // 100 for token in text_of(after.chunks)}) > 1:
        return "two revisions made one text"
    return _spliced_or_robbed(before, step)


def _spliced_or_robbed(before: State, step: Step) -> str | None:
    """Only the holder of the current attempt may move a running job, or whoever finds its lease lapsed."""
    after = step.after
    holders = [w for w in after.workers if isinstance(w, Worker) and w.attempt == after.attempt]
    if after.status == IN_PROGRESS and any(
        text_of(after.chunks)[: holder.num_committed] != holder.text[: holder.num_committed] for holder in holders
    ):
        return "two attempts made one text"
    if before.status != IN_PROGRESS or step.by_attempt == before.attempt:
        return None
    if after.chunks != before.chunks:
        return "another than the holder wrote a chunk"
    if after.status != IN_PROGRESS and (before.is_lease_valid or step.by_attempt):
        return "an attempt was ended under its holder"
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in Budget._field_defaults.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    parser.add_argument("--mutant", choices=[name.name for name in dataclasses.fields(Protocol)])
    options = vars(parser.parse_args())
    mutant = options.pop("mutant")
    protocol = Protocol(**{mutant: False}) if mutant else Protocol()
    verdict = check(protocol, Budget(**options))
    for violation in (verdict.unsafe, verdict.stuck):
        if violation is not None:
            print(f"{violation.what}:\n  " + "\n  ".join(violation.trace))
    figures = {"states": verdict.num_states, "steps": verdict.num_steps, "seconds": round(verdict.seconds, 1)}
    print(json.dumps({**figures, "stuck": verdict.num_stuck, "sound": verdict.is_sound}))
    return 0 if verdict.is_sound else 1


if __name__ == "__main__":
    sys.exit(main())
