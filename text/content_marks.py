"""Marks in what clients write, so that no control token of a prompt comes from them.

Control tokens may come only from the chat template, never from a client's message. A template joins the two, and the
tokenizer cannot tell them apart. So before rendering, a mark (a character, which survives string operations) is put
wherever a client's text, alone or with its neighbours, could be read as a control token. In the rendered text, a mark
inside the name of a control token becomes a cut, across which no token may extend; all other marks are dropped. Other
text is tokenized as if there were no marks.
"""

import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby, pairwise, takewhile
from typing import Any

#: A lone surrogate: it is not valid in any text, neither a letter nor whitespace, and JSON keeps it.
MARK = "\udc80"

FindTokens = Callable[[str], Iterable[tuple[int, int]]]

_SURROGATES = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Rendered:
    """A prompt's text, and the offsets across which no token may extend."""

    text: str
    cuts: tuple[int, ...] = ()

    @property
    def stretches(self) -> list[str]:
        bounds = [0, *self.cuts, len(self.text)]
        return [self.text[start:end] for start, end in pairwise(bounds)]


class ContentMarks:
    """Marks for one model's control tokens. Thread-safe."""

    def __init__(self, control_tokens: Iterable[str], find_others: FindTokens | None = None) -> None:
        """`find_others` finds control tokens that a text contains in another spelling, as some tokenizers fold case or
        width first."""
        tokens = sorted({token for token in control_tokens if len(token) > 1})
        self._spelt = re.compile(_pattern_of(tokens))
        self._find_others = find_others
        # Marks are set regardless of case, since a template may change it.
        tokens = sorted({token.lower() for token in tokens})
        self._spelt_in_any_case = re.compile(_pattern_of(tokens), re.IGNORECASE)
        self._max_part = max(map(len, tokens), default=1) - 1
        self._heads = frozenset(token[:end] for token in tokens for end in range(1, len(token)))
        self._tails = frozenset(token[start:] for token in tokens for start in range(1, len(token)))
        self._first_letter = re.compile(_pattern_of(sorted({token[0] for token in tokens})))
        self._last_letter = re.compile(_pattern_of(sorted({token[-1] for token in tokens})))
        self._all_tokens = "\n".join(tokens)

    def protect(self, value: Any) -> Any:
        """A copy of `value`, from a client's JSON, with marks in its strings and keys."""
        if isinstance(value, str):
            return self.mark(value)
        if isinstance(value, dict):
            return {self.protect(name): self.protect(item) for name, item in value.items()}
        return [self.protect(item) for item in value] if isinstance(value, (list, tuple)) else value

    def mark(self, text: str) -> str:
        """`text` with marks; the same object if it needs none."""
        if not self._heads:
            return text
        places = {start + 1 for start, _ in self._spans(self._spelt_in_any_case, text)}
        if self._begins_within_a_token(text[: self._max_part].lower()):
            places.add(0)
        if self._ends_within_a_token(text[-self._max_part :].lower(), len(text)):
            places.add(len(text))
        if not places:
            return text
        bounds = [0, *sorted(places), len(text)]
        stretches = [text[start:end] for start, end in pairwise(bounds)]
        return MarkedContent(MARK.join(stretches), self)

    def resolve(self, marked: str) -> Rendered:
        """The text without its marks, and the cuts at those that are needed."""
        stretches = [_SURROGATES.sub("\ufffd", stretch) for stretch in marked.split(MARK)]
        text = "".join(stretches)
        if len(stretches) == 1:
            return Rendered(text)
        places = list(accumulate(map(len, stretches[:-1])))
        firsts = ((bisect_right(places, start), end) for start, end in self._spans(self._spelt, text))
        cuts = {places[first] for first, end in firsts if first < len(places) and places[first] < end}
        return Rendered(text, tuple(sorted(cuts)))

    def _spans(self, spelt: re.Pattern[str], text: str) -> Iterator[tuple[int, int]]:
        """The spans of all control tokens in `text`, including overlapping ones; the longest of those that start
        together."""
        start = 0
        while (match := spelt.search(text, start)) is not None:
            yield match.span()
            start = match.start() + 1
        if self._find_others is not None:
            yield from self._find_others(text)

    def _begins_within_a_token(self, beginning: str) -> bool:
        return any(beginning[: found.end()] in self._tails for found in self._last_letter.finditer(beginning))

    def _ends_within_a_token(self, end: str, num_chars: int) -> bool:
        is_inner = 0 < num_chars <= self._max_part and end in self._all_tokens
        return is_inner or any(end[found.start() :] in self._heads for found in self._first_letter.finditer(end))


class MarkedContent(str):
    """A marked string. A template tests, slices and compares it as if it had no marks, but writes it with them.
    Operations that lose this type, such as join, keep the marks."""

    __slots__ = ("_marks",)
    _marks: ContentMarks

    def __new__(cls, marked: str, marks: ContentMarks) -> "MarkedContent":
        content = super().__new__(cls, marked)
        content._marks = marks
        return content


def _through_marks(name: str) -> Callable[..., Any]:
    method = getattr(str, name)

    def call(content: MarkedContent, *args: Any, **kwargs: Any) -> Any:
        return _marked_anew(method(_plain(content), *map(_plain, args), **kwargs), content._marks)

    return call


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_plain, value))
    return str.replace(value, MARK, "") if isinstance(value, MarkedContent) else value


def _marked_anew(value: Any, marks: ContentMarks) -> Any:
    if isinstance(value, str):
        return marks.mark(value)
    if isinstance(value, (list, tuple)):
        return type(value)(marks.mark(part) for part in value)
    return value


# Not `format` and `%`, whose left side is the template's own text, nor `+`, which would mark that text.
_METHODS = (
    "__contains__ __eq__ __ne__ __lt__ __le__ __gt__ __ge__ __hash__ __len__ __getitem__ __repr__ "
    "capitalize casefold center count endswith expandtabs find index isalnum isalpha isascii isdecimal isdigit "
    "islower isnumeric isprintable isspace istitle isupper ljust lower lstrip partition removeprefix removesuffix "
    "replace rfind rindex rjust rpartition rsplit rstrip split splitlines startswith strip swapcase title upper zfill"
)

for _name in _METHODS.split():
    setattr(MarkedContent, _name, _through_marks(_name))


def _pattern_of(words: Sequence[str]) -> str:
    """A regular expression that finds the longest of the sorted `words` at each place, in one pass. Without words it
    never matches."""
    if not words:
        return "(?!)"
    pairs = zip(words[0], words[-1], strict=False)
    head = "".join(first for first, _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    tails = [word[len(head) :] for word in words]
    is_word = tails[0] == ""
    groups = [list(group) for _, group in groupby(filter(None, tails), key=lambda tail: tail[0])]
    if not groups:
        return re.escape(head)
    return f"{re.escape(head)}(?:{'|'.join(map(_pattern_of, groups))}){'?' if is_word else ''}"
