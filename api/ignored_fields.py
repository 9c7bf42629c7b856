"""Fields of a request that were taken and left out, and the header that names them to its client."""

from collections import deque
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

HEADER = "x-ignored-fields"
MAX_NAMED = 32

#: Of the request under way; a list that the request's outermost layer makes, so that all below it share it.
ignored_fields_context: ContextVar[list[str] | None] = ContextVar("ignored_fields", default=None)


class Hint(NamedTuple):
    """Why a field may be left out. Where only some of its values may, `values` says which."""

    reason: str
    values: tuple[object, ...] = ()
    covers_item: Callable[[object], bool] | None = None  # of items that are no plain values

    def covers(self, value: object) -> bool:
        if self.covers_item is not None:
            return self.covers_item(value)
        return not self.values or any(value == known and _is_truth(value) == _is_truth(known) for known in self.values)


Hints = Mapping[str, Hint]  # by place: steps with dots between them, where `*` is any item of a list
HintTree = dict[str, Any]  # step -> the tree of the steps behind it; HERE -> the Hint of this place itself
HERE = ""


def tree_of(hints: Hints) -> HintTree:
    tree: HintTree = {}
    for place, hint in hints.items():
        part = tree
        for step in place.split("."):
            part = part.setdefault(step, {})
        part[HERE] = hint
    return tree


def take_hints(body: object, tree: HintTree, *, own_fields: Container[str] = ()) -> list[str]:
    """Take the fields that the hints cover out of `body`, but for its `own_fields`; items of lists keep their places,
    for the model to know them. The paths of both, the outer ones first."""
    found: list[str] = []
    waiting: deque[tuple[Any, HintTree, str]] = deque([(body, tree, "")])
    while waiting:
        part, steps, place = waiting.popleft()
        for name, inner, behind in _steps_into(part, steps):
            hint = None if part is body and name in own_fields else behind.get(HERE)
            if hint is None or not hint.covers(inner):
                waiting.append((inner, behind, f"{place}{name}."))
                continue
            found.append(f"{place}{name}")
            if isinstance(part, dict):
                del part[name]
    return found


def _steps_into(part: object, steps: HintTree) -> list[tuple[Any, Any, HintTree]]:
    """Each with its name or number, and the tree behind it."""
    if isinstance(part, dict):
        return [(name, part[name], steps[name]) for name in part if name in steps and name != HERE]
    if isinstance(part, list) and "*" in steps:
        return [(number, item, steps["*"]) for number, item in enumerate(part)]
    return []


def hint_at(tree: HintTree, path: Sequence[int | str]) -> Hint | None:
    for step in path:
        tree = tree.get("*" if isinstance(step, int) else step, {})
    return tree.get(HERE)


def _is_truth(value: object) -> bool:
    """Whether it is true or false, which Python counts among the numbers."""
    return isinstance(value, bool)


def note_ignored(paths: Iterable[str]) -> None:
    """For the answer of the request under way, if any: a line of a batch has none."""
    ignored = ignored_fields_context.get()
    if ignored is not None:
        ignored.extend(paths)


def header_value(ignored: Iterable[str]) -> str:
    """Their names in order, as many as a header should hold."""
    paths = list(dict.fromkeys(ignored))
    more = [f"{len(paths) - MAX_NAMED} more"] if len(paths) > MAX_NAMED else []
    return ", ".join(paths[:MAX_NAMED] + more)
