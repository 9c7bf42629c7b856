"""Reads one tool call as it arrives, in each of the ways in which models write one.

A reader is fed text until the call is over or turns out not to be one. `JsonCall` and `HeadedCall` pass a call's
arguments on while they are written. The others convert the arguments to JSON, so they read the whole call first.
"""

import json
import re
from collections.abc import Callable

from domain.structured_output import MAX_TOOL_CHARS

MAX_HEAD_CHARS = 512  # of a call before its arguments

#: What makes a whole call of its text: its name, and its arguments in JSON. Raises ValueError if it is none.
Convert = Callable[[str], tuple[str, str]]


def without_surrogates(text: str) -> str:
    """With the character that each pair of surrogates stands for; escapes in JSON or Python may make halves of them."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


class Brackets:
    """Finds the end of a value in brackets, piece by piece. Outside a string it also ends behind one of `end_tags`."""

    def __init__(
        self, opening: str = "{[", closing: str = "}]", quotes: str = '"', end_tags: tuple[str, ...] = ()
    ) -> None:
        self._opening, self._closing, self._quotes = opening, closing, quotes
        self._end_tags = end_tags
        self._tag_starts = {tag[0] for tag in end_tags}
        self.inner_ends: list[int] = []  # where the values directly within the outermost brackets ended
        self.num_scanned = 0  # characters before the end, without any part of an end tag
        self._depth = 0
        self._quote = ""  # of the string in which the scan is
        self._is_escaped = False

    def find_end(self, text: str, start: int = 0) -> int | None:
        """The end of the value that begins at `start` of `text`, to which text may have been added since the last
        call."""
        for place in range(max(start, self.num_scanned), len(text)):
            self.num_scanned = place
            character = text[place]
            if self._is_escaped:
                self._is_escaped = False
            elif self._quote:
                self._is_escaped = character == "\\"
                self._quote = "" if character == self._quote else self._quote
            elif character in self._quotes:
                self._quote = character
            elif character in self._opening:
                self._depth += 1
            elif character in self._closing:
                self._depth -= 1
                if self._depth == 1:
                    self.inner_ends.append(place + 1)
                if self._depth <= 0:
                    self.num_scanned = place + 1
                    return place + 1
            elif character in self._tag_starts:
                tag = next((tag for tag in self._end_tags if text.startswith(tag, place)), None)
                if tag is not None:
                    return place + len(tag)
                if any(tag.startswith(text[place : place + len(tag)]) for tag in self._end_tags):
                    return None  # it may become one
        self.num_scanned = len(text)
        return None


class CallReader:
    """One call. `name` is set as soon as it is known, and `is_broken` once the text cannot become a call."""

    def __init__(self, end_tags: tuple[str, ...] = ()) -> None:
        """A call whose name is not known before one of the `end_tags` is none."""
        self.text = ""
        self.name: str | None = None
        self.is_passed_on = False  # whether its name was
        self.is_over = False
        self.is_broken = False
        self._end_tags = end_tags
        self._longest_tag = max(map(len, end_tags), default=0)
        self._num_searched = 0

    def feed(self, text: str) -> int:
        """Read `text`; returns how much of it belongs to the call. What does not is never looked at, so that the result
        does not depend on how a text is cut."""
        num_before = len(self.text)
        self.text += text
        end = None
        if self.name is None and (place := self._behind_end_tag()) is not None:
            whole, self.text = self.text, self.text[:place]
            end = self._read()
            if end is None and self.name is None:
                self.is_broken = True
                return len(self.text) - num_before
            self.text = whole
        end = self._read() if end is None else end
        if end is not None:
            self.text = self.text[:end]
            self.is_over = not self.is_broken
            if self.is_over:
                self._end()
        return len(self.text) - num_before

    def take_arguments(self) -> str:
        """The part of the arguments that has arrived since the last call."""
        raise NotImplementedError

    def _read(self) -> int | None:
        """Look at the text that was added; returns where the call ends, if it does. May set `is_broken`, and then
        returns how much belongs to what is none."""
        raise NotImplementedError

    def _end(self) -> None:
        """The call is over."""

    def _give_up_after_head(self) -> int | None:
        self.is_broken = len(self.text) > MAX_HEAD_CHARS
        return MAX_HEAD_CHARS + 1 if self.is_broken else None

    def _behind_end_tag(self) -> int | None:
        start = max(0, self._num_searched - self._longest_tag)
        places = [(place, tag) for tag in self._end_tags if (place := self.text.find(tag, start)) >= 0]
        self._num_searched = len(self.text)
        return min(place + len(tag) for place, tag in places) if places else None


_JSON_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')


class JsonCall(CallReader):
    """{"name": …, "arguments": {…}}, also with `parameters`, in another order, or with further keys."""

    def __init__(self, end_tags: tuple[str, ...] = ()) -> None:
        super().__init__(end_tags)
        self._brackets = Brackets(end_tags=end_tags)
        self._arguments_begin = -1  # set once they arrive after the name
        self._num_taken = 0
        self._whole_arguments: str | None = None  # if they came before the name

    def take_arguments(self) -> str:
        if self._whole_arguments is not None:
            whole, self._whole_arguments = self._whole_arguments, ""
            return whole
        if self._arguments_begin < 0:
            return ""
        ends = self._brackets.inner_ends
        end = next((place for place in ends if place > self._arguments_begin), self._brackets.num_scanned)
        arguments = self.text[self._arguments_begin + self._num_taken : end]
        self._num_taken += len(arguments)
        return arguments

    def _read(self) -> int | None:
        if self.text[:1] not in ("", "{"):
            self.is_broken = True
            return 1
        end = self._brackets.find_end(self.text)
        if self.name is None and (head := _JSON_HEAD.match(self.text[: min(MAX_HEAD_CHARS, end or MAX_HEAD_CHARS)])):
            self._begin_arguments(head[1], head.end())
        return end

    def _begin_arguments(self, quoted_name: str, place: int) -> None:
        try:
            self.name = without_surrogates(json.loads(quoted_name, strict=False))
        except ValueError:  # an escape that JSON does not have
            return
        self._arguments_begin = place

    def _end(self) -> None:
        if self.name is not None:
            return
        self.is_broken = True
        try:
            call = json.loads(self.text, strict=False)
        except (ValueError, RecursionError):
            return
        if not isinstance(call, dict):
            return
        name, arguments = call.get("name", call.get("tool_name")), call.get("arguments", call.get("parameters"))
        if not isinstance(name, str) or arguments is None:
            return
        whole = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        if len(whole) <= MAX_TOOL_CHARS:
            self.is_broken = False
            self.name, self._whole_arguments = without_surrogates(name), without_surrogates(whole)


class HeadedCall(CallReader):
    """A head with the name, and an object with the arguments behind it."""

    def __init__(self, head: re.Pattern[str], end_tags: tuple[str, ...] = ()) -> None:
        """`head` ends just before the object; one of its groups is the name."""
        super().__init__(end_tags)
        self._head = head
        self._brackets = Brackets()
        self._num_taken = 0  # characters of the head and of the arguments
        self._begin = 0

    def take_arguments(self) -> str:
        if self.name is None:
            return ""
        arguments = self.text[self._num_taken :]
        self._num_taken = len(self.text)
        return arguments

    def _read(self) -> int | None:
        if self.name is None:
            found = self._head.match(self.text[: MAX_HEAD_CHARS + 1])
            if found is None:
                return self._give_up_after_head()
            self.name = next(filter(None, found.groups()))
            self._begin = self._num_taken = found.end()
        return self._brackets.find_end(self.text, self._begin)


class WholeCall(CallReader):
    """A call up to its end tag, which is converted."""

    def __init__(self, end_tag: str, convert: Convert) -> None:
        super().__init__()
        self._end_tag = end_tag
        self._convert = convert
        self._num_looked_at = 0
        self._arguments = ""

    def take_arguments(self) -> str:
        arguments, self._arguments = self._arguments, ""
        return arguments

    def _read(self) -> int | None:
        place = self.text.find(self._end_tag, max(0, self._num_looked_at - len(self._end_tag)))
        self._num_looked_at = len(self.text)
        return None if place < 0 else place + len(self._end_tag)

    def _end(self) -> None:
        try:
            name, arguments = self._convert(self.text.removesuffix(self._end_tag))
        except Exception:  # whatever a model writes, it is text if it is no call
            self.is_broken = True
            return
        self.is_broken = len(arguments) > MAX_TOOL_CHARS
        if not self.is_broken:
            self.name, self._arguments = without_surrogates(name), arguments


class PythonCall(WholeCall):
    """name(key=value, …), in Python's notation."""

    def __init__(self, convert: Convert) -> None:
        super().__init__("", convert)
        self._brackets = Brackets("([{", ")]}", "\"'")

    def _read(self) -> int | None:
        place = self.text.find("(")
        if place < 0:
            return self._give_up_after_head()
        return self._brackets.find_end(self.text, place)
