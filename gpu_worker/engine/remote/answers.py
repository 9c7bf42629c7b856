"""What a server answers to a streamed completion: its events, tokens, logprobs and errors, as vLLM writes them.

The tokens of an event are ids: `token_ids`, which vLLM adds for `return_token_ids`
(https://docs.vllm.ai/en/latest/serving/openai_compatible_server.html). With logprobs, `return_tokens_as_token_ids`
makes ids of their tokens, too. Nothing that a server sends is trusted: lines, errors and tokens are bounded.
"""

import re
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

import orjson

MAX_LINE_BYTES = 4 * 1024 * 1024
MAX_QUOTE_CHARS = 300
MAX_RETRY_AFTER_SECONDS = 300.0

_TOKEN_NAME = re.compile(r"token_id:(\d{1,10})")


class Fault(Enum):
    """Why a request has no answer, or not all of it."""

    AWAY = auto()  # the server does not answer, does not accept our key, or does not have the model
    BUSY = auto()  # it asks us to come back later
    BROKEN = auto()  # it had accepted the request, or failed over it
    REFUSED = auto()  # it will never answer this request


@dataclass(eq=False)
class ServerFailure(Exception):
    """`what` happened, in our words, and the server's own words in one bounded line, which must not be logged, since
    they may quote the request."""

    fault: Fault
    what: str
    quote: str = ""
    retry_after_seconds: float | None = None

    @property
    def message(self) -> str:
        return f"{self.what}: {self.quote}" if self.quote else self.what


@dataclass(frozen=True, slots=True)
class ScoredToken:
    """A drawn token's logprob, and the most likely tokens in its place, the most likely first."""

    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Delta:
    """What one event adds to the text. `token_ids` is None if it has none, as in mode `text`."""

    token_ids: list[int] | None
    text: str
    scores: list[ScoredToken] | None = None  # one for each of token_ids
    finish_reason: str | None = None


async def read_events(pieces: AsyncIterator[bytes]) -> AsyncGenerator[bytes, None]:
    """The data of each server-sent event, up to `[DONE]`. Raises ServerFailure for an endless line. An event of several
    data lines, which no server sends, would be several events."""
    waiting = b""
    async for piece in pieces:
        *lines, waiting = (waiting + piece).split(b"\n")
        if len(waiting) > MAX_LINE_BYTES:
            raise ServerFailure(Fault.BROKEN, f"it sent a line of more than {MAX_LINE_BYTES} bytes")
        for line in lines:
            if not line.startswith(b"data:"):
                continue
            data = line.removeprefix(b"data:").strip()
            if data == b"[DONE]":
                return
            yield data


def read_delta(data: bytes) -> Delta | None:
    """None for an event without a choice, such as one with the usage. Raises ServerFailure for an error, and for what
    is not an event of a completion."""
    try:
        event = orjson.loads(data)
        if "error" in event:
            raise failure_in_stream(event["error"])
        choices = event["choices"]
        return _delta_of(choices[0]) if choices else None
    except (LookupError, TypeError, ValueError, AttributeError) as exc:
        raise ServerFailure(Fault.BROKEN, f"its answer cannot be read: {type(exc).__name__}") from exc


def _delta_of(choice: Mapping[str, Any]) -> Delta:
    reason = choice.get("finish_reason")
    scores = choice.get("logprobs")
    token_ids = _token_ids_of(choice)
    text = choice.get("text") or ""
    if not isinstance(text, str):
        raise TypeError(text)
    return Delta(token_ids, text, _scores_of(scores) if scores else None, None if reason is None else str(reason))


def _token_ids_of(choice: Mapping[str, Any]) -> list[int] | None:
    token_ids = choice.get("token_ids")
    if token_ids is None:
        return None
    if not isinstance(token_ids, list) or not all(type(token_id) is int for token_id in token_ids):
        raise TypeError(token_ids)
    return token_ids


def _scores_of(logprobs: Mapping[str, Any]) -> list[ScoredToken]:
    tops = logprobs.get("top_logprobs") or [{}] * len(logprobs["token_logprobs"])
    return [
        ScoredToken(float(logprob), tuple(_top_of(top or {})))
        for logprob, top in zip(logprobs["token_logprobs"], tops, strict=True)
    ]


def _top_of(top: Mapping[str, float]) -> list[tuple[int, float]]:
    found = [(_TOKEN_NAME.fullmatch(name), float(logprob)) for name, logprob in top.items()]
    return sorted([(int(name[1]), logprob) for name, logprob in found if name], key=lambda pair: -pair[1])


def failure_in_stream(error: object) -> ServerFailure:
    """Of an error that comes as an event, after the status 200."""
    code = error.get("code") if isinstance(error, dict) else None
    is_refusal = isinstance(code, int) and 400 <= code < 500 and code not in _BUSY
    fault = Fault.REFUSED if is_refusal else Fault.BROKEN
    return ServerFailure(fault, "it ended the stream with an error", _message_of({"error": error}))


_BUSY = frozenset({408, 409, 425, 429, 503, 529})
_AWAY = frozenset({401, 402, 403, 404, 405, 407, 502, 504})


def failure_of(status: int, body: bytes, headers: Mapping[str, str]) -> ServerFailure:
    """Of an answer that is not a stream."""
    fault = Fault.REFUSED if status < 500 else Fault.BROKEN
    if status in _BUSY:
        fault = Fault.BUSY
    elif status in _AWAY or 300 <= status < 400:
        fault = Fault.AWAY
    return ServerFailure(fault, f"it answered {status}", _message_of(_json_or_none(body)), _retry_after(headers))


def _json_or_none(body: bytes) -> object:
    try:
        return orjson.loads(body)
    except ValueError:
        return None


def _message_of(body: object) -> str:
    """The message of an error in any of the usual forms, in one line; empty if there is none."""
    for _ in range(2):
        if isinstance(body, dict):
            body = next((body[name] for name in ("error", "message", "detail") if body.get(name)), "")
    return " ".join(str(body or "").split())[:MAX_QUOTE_CHARS]


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds; a date, which hardly any server sends, counts as none."""
    try:
        seconds = float(headers.get("retry-after", ""))
    except ValueError:
        return None
    return min(seconds, MAX_RETRY_AFTER_SECONDS) if seconds >= 0 else None
