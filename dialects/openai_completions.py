"""Completions, whose input is text or token ids: body, requests and answers.

Completions are OpenAI's older API. Their logprobs are parallel lists, one of which has the text offset of each token.
"""

import codecs
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Discriminator, Field, Tag

from dialects.aliases import MAX_TOKENS
from dialects.openai import (
    FINISH_REASONS,
    GenerationBody,
    StreamOptions,
    Strings,
    Unsupported,
    build,
    refuse_streamed_scores,
    refuse_unused_stream_options,
    strings,
)
from dialects.openai_formats import ResponseFormat, wanted_answer
from dialects.openai_views import (
    CompletionChoiceView,
    CompletionLogprobsView,
    CompletionView,
    StreamedJob,
    answer_head,
    name_by_id,
    prompt_logprobs_view,
    usage_object,
)
from domain.errors import InvalidRequest, UnsupportedParameter
from domain.jobs import Usage
from domain.requests import MAX_PROMPT_TOKENS, GenerationRequest, GenerationResult, TokenChunk, TokenLogprob
from storage.job_queries import JobRecord
from text.models import ModelView
from text.tokenizers import TokenPiece, as_text


@dataclass(frozen=True, slots=True)
class Prompt:
    """What the choices of a prompt need to know about it. `text` and `pieces` (its tokens) are only used for echo."""

    first_index: int  # the index of its first choice
    num_choices: int
    logprobs: int | None  # the number of alternatives
    text: str = ""
    pieces: tuple[TokenPiece, ...] = ()
    is_alone: bool = False  # the prompt is only scored; there is no output
    token_ids: tuple[int, ...] | None = None  # if the tokens of prompt and output are to be returned as ids, too
    is_named_by_ids: bool = False  # whether the logprobs name tokens by their ids
    prompt_logprobs: int | None = None  # the number of alternatives for each token of the prompt, as vLLM shows them


def from_results(records: Sequence[JobRecord], prompts: Sequence[Prompt], service_tier: str | None) -> CompletionView:
    """One completion from these completed jobs, in the order of their prompts."""
    results = [record.result for record in records if isinstance(record.result, GenerationResult)]
    choices = [
        choice
        for record, result, prompt in zip(records, results, prompts, strict=True)
        for choice in _choices(result, prompt, record.token_ids)
    ]
    usage = usage_object(_sum([result.usage for result in results]))
    first = records[0].job
    return {
        **answer_head(first.id, "cmpl", first, service_tier),
        "object": "text_completion",
        "choices": choices,
        "usage": usage,
    }


class CompletionStream:
    """One job's chunks as completion chunks, under the id of the first job."""

    def __init__(self, first: StreamedJob, prompt: Prompt, *, has_usage: bool, service_tier: str | None) -> None:
        self._head = answer_head(first.job_id, "cmpl", first, service_tier) | {"object": "text_completion"}
        self._prompt = prompt
        self._has_usage = has_usage
        self._is_echoed = False
        self._begun_indexes: set[int] = set()
        self._places = [_TextPlaces(len(prompt.text)) for _ in range(prompt.num_choices)]

    def begin(self) -> Iterable[Mapping[str, object]]:
        return ()

    def from_chunk(self, chunk: TokenChunk) -> Iterable[Mapping[str, object]]:
        """The echo is sent with the first chunk, which has the prompt's logprobs."""
        if not self._is_echoed:
            self._is_echoed = True
            yield from self._echo(chunk.prompt_logprobs)
        if self._prompt.is_alone:
            yield self._chunk(chunk.index, "", None, "length")
            return
        logprobs = None
        if self._prompt.logprobs is not None and chunk.logprobs is not None:
            entries = _entries(chunk.logprobs, self._prompt.logprobs, is_named_by_ids=self._prompt.is_named_by_ids)
            logprobs = _logprobs_object(entries, self._places[chunk.index])
        finish_reason = FINISH_REASONS.get(chunk.finish_reason) if chunk.finish_reason is not None else None
        token_ids = self._token_ids_of(chunk)
        if chunk.text or logprobs or finish_reason or token_ids:
            yield self._chunk(chunk.index, chunk.text, logprobs, finish_reason, **token_ids)

    def _token_ids_of(self, chunk: TokenChunk) -> dict[str, object]:
        """Those of the prompt come with the first chunk of each index."""
        if self._prompt.token_ids is None:
            return {}
        is_first = chunk.index not in self._begun_indexes
        self._begun_indexes.add(chunk.index)
        return {"prompt_token_ids": self._prompt.token_ids if is_first else None, "token_ids": chunk.token_ids}

    def finish(self, record: JobRecord) -> Iterable[Mapping[str, object]]:
        return ()

    def _echo(self, prompt_logprobs: Sequence[TokenLogprob | None] | None) -> Iterable[Mapping[str, object]]:
        if not self._prompt.text:
            return
        entries = _prompt_entries(self._prompt, prompt_logprobs)
        for index in range(self._prompt.num_choices):
            logprobs = _logprobs_object(entries, _TextPlaces(0)) if entries else None
            yield self._chunk(index, self._prompt.text, logprobs, None)

    def _chunk(
        self, index: int, text: str, logprobs: object, finish_reason: str | None, **token_ids: object
    ) -> dict[str, object]:
        number = self._prompt.first_index + index
        choice = {"index": number, "text": text, "logprobs": logprobs, "finish_reason": finish_reason, **token_ids}
        chunk = {**self._head, "choices": [choice]}
        return chunk | {"usage": None} if self._has_usage else chunk


def usage_chunk(records: Sequence[JobRecord], service_tier: str | None) -> Iterable[Mapping[str, object]]:
    """The last chunk, with the total usage of all jobs."""
    first = records[0].job
    usage = _sum([record.result.usage for record in records if record.result is not None])
    head = answer_head(first.id, "cmpl", first, service_tier)
    yield {**head, "object": "text_completion", "choices": [], "usage": usage_object(usage)}


class _TextPlaces:
    """The offset of each token in a text, in characters; a token that continues a character has that character's
    offset."""

    def __init__(self, start: int) -> None:
        self._next = start
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def pass_over(self, added: bytes) -> int:
        """The offset of the next token, which adds these bytes to the text."""
        place = self._next
        self._next += len(self._utf8.decode(added))
        return place


@dataclass(frozen=True, slots=True)
class _Entry:
    token: str
    added: bytes  # to the text
    logprob: float | None  # None for the first token of a prompt, which has no predecessor
    top: dict[str, float] | None


def _choices(
    result: GenerationResult, prompt: Prompt, token_ids: Mapping[int, Sequence[int]] | None
) -> list[CompletionChoiceView]:
    echoed = _prompt_entries(prompt, result.prompt_logprobs)
    choices: list[CompletionChoiceView] = []
    for choice in result.choices:
        written = () if prompt.is_alone else choice.logprobs or ()
        entries = echoed + _entries(written, prompt.logprobs or 0, is_named_by_ids=prompt.is_named_by_ids)
        has_logprobs = prompt.logprobs is not None
        choices.append(
            {
                "index": prompt.first_index + choice.index,
                "text": prompt.text + ("" if prompt.is_alone else choice.text),
                "logprobs": _logprobs_object(entries, _TextPlaces(0)) if has_logprobs else None,
                "finish_reason": FINISH_REASONS[choice.finish_reason],
            }
        )
        if prompt.prompt_logprobs is not None and result.prompt_logprobs is not None:
            choices[-1]["prompt_logprobs"] = prompt_logprobs_view(result.prompt_logprobs, prompt.prompt_logprobs)
        if prompt.token_ids is not None and token_ids is not None:
            index = choice.index if choice.candidate is None else choice.candidate
            choices[-1]["prompt_token_ids"] = prompt.token_ids
            choices[-1]["token_ids"] = () if prompt.is_alone else token_ids.get(index, ())
    return choices


def _prompt_entries(prompt: Prompt, logprobs: Sequence[TokenLogprob | None] | None) -> list[_Entry]:
    if prompt.logprobs is None or logprobs is None or not prompt.pieces:
        return []
    return [
        _Entry(_name(piece.name), piece.added, None, None)
        if logprob is None
        else _entry(logprob, prompt.logprobs, _name(piece.name), piece.added)
        for piece, logprob in zip(prompt.pieces, logprobs, strict=True)
    ]


def _entries(logprobs: Iterable[TokenLogprob], num_top: int, *, is_named_by_ids: bool) -> list[_Entry]:
    if is_named_by_ids:
        return [_entry_by_ids(logprob, num_top) for logprob in logprobs]
    return [_entry(logprob, num_top, _name_of(logprob), bytes(logprob.bytes)) for logprob in logprobs]


def _entry_by_ids(logprob: TokenLogprob, num_top: int) -> _Entry:
    name = name_by_id(logprob.token_id)
    values = {name_by_id(token_id): value for token_id, _, value in logprob.top[:num_top]}
    return _Entry(name, bytes(logprob.bytes), logprob.logprob, values | {name: logprob.logprob})


def _name_of(logprob: TokenLogprob) -> str:
    return _name(bytes(logprob.bytes)) if logprob.bytes else logprob.token


def _entry(logprob: TokenLogprob, num_top: int, token: str, added: bytes) -> _Entry:
    """The alternatives, plus the token itself if it is not among them. Of two with the same name, the more likely one
    is kept."""
    values: dict[str, float] = {}
    for (_, _, value), utf8 in zip(logprob.top[:num_top], logprob.top_bytes, strict=False):
        values.setdefault(_name(bytes(utf8)), value)
    return _Entry(token, added, logprob.logprob, values | {token: logprob.logprob})


def _name(token: bytes) -> str:
    """The token as text or, if it is only part of a character, in the notation of the old API: `bytes:...`."""
    text = as_text(token)
    return text if text.encode() == token else f"bytes:{text}"


def _logprobs_object(entries: Sequence[_Entry], places: _TextPlaces) -> CompletionLogprobsView:
    return {
        "tokens": [entry.token for entry in entries],
        "token_logprobs": [entry.logprob for entry in entries],
        "top_logprobs": [entry.top for entry in entries],
        "text_offset": [places.pass_over(entry.added) for entry in entries],
    }


def _sum(usages: Sequence[Usage]) -> Usage:
    return Usage(
        prompt_tokens=sum(usage.prompt_tokens for usage in usages),
        completion_tokens=sum(usage.completion_tokens for usage in usages),
        cached_tokens=sum(usage.cached_tokens for usage in usages),
    )


MAX_PROMPTS = 128

DEFAULT_MAX_TOKENS = 16  # OpenAI's default for this route


def _kind_of(prompt: object) -> str:
    if isinstance(prompt, str):
        return "<text>"
    first = prompt[0] if isinstance(prompt, list) and prompt else ""
    return "<texts>" if isinstance(first, str) else "<token_lists>" if isinstance(first, list) else "<tokens>"


Texts = Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS)]

TokenList = Annotated[list[int], Field(max_length=MAX_PROMPT_TOKENS)]

TokenLists = Annotated[list[TokenList], Field(min_length=1, max_length=MAX_PROMPTS)]

CompletionPrompts = Annotated[
    Annotated[str, Tag("<text>")]
    | Annotated[Texts, Tag("<texts>")]
    | Annotated[TokenList, Tag("<tokens>")]
    | Annotated[TokenLists, Tag("<token_lists>")],
    Discriminator(_kind_of),
]


class CompletionBody(GenerationBody):
    ALIASES = GenerationBody.ALIASES | MAX_TOKENS

    prompt: CompletionPrompts
    max_tokens: int | None = None
    n: int | None = None
    best_of: int | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    stop: Strings | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None  # vLLM's and llama.cpp's
    suffix: Unsupported = None

    # vLLM's
    prompt_logprobs: int | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None


def to_generation_requests(body: CompletionBody) -> list[GenerationRequest]:
    """One per prompt. Raises InvalidRequest."""
    refuse_unused_stream_options(body)
    if body.stream and body.best_of is not None and body.best_of > 1:
        raise UnsupportedParameter(
            "best_of cannot be streamed, since the best choices are known only at the end; leave out stream or best_of",
            param="best_of",
        )
    if body.max_tokens == 0 and not body.echo:
        raise InvalidRequest(
            "max_tokens is 0 and echo is not set, so there is nothing to return; set echo or raise max_tokens",
            param="max_tokens",
        )
    refuse_streamed_scores(body)
    _refuse_ids_elsewhere(body)
    params = body.sampling(
        max_tokens=DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens,
        stop=strings(body.stop),
        best_of=None if body.best_of == (body.n or 1) else body.best_of,
        prompt_logprobs=_num_prompt_logprobs(body),
        structured_output=wanted_answer(body),
    )
    return [build(GenerationRequest, {"model": body.model, "params": params} | prompt) for prompt in _prompts(body)]


def _refuse_ids_elsewhere(body: CompletionBody) -> None:
    if body.return_tokens_as_token_ids and body.echo:
        raise UnsupportedParameter(
            "return_tokens_as_token_ids is not supported together with echo; leave out one of the two",
            param="return_tokens_as_token_ids",
        )


def _prompts(body: CompletionBody) -> list[dict[str, Any]]:
    prompt: Any = body.prompt
    kind = _kind_of(prompt)
    if kind in ("<text>", "<texts>"):
        return [{"prompt": text} for text in strings(prompt) or ()]
    return [{"prompt_token_ids": ids} for ids in (prompt if kind == "<token_lists>" else [prompt])]


def _num_prompt_logprobs(body: CompletionBody) -> int | None:
    """A prompt that is only echoed is scored as well, since scoring is all that a job without output does."""
    echoed = body.logprobs if body.logprobs is not None else 0 if body.max_tokens == 0 else None
    asked = [number for number in (body.prompt_logprobs, echoed if body.echo else None) if number is not None]
    return max(asked, default=None)


def prompt_of(body: CompletionBody, generation: GenerationRequest, view: ModelView, number: int) -> Prompt:
    n = generation.params.n
    token_ids = view.encode(generation) if body.echo or body.return_token_ids else []
    returned_ids = tuple(token_ids) if body.return_token_ids else None
    if not body.echo:
        return Prompt(
            first_index=number * n,
            num_choices=n,
            logprobs=body.logprobs,
            token_ids=returned_ids,
            is_named_by_ids=bool(body.return_tokens_as_token_ids),
            prompt_logprobs=body.prompt_logprobs,
        )
    is_text = generation.prompt is not None
    return Prompt(
        first_index=number * n,
        num_choices=n,
        logprobs=body.logprobs,
        text=generation.prompt if generation.prompt is not None else view.decode(token_ids),
        pieces=() if body.logprobs is None else tuple(view.pieces(token_ids, skip_special_tokens=is_text)),
        is_alone=body.max_tokens == 0,
        token_ids=returned_ids,
        prompt_logprobs=body.prompt_logprobs,
    )
