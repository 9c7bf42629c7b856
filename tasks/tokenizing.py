"""Prompts to token ids off the event loop: bounded in length, in time and in how many wait."""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from domain.embeddings import EmbeddingRequest
from domain.errors import ContextLengthExceeded, ServerOverloaded
from domain.requests import ChatMessage, GenerationRequest
from observability import labelled, tokenize_seconds
from tasks.embed import encode_inputs
from tasks.models import ModelView

# Ordinary text has three to five characters a token. More than this many cannot fit the context, so the tokenizer is
# spared the attempt; what it does get takes well under a second at its worst.
MAX_CHARS_PER_TOKEN = 16
INLINE_CHARS = 2_000  # a third of a millisecond of tokenizer: less than two thread switches under load are worth
NUM_THREADS = 2
MAX_WAITING = 128
TIMEOUT_SECONDS = 10.0

Ids = TypeVar("Ids")


class TokenizingPool:
    """Short prompts are tokenized where they are, long ones in a few threads (the tokenizer lets go of the GIL)."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="tokenizer")
        self._num_waiting = 0

    async def encode(self, view: ModelView, request: GenerationRequest) -> list[int]:
        """Raises ContextLengthExceeded, InvalidRequest (the chat template refuses) or ServerOverloaded."""
        num_chars = num_prompt_chars(request)
        refuse_endless_prompt(view, request, num_chars)
        return await self._run(view, num_chars, lambda: view.encode(request))

    async def encode_inputs(self, view: ModelView, request: EmbeddingRequest) -> list[list[int]]:
        """Raises ContextLengthExceeded, InvalidRequest or ServerOverloaded."""
        return await self._run(view, request.num_chars, lambda: encode_inputs(request, view))

    async def _run(self, view: ModelView, num_chars: int, encode: Callable[[], Ids]) -> Ids:
        started = time.perf_counter()
        ids = encode() if num_chars <= INLINE_CHARS else await self._encode_in_thread(encode)
        labelled(tokenize_seconds, view.spec.id).observe(time.perf_counter() - started)
        return ids

    async def _encode_in_thread(self, encode: Callable[[], Ids]) -> Ids:
        if self._num_waiting >= MAX_WAITING:
            raise ServerOverloaded(f"{MAX_WAITING} long prompts are waiting to be tokenized; retry in a moment")
        self._num_waiting += 1
        work = asyncio.get_running_loop().run_in_executor(self._threads, encode)
        work.add_done_callback(self._forget)
        try:
            return await asyncio.wait_for(asyncio.shield(work), TIMEOUT_SECONDS)
        except TimeoutError:
            raise ServerOverloaded(
                f"the prompt was not tokenized within {TIMEOUT_SECONDS:.0f} s; retry, or shorten it"
            ) from None

    def _forget(self, work: asyncio.Future[Any]) -> None:
        # A thread cannot be stopped: a prompt given up on keeps its place in the bound until the thread is through.
        self._num_waiting -= 1
        if not work.cancelled():
            work.exception()  # read, so that one nobody waited for is not reported as never retrieved

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)


def num_prompt_chars(request: GenerationRequest) -> int:
    if request.messages is not None:
        tools = sum(len(tool.model_dump_json()) for tool in request.tools)
        return tools + sum(_num_message_chars(message) for message in request.messages)
    return len(request.prompt or "")


def _num_message_chars(message: ChatMessage) -> int:
    calls = sum(len(call.arguments) for call in message.tool_calls)
    return len(message.content) + len(message.reasoning_content or "") + calls


def refuse_endless_prompt(view: ModelView, request: GenerationRequest, num_chars: int) -> None:
    bound = view.max_model_len * MAX_CHARS_PER_TOKEN
    if num_chars > bound:
        raise ContextLengthExceeded(
            f"the prompt has {num_chars} characters, but {view.spec.id} holds {view.max_model_len} tokens, prompt and "
            f"output together; shorten it to far less than {bound} characters",
            param=request.source,
        )
