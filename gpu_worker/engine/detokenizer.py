"""Turns token ids into text as they arrive, in constant time per token, without partial characters or stop strings."""

import codecs
import json
from collections.abc import Callable, Sequence

from tokenizers import Tokenizer

from domain.requests import SamplingParams
from text.outputs import MARKER_TOKENS, REASONING_ENDS
from text.tokenizers import TokenKind, token_table_of

REPLACEMENT = "\ufffd"
MAX_WINDOW = 12  # tokens decoded again with each new one, not counting a run of byte tokens
NUM_CONTEXT_TOKENS = 6  # how many of them, or of the prompt's, stay as context: a first token often decodes differently

_new_utf8_decoder = codecs.getincrementaldecoder("utf-8")


def with_visible_reasoning(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer, modified if necessary so that reasoning tags and the markers of channels decode to text. Some
    models declare them special; their text would then not show where the answer begins."""
    hidden = [
        token
        for token in tokenizer.get_added_tokens_decoder().values()
        if token.special and token.content in MARKER_TOKENS
    ]
    if not hidden:
        return tokenizer
    plain = json.loads(tokenizer.to_str())  # `add_tokens` cannot make a special token ordinary
    for token in plain["added_tokens"]:
        token["special"] &= token["content"] not in MARKER_TOKENS
    return Tokenizer.from_str(json.dumps(plain))


class Detokenizer:
    """Incremental decoding of one sequence. The pieces and the result of `flush`, joined, equal `decode` of all tokens,
    whatever the decoder. Each token is decoded together with the last few before it, so its cost does not grow.

    Text is held back in two cases. The first bytes of a character wait for the rest. A run of byte tokens (`<0xNN>`)
    waits for the token after it, because it is decoded as a whole: one invalid byte turns every byte of the run into
    U+FFFD, even bytes that formed whole characters (docs/adr/0019).
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int] = (), *, skip_special_tokens: bool = True
    ) -> None:
        """Special tokens are part of the text only without `skip_special_tokens`."""
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._tokens = token_table_of(tokenizer)
        self._utf8 = _new_utf8_decoder("replace")
        self._run: ByteRun | None = None  # the byte tokens that are held back
        self._window: list[int] = []  # the last tokens that have text
        self._num_sent = 0  # how many characters of the window's text have been returned
        self._has_pushed = False
        self._begin_behind(prompt_token_ids)

    def push(self, token_id: int) -> str:
        """The text that this token makes final: usually its own, sometimes empty."""
        kind = self._kind(token_id)
        if kind is TokenKind.HIDDEN:
            return ""
        self._has_pushed = True
        if kind is TokenKind.BYTE:
            self._push_byte(token_id)
            return ""
        self._run = None
        self._window.append(token_id)
        self._utf8.decode(self._tokens.bytes_of(token_id))
        return self._send()

    def flush(self) -> str:
        """The text that is still held back at the end of the sequence."""
        self._run = None
        self._utf8.reset()
        return self._send() if self._has_pushed else ""

    def last_characters_waiting(self, max_count: int) -> str:
        """The last characters of the held-back run of byte tokens, as if it ended here; empty if it ends within a
        character."""
        return "" if self._run is None else self._run.last_characters(max_count)

    def _kind(self, token_id: int) -> TokenKind:
        kind = self._tokens.kind(token_id)
        is_named = kind is TokenKind.HIDDEN and not self._skip_special_tokens and self._tokens.bytes_of(token_id)
        return TokenKind.TEXT if is_named else kind

    def _push_byte(self, token_id: int) -> None:
        self._run = self._run or ByteRun()
        self._run.push(self._tokens.bytes_of(token_id))
        self._window.append(token_id)

    def _send(self) -> str:
        text = self._final_text(self._window)
        piece, self._num_sent = text[self._num_sent :], len(text)
        if len(self._window) >= MAX_WINDOW:
            self._slide()
        return piece

    def _slide(self) -> None:
        kept = self._window[-NUM_CONTEXT_TOKENS:]
        text = self._final_text(kept)
        if text:  # a decoder that strips the start of a text has done so by now and will not strip anything else
            self._window, self._num_sent = kept, len(text)

    def _final_text(self, token_ids: list[int]) -> str:
        """The tokens' text without an incomplete character at its end, which `decode` turns into one U+FFFD."""
        if not token_ids:
            return ""  # some decoders panic on an empty list
        text: str = self._tokenizer.decode(token_ids, skip_special_tokens=self._skip_special_tokens)
        has_half_a_character = bool(self._utf8.getstate()[0])
        return text.removesuffix(REPLACEMENT) if has_half_a_character else text

    def _begin_behind(self, prompt_token_ids: Sequence[int]) -> None:
        """Start with the prompt's text marked as sent, except for an incomplete character at its end, which the output
        may complete."""
        context: list[int] = []
        run: list[int] = []
        for token_id in reversed(prompt_token_ids):
            kind = self._kind(token_id)
            if kind is TokenKind.BYTE and not context:
                run.append(token_id)
            elif kind is not TokenKind.HIDDEN:
                context.append(token_id)
            if len(context) == NUM_CONTEXT_TOKENS:
                break
        self._window = context[::-1]
        self._utf8.decode(b"".join(map(self._tokens.bytes_of, self._window)))
        self._num_sent = len(self._final_text(self._window))
        num_waiting = num_bytes_of_half_a_character(b"".join(map(self._tokens.bytes_of, reversed(run))))
        for token_id in run[:num_waiting][::-1]:
            self._push_byte(token_id)


class ByteRun:
    """A run of byte tokens that is held back, and its text as if it ended here."""

    def __init__(self) -> None:
        self._utf8 = _new_utf8_decoder("strict")
        self._characters: list[str] = []
        self._is_valid = True

    def push(self, byte: bytes) -> None:
        if not self._is_valid:
            return
        try:
            self._characters += self._utf8.decode(byte)
        except UnicodeDecodeError:
            self._is_valid = False

    def last_characters(self, max_count: int) -> str:
        """Empty if the run does not consist of whole characters."""
        is_whole = self._is_valid and not self._utf8.getstate()[0]
        return "".join(self._characters[-max_count:]) if is_whole else ""


def num_bytes_of_half_a_character(text: bytes) -> int:
    """How many bytes at the end are the start of an incomplete character; 0 if the text is not UTF-8."""
    utf8 = _new_utf8_decoder("strict")
    try:
        utf8.decode(text)
    except UnicodeDecodeError:
        return 0
    return len(utf8.getstate()[0])


class StopMatcher:
    """Finds the first stop string in a stream of text pieces; holds back text that could become one."""

    def __init__(self, stop_strings: Sequence[str], *, sends_stop: bool = False) -> None:
        """With `sends_stop` the stop string itself is part of the text."""
        self._sends_stop = sends_stop
        self._stop_strings = tuple(stop_strings)
        self._max_stop_length = max(map(len, stop_strings), default=0)
        self._held = ""
        self.found: str | None = None  # the stop string that ended the stream
        self._prefixes_by_last_character: dict[str, list[str]] = {}
        prefixes = {stop[:length] for stop in stop_strings for length in range(1, len(stop))}
        for prefix in sorted(prefixes, key=len, reverse=True):
            self._prefixes_by_last_character.setdefault(prefix[-1], []).append(prefix)

    def push(self, piece: str, *, may_stop: bool = True) -> tuple[str, bool]:
        """The text that may be sent, and whether a stop string was found: nothing after it is sent. With `may_stop`
        False the stream continues through stop strings."""
        if not self._stop_strings:
            return piece, False
        text = self._held + piece
        found = [(start + len(stop), start, stop) for stop in self._stop_strings if (start := text.find(stop)) >= 0]
        if found and may_stop:
            self._held = ""
            end, start, self.found = min(found)  # the one completed first, however the text was split into pieces
            return text[: end if self._sends_stop else start], True
        num_held = self._num_held(text)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held], False

    def ends_in_stop(self, last_characters: Callable[[int], str]) -> bool:
        """Whether text that has not been pushed yet ends in a stop string. `last_characters(n)` returns its last n
        characters."""
        if not self._stop_strings:
            return False
        waiting = last_characters(self._max_stop_length)
        return bool(waiting) and (self._held + waiting).endswith(self._stop_strings)

    def flush(self) -> str:
        """The text that was held back and did not become a stop string."""
        held, self._held = self._held, ""
        return held

    def _num_held(self, text: str) -> int:
        """Length of the longest suffix of `text` that is a prefix of a stop string."""
        if not text:
            return 0
        return next((len(p) for p in self._prefixes_by_last_character.get(text[-1], ()) if text.endswith(p)), 0)


class TextStream:
    """Tokens in, text that may be sent out: a Detokenizer followed by a StopMatcher."""

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int], params: SamplingParams) -> None:
        self._detokenizer = Detokenizer(tokenizer, prompt_token_ids, skip_special_tokens=params.skip_special_tokens)
        self._matcher = StopMatcher(params.stop, sends_stop=params.include_stop_str_in_output)
        self._end = ""  # the end of the text so far, as long as a tag that it may be part of
        self.has_reasoned = False  # whether the first </think> is complete, even if its text is held back

    @property
    def stop_string(self) -> str | None:
        """The stop string that ended the sequence, if one did."""
        return self._matcher.found

    def push(self, token_id: int, *, may_stop: bool) -> tuple[str, bool]:
        piece = self._detokenizer.push(token_id)
        if may_stop and self._matcher.ends_in_stop(self._detokenizer.last_characters_waiting):
            piece = self._detokenizer.flush()  # the run of bytes ends with the sequence
        self._look_for_reasoning(piece)
        return self._matcher.push(piece, may_stop=may_stop)

    def flush(self) -> str:
        """The text that was held back, for a sequence that ended without a stop string."""
        piece = self._detokenizer.flush()
        self._look_for_reasoning(piece)
        text, _ = self._matcher.push(piece, may_stop=False)
        return text + self._matcher.flush()

    def _look_for_reasoning(self, piece: str) -> None:
        if not self.has_reasoned:
            self._end = self._end[1 - max(map(len, REASONING_ENDS)) :] + piece
            self.has_reasoned = any(end in self._end for end in REASONING_ENDS)
