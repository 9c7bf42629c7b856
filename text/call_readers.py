"""Reads one tool call as it arrives, in each of the ways in which models write one.

A reader is fed text until the call is over or turns out not to be one. `JsonCall` and `HeadedCall` pass a call's
arguments on while they are written. The others convert the arguments to JSON, so they read the whole call first.

Text is looked at once, and copied once, however long the call and however short the pieces in which it arrives.
"""

import json
import re
from collections.abc import Callable, Sequence
from io import StringIO

from domain.structured_output import MAX_ARGUMENT_CHARS

MAX_HEAD_CHARS = 512  # of a call before its arguments

#: What makes a whole call of its text: its name, and its arguments in JSON. Raises ValueError if it is none.
Convert = Callable[[str], tuple[str, str]]


def without_surrogates(text: str) -> str:
    """With the character that each pair of surrogates stands for; escapes in JSON or Python may make halves of them."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def num_of_tag_at_the_end(text: str, tags: Sequence[str]) -> int:
    """How many characters at the end may be the beginning of one of the tags."""
    longest = max(map(len, tags), default=1) - 1
    counts = range(min(longest, len(text)), 0, -1)
    return next((n for n in counts if any(tag.startswith(text[len(text) - n :]) for tag in tags)), 0)


class Brackets:
    """Follows a value in brackets, piece by piece. It ends where its brackets close. It also ends where it cannot
    continue, which is where the next call begins if a bracket is missing: before a closing bracket of another kind,
    before one of the `stops` outside a string and, in JSON, before an object or a list where no value can begin."""

    def __init__(self, stops: Sequence[str] = (), *, quotes: str = '"', is_json: bool = True) -> None:
        self._stops, self._quotes, self._is_json = tuple(stops), quotes, is_json
        self._stop_starts = {stop[0] for stop in stops}
        self._missing: list[str] = []  # the brackets that close what is open
        self._quote = ""  # of the string in which the scan is
        self._is_escaped = False
        self._is_before_value = True

    @property
    def depth(self) -> int:
        return len(self._missing)

    def end_in(self, text: str, start: int = 0, *, depth: int = 0) -> int | None:
        """Where only `depth` brackets are left open, or the value cannot continue; None if that is behind `text`, which
        follows from `start` on what was scanned before. No stop may be cut off at its end."""
        for place in range(start, len(text)):
            character = text[place]
            if self._quote:
                self._scan_string(character)
            elif character in self._quotes:
                self._quote = character
            elif (closing := _CLOSING.get(character)) is not None:
                if self._is_json and not self._is_before_value:
                    return place
                self._missing.append(closing)
                self._is_before_value = character == "["
            elif character in ")]}":
                if not self._missing or self._missing.pop() != character:
                    return place
                self._is_before_value = False
                if self.depth <= depth:
                    return place + 1
            elif character in self._stop_starts and text.startswith(self._stops, place):
                return place
            elif not character.isspace():
                self._is_before_value = character == ":" or (character == "," and self._missing[-1:] == ["]"])
        return None

    def _scan_string(self, character: str) -> None:
        if self._is_escaped:
            self._is_escaped = False
        elif character == "\\":
            self._is_escaped = True
        elif character == self._quote:
            self._quote, self._is_before_value = "", False


_CLOSING = {"(": ")", "[": "]", "{": "}"}


class CallReader:
    """One call. `name` is set as soon as it is known, and `is_broken` once the text cannot become a call."""

    def __init__(self, stops: Sequence[str] = ()) -> None:
        """A call whose name is not known before one of the `stops` is none. Whoever feeds the reader keeps back what
        may be the beginning of one."""
        self.name: str | None = None
        self.stops = tuple(stops)
        self.num_chars = 0
        self.is_passed_on = False  # whether its name was
        self.is_over = False
        self.is_broken = False
        self._buffer = StringIO()

    @property
    def text(self) -> str:
        """All that was read."""
        return self._buffer.getvalue()

    def feed(self, text: str) -> int:
        """Read `text`; returns how much of it belongs to the call, or to what is none."""
        end = self._read(text) if text else None
        num_read = len(text) if end is None else end
        self._buffer.write(text[:num_read])
        self.num_chars += num_read
        if end is not None and not self.is_broken:
            self.is_over = True
            self._end()
        return num_read

    def take_arguments(self) -> str:
        """The part of the arguments that has arrived since the last call."""
        raise NotImplementedError

    def _read(self, text: str) -> int | None:
        """Look at `text`, which follows what was read; returns where in it the call ends, if it does. May set
        `is_broken`, and then returns how much belongs to what is none."""
        raise NotImplementedError

    def _end(self) -> None:
        """The call is over. May find that it is none."""

    def _give_up(self) -> None:
        self.is_over, self.is_broken = False, True

    def _first_stop(self, text: str) -> int | None:
        return min((place for stop in self.stops if (place := text.find(stop)) >= 0), default=None)


class _StreamedCall(CallReader):
    """A call whose arguments are passed on while they arrive. It ends where they get too long to be sent back to us."""

    def __init__(self, stops: Sequence[str] = ()) -> None:
        super().__init__(stops)
        self._head = ""
        self._brackets = Brackets(stops)
        self._arguments = ""
        self._num_left = MAX_ARGUMENT_CHARS

    def take_arguments(self) -> str:
        arguments, self._arguments = self._arguments, ""
        return arguments

    def _read_arguments(self, text: str, start: int, *, depth: int) -> int | None:
        end = self._brackets.end_in(text, start, depth=depth)
        arguments = text[start:end]
        self._arguments += arguments[: self._num_left]
        self._num_left -= len(arguments)
        return end if self._num_left >= 0 else start + len(arguments) + self._num_left


_JSON_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')


class JsonCall(_StreamedCall):
    """{"name": …, "arguments": {…}}, also with `parameters`, in another order, or with further keys."""

    def __init__(self, stops: Sequence[str] = ()) -> None:
        super().__init__(stops)
        self._is_in_arguments = False

    def _read(self, text: str) -> int | None:
        if not self.num_chars and text[0] != "{":
            self.is_broken = True
            return 1
        start = 0
        if self.name is None:
            stop = self._first_stop(text)
            begin = self._arguments_in(text[:stop])
            if begin is None:
                end = self._brackets.end_in(text[:stop])
                self.is_broken = end is None and stop is not None
                return stop if end is None else end
            self._brackets.end_in(text[:begin])
            start, self._is_in_arguments = begin, True
        if self._is_in_arguments:
            end = self._read_arguments(text, start, depth=1)
            if end is None or self._brackets.depth != 1 or self._num_left < 0:
                return end
            start, self._is_in_arguments = end, False
        return self._brackets.end_in(text, start)

    def _arguments_in(self, text: str) -> int | None:
        """Where in `text` the arguments begin, if they do so behind the name."""
        num_before = len(self._head)
        if num_before == MAX_HEAD_CHARS:
            return None
        self._head = (self._head + text)[:MAX_HEAD_CHARS]
        found = _JSON_HEAD.match(self._head)
        if found is None:
            return None
        try:
            self.name = without_surrogates(json.loads(found[1], strict=False))
        except ValueError:  # an escape that JSON does not have
            return None
        return found.end() - num_before

    def _end(self) -> None:
        if self.name is not None:
            return
        try:
            call = json.loads(self.text, strict=False)
        except (ValueError, RecursionError):
            call = None
        call = call if isinstance(call, dict) else {}
        name, arguments = call.get("name", call.get("tool_name")), call.get("arguments", call.get("parameters"))
        if not isinstance(name, str) or arguments is None:
            return self._give_up()
        whole = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        if len(whole) > MAX_ARGUMENT_CHARS:
            return self._give_up()
        self.name, self._arguments = without_surrogates(name), without_surrogates(whole)


class HeadedCall(_StreamedCall):
    """A head with the name, and an object with the arguments behind it."""

    def __init__(self, head: re.Pattern[str], stops: Sequence[str] = ()) -> None:
        """`head` ends just before the object; one of its groups is the name."""
        super().__init__(stops)
        self._pattern = head

    def _read(self, text: str) -> int | None:
        start = 0
        if self.name is None:
            num_before, stop = len(self._head), self._first_stop(text)
            self._head = (self._head + text[:stop])[: MAX_HEAD_CHARS + 1]
            found = self._pattern.match(self._head)
            if found is None:
                self.is_broken = stop is not None or len(self._head) > MAX_HEAD_CHARS
                return len(self._head) - num_before if self.is_broken else None
            self.name = next(filter(None, found.groups()))
            start = found.end() - num_before
        return self._read_arguments(text, start, depth=0)


class WholeCall(CallReader):
    """A call up to its end tag, which is converted."""

    def __init__(self, end_tag: str, convert: Convert) -> None:
        super().__init__((end_tag,) if end_tag else ())
        self._end_tag = end_tag
        self._convert = convert
        self._arguments = ""

    def take_arguments(self) -> str:
        arguments, self._arguments = self._arguments, ""
        return arguments

    def _read(self, text: str) -> int | None:
        place = text.find(self._end_tag)
        return None if place < 0 else place + len(self._end_tag)

    def _end(self) -> None:
        if self.num_chars > MAX_HEAD_CHARS + MAX_ARGUMENT_CHARS:  # do not convert what is too long anyway
            return self._give_up()
        try:
            name, arguments = self._convert(self.text.removesuffix(self._end_tag))
        except Exception:  # whatever a model writes, it is text if it is no call
            return self._give_up()
        if len(arguments) > MAX_ARGUMENT_CHARS:
            return self._give_up()
        self.name, self._arguments = without_surrogates(name), arguments


class PythonCall(WholeCall):
    """name(key=value, …), in Python's notation."""

    def __init__(self, convert: Convert, stops: Sequence[str] = ()) -> None:
        super().__init__("", convert)
        self.stops = tuple(stops)
        self._brackets = Brackets(stops, quotes="\"'", is_json=False)

    def _read(self, text: str) -> int | None:
        start = 0
        if not self._brackets.depth:
            start = text.find("(")
            if start < 0 or self.num_chars + start > MAX_HEAD_CHARS:
                self.is_broken = self.num_chars + len(text) > MAX_HEAD_CHARS
                return MAX_HEAD_CHARS + 1 - self.num_chars if self.is_broken else None
        return self._brackets.end_in(text, start)
