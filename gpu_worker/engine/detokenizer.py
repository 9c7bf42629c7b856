"""Token ids to text as they come, in constant time per token: never half a character, never a part of a stop string."""

import json
from collections.abc import Sequence

from tokenizers import Tokenizer

from tasks.output_formats import END_THINK, THINK

REPLACEMENT = "\ufffd"
MAX_INCOMPLETE = 3  # a UTF-8 character is at most four bytes, so at most three of them can be waiting for the rest
MAX_WINDOW = 16  # tokens decoded again for each new one; slides by halves
NUM_CONTEXT_TOKENS = 4  # of the prompt: some decoders spell a token differently at the start of a text


def with_visible_reasoning(tokenizer: Tokenizer) -> Tokenizer:
    """One whose tags of reasoning have a text. Some models declare them special, and then nobody could tell from their
    text where the answer begins."""
    hidden = [
        token
        for token in tokenizer.get_added_tokens_decoder().values()
        if token.special and token.content in (THINK, END_THINK)
    ]
    if not hidden:
        return tokenizer
    plain = json.loads(tokenizer.to_str())  # a token once added as special stays so
    for token in plain["added_tokens"]:
        token["special"] &= token["content"] not in (THINK, END_THINK)
    return Tokenizer.from_str(json.dumps(plain))


class Detokenizer:
    """Incremental decoding of one sequence over a sliding window of its last tokens.

    Text that ends in replacement characters may be a character whose last bytes are still to come, so up to three of
    them wait. Anything before them is final.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._window = list(prompt_token_ids[-NUM_CONTEXT_TOKENS:])
        self._num_sent = len(self._complete_text())

    def push(self, token_id: int) -> str:
        """The text that became final with this token; often the token's own, at times empty."""
        self._window.append(token_id)
        text = self._complete_text()
        piece = text[self._num_sent :]
        self._num_sent = max(self._num_sent, len(text))
        if len(self._window) >= MAX_WINDOW:
            del self._window[: MAX_WINDOW // 2]
            self._num_sent = len(self._complete_text())
        return piece

    def _complete_text(self) -> str:
        text: str = self._tokenizer.decode(self._window, skip_special_tokens=True)
        if not text.endswith(REPLACEMENT):
            return text
        end = len(text)
        while end > max(0, len(text) - MAX_INCOMPLETE) and text[end - 1] == REPLACEMENT:
            end -= 1
        return text[:end]


class StopMatcher:
    """Finds the first stop string in a stream of text pieces; holds back what could still become one."""

    def __init__(self, stop_strings: Sequence[str]) -> None:
        self._stop_strings = tuple(stop_strings)
        self._held = ""
        self._prefixes_by_last_character: dict[str, list[str]] = {}
        prefixes = {stop[:length] for stop in stop_strings for length in range(1, len(stop))}
        for prefix in sorted(prefixes, key=len, reverse=True):
            self._prefixes_by_last_character.setdefault(prefix[-1], []).append(prefix)

    def push(self, piece: str, *, may_stop: bool = True) -> tuple[str, bool]:
        """The text that is safe to send, and whether a stop string was met; the stop string itself is never sent.
        With `may_stop` false the stream runs on through stop strings."""
        if not self._stop_strings:
            return piece, False
        text = self._held + piece
        found = [(start + len(stop), start) for stop in self._stop_strings if (start := text.find(stop)) >= 0]
        if found and may_stop:
            self._held = ""
            _, start = min(found)  # the first to be complete, however the text was cut into pieces
            return text[:start], True
        num_held = self._num_held(text)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held], False

    def flush(self) -> str:
        """What was held back and did not become a stop string."""
        held, self._held = self._held, ""
        return held

    def _num_held(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        if not text:
            return 0
        return next((len(p) for p in self._prefixes_by_last_character.get(text[-1], ()) if text.endswith(p)), 0)


class TextStream:
    """Tokens in, text that may be sent out."""

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int], stop_strings: Sequence[str]) -> None:
        self._detokenizer = Detokenizer(tokenizer, prompt_token_ids)
        self._matcher = StopMatcher(stop_strings)
        self._end = ""  # of the text so far, whatever of a tag may be in it
        self.has_reasoned = False  # the first </think> is complete, also where its text is held back

    def push(self, token_id: int, *, may_stop: bool) -> tuple[str, bool]:
        piece = self._detokenizer.push(token_id)
        if not self.has_reasoned:
            self._end = self._end[1 - len(END_THINK) :] + piece
            self.has_reasoned = END_THINK in self._end
        return self._matcher.push(piece, may_stop=may_stop)

    def flush(self) -> str:
        return self._matcher.flush()
