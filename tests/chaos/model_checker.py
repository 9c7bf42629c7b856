"""Walks through every state of the modelled job protocol: none may be unsafe, and from each the job must be able to
finish, and its client with it, without another fault.

    python -m tests.chaos.model_checker --kills 2 --lapses 2      the larger bound: minutes
    python -m tests.chaos.model_checker --mutant fills_gaps       what goes wrong without one rule, step by step
"""

import argparse
import contextlib
import dataclasses
import gc
import json
import sys
import time
from array import array
from collections.abc import Iterator
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
    with _collecting_no_garbage():
        return _Search(protocol, budget).run()


@contextlib.contextmanager
def _collecting_no_garbage() -> Iterator[None]:
    """There is none, as a search keeps all of its states; and to walk through them again and again takes long."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


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
                is_new = self._add(place, step)
                if what := (unsafe_by_itself(step.after) if is_new else None) or unsafe_change(state, step):
                    unsafe = Violation(what, [*self._trace(place), step.name])
                    break
            place += 1
        verdict = Verdict(len(self._states), num_steps, 0.0, unsafe)
        if unsafe is None:
            self._find_stuck(verdict)
        verdict.statuses = {state.status for state in self._states}
        verdict.seconds = time.perf_counter() - began_at
        return verdict

    def _add(self, source: int, step: Step) -> bool:
        """Whether it leads to a state that was not met before."""
        place = self._place_of.setdefault(step.after, len(self._states))
        is_new = place == len(self._states)
        if is_new:
            self._states.append(step.after)
            self._came_from.append(source)
            self._came_by.append(step.name)
            self._newest_in.append(NONE)
        if not step.is_fault:
            self._next_in.append(self._newest_in[place])
            self._newest_in[place] = len(self._sources)
            self._sources.append(source)
        return is_new

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


def unsafe_by_itself(state: State) -> str | None:
    """What no state may be, judged by what a client and the table show."""
    chunks, status = state.chunks, state.status
    if state.seen != chunks[: len(state.seen)]:
        return "the client saw what is not committed"
    text = text_of(chunks)
    if is_terminal(status) and state.result != text:
        return "the result is not the text of the stream"
    if status == COMPLETED and len(text) != NUM_TOKENS:
        return "the job completed with another number of tokens"
    if state.stream == "ended" and (state.seen != chunks or not is_terminal(status)):
        return "the client's stream ended early"
    if len({token // 100 for token in text}) > 1:
        return "two revisions made one text"
    if status == IN_PROGRESS and any(
        text[: holder.num_committed] != holder.text[: holder.num_committed]
        for holder in state.workers
        if isinstance(holder, Worker) and holder.attempt == state.attempt
    ):
        return "two attempts made one text"
    return None


def unsafe_change(before: State, step: Step) -> str | None:
    """What no step may do. Only the holder of the current attempt may move a running job, or whoever finds its lease
    lapsed."""
    after = step.after
    has_other_chunks = after.chunks is not before.chunks and after.chunks != before.chunks
    if has_other_chunks and after.chunks[: len(before.chunks)] != before.chunks:
        return "a committed chunk changed"
    if is_terminal(before.status) and (
        has_other_chunks or (after.status, after.result) != (before.status, before.result)
    ):
        return "a terminal job changed"
    if before.has_accepted and after.status is None:
        return "an accepted job is gone"
    if before.status != IN_PROGRESS or step.by_attempt == before.attempt:
        return None
    if has_other_chunks:
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
