"""Every grammar is compiled once before its job is accepted, in a process of its model.

One model's compiler of grammars: a child process that has the model's vocabulary, and the grammars that wait for it.

A vocabulary of 262,000 tokens takes seven seconds of CPU time to read and, for that while, up to 900 MB; then the
process keeps some 250 MB. So there is a process for each model, which reads its vocabulary ahead of the first grammar
and keeps it as long as the model is served: nobody waits for another model's, and forks share its pages. Large ones are
read one at a time. A process that ends is started again.

The gate for structured output: each grammar is compiled once before its job is accepted, in a process that may die.

A grammar of a few bytes can ask for hours or gigabytes. So it is compiled where that does no harm: in a child process
with little time and memory. Verdicts are remembered, for the model's revision that they were made for.
"""

import asyncio
import contextlib
import hashlib
import logging
import os
import signal
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID

import orjson

from domain.errors import CeleriacError, InvalidRequest, ServerOverloaded, UnsupportedParameter
from domain.structured_output import StructuredOutput
from observability import describe_exception
from text.models import ModelView, Vocabulary

log = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parents[1]

COMMAND = (sys.executable, "-m", "text.grammar_process")

LARGE_VOCABULARY = 100_000  # tokens

MAX_WAITING_OF_TENANT = 32

MAX_WAITING = 512

FIRST_PAUSE_SECONDS = 1.0  # before a process that ended is started again; doubled each time, until one is ready

LAST_PAUSE_SECONDS = 60.0

MAX_LINE_BYTES = 65_536  # of what the process says

MAX_LOGGED = 500  # characters

#: How the compiling of a grammar ends that goes beyond its limits: by its own timer, or by a refused allocation.
_EXCESS_BY_RETURN_CODE = {
    -signal.SIGPROF: "time",
    -signal.SIGABRT: "memory",
    -signal.SIGSEGV: "memory",
}


@dataclass(frozen=True, slots=True)
class Verdict:
    """`reason` is None where the grammar can be followed; `place` is the field of the output that it is about."""

    reason: str | None
    place: str


@dataclass(frozen=True, slots=True)
class Question:
    """The answer is a result, never an exception: nobody may be there any more to take it."""

    output: dict[str, Any]
    answer: "asyncio.Future[Verdict | CeleriacError]" = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )


class ProcessLost(Exception):
    """The process ended."""


class GrammarCompiler:
    """Used on one event loop, from when it is made until `stop`."""

    def __init__(
        self,
        view: ModelView,
        vocabulary: Vocabulary,
        *,
        large_loads: asyncio.Lock,
        known: Callable[[bytes], Verdict | None],
        remember: Callable[[bytes, Verdict], None],
    ) -> None:
        """`large_loads` is held while a large vocabulary is read. `known` and `remember` keep verdicts by key."""
        self.model_id, self.revision = view.spec.id, view.revision
        self.is_ready = False
        self.process: asyncio.subprocess.Process | None = None
        self._vocabulary = vocabulary
        self._turn_to_load = large_loads if vocabulary.size > LARGE_VOCABULARY else contextlib.nullcontext()
        self._known, self._remember = known, remember
        self._waiting: OrderedDict[UUID, OrderedDict[bytes, Question]] = OrderedDict()  # by tenant, in turn
        self._has_work = asyncio.Event()
        self._unsupported: str | None = None  # why no grammar can be followed
        self._attending: asyncio.Task[None] | None = None
        self._running = asyncio.create_task(self._run())

    def ask(self, tenant_id: UUID, key: bytes, output: dict[str, Any]) -> "asyncio.Future[Verdict | CeleriacError]":
        """Tenants take turns, so that one with many slow grammars delays another by one of them. Await the answer
        without cancelling it: others may wait for the same. Raises ServerOverloaded or UnsupportedParameter."""
        if self._unsupported is not None:
            raise unsupported(self.model_id, self._unsupported)
        asked: Mapping[bytes, Question] = self._waiting.get(tenant_id, {})
        if key in asked:
            return asked[key].answer
        if len(asked) >= MAX_WAITING_OF_TENANT:
            raise ServerOverloaded(f"{len(asked)} of your grammars are waiting to be compiled; retry in a moment")
        if sum(map(len, self._waiting.values())) >= MAX_WAITING:
            raise ServerOverloaded(f"{MAX_WAITING} grammars are waiting to be compiled; retry in a moment")
        question = self._waiting.setdefault(tenant_id, OrderedDict())[key] = Question(output)
        self._has_work.set()
        return question.answer

    def stop(self) -> "asyncio.Task[None]":
        """The task ends when the process has."""
        self._running.cancel()
        return self._running

    async def _run(self) -> None:
        pause_seconds = FIRST_PAUSE_SECONDS
        try:
            while self._unsupported is None:
                try:
                    await self._load_and_serve()
                except Exception as exc:  # an outermost loop: whatever it was, the process is started again
                    pause_seconds = FIRST_PAUSE_SECONDS if self.is_ready else pause_seconds
                    reason = describe_exception(exc)
                    log.warning("the grammar compiler ended", extra={"model": self.model_id, "reason": reason})
                finally:
                    self.is_ready = False
                    await self._end_process()
                if self._unsupported is None:
                    await asyncio.sleep(pause_seconds)
                    pause_seconds = min(2 * pause_seconds, LAST_PAUSE_SECONDS)
        finally:
            self._refuse_waiting()

    def _refuse_waiting(self) -> None:
        for asked in self._waiting.values():
            for question in asked.values():
                if self._unsupported is not None:
                    question.answer.set_result(unsupported(self.model_id, self._unsupported))
                else:
                    question.answer.set_result(ServerOverloaded("the model was loaded anew; retry in a moment"))
        self._waiting.clear()

    async def _load_and_serve(self) -> None:
        """Until the process ends. Raises ProcessLost or OSError. Returns where no grammar can be followed."""
        async with self._turn_to_load:
            process = await self._start_process()
            vocabulary = self._vocabulary
            header = {
                "num_bytes": len(vocabulary.tokenizer_json),
                "vocab_size": vocabulary.size,
                "eos_token_ids": vocabulary.eos_token_ids,
            }
            answer = await self._tell(process, orjson.dumps(header) + b"\n", vocabulary.tokenizer_json)
        if answer["reason"] is not None:
            self._unsupported = answer["reason"]
            return
        self.is_ready = True
        while process.returncode is None:
            if self._waiting:
                await self._answer_next(process)
            else:
                self._has_work.clear()
                await self._has_work.wait()
        raise ProcessLost(f"return code {process.returncode}")

    async def _answer_next(self, process: asyncio.subprocess.Process) -> None:
        """Raises ProcessLost or OSError."""
        key, question = self._take_next()
        answer: Verdict | CeleriacError = ServerOverloaded("the grammar could not be compiled; retry in a moment")
        try:
            verdict = self._known(key)  # another may have asked the same meanwhile
            if verdict is None:
                verdict = _verdict_of(question.output, await self._tell(process, orjson.dumps(question.output) + b"\n"))
                if verdict is not None:
                    self._remember(key, verdict)
            answer = verdict or answer
        finally:
            question.answer.set_result(answer)

    def _take_next(self) -> tuple[bytes, Question]:
        tenant_id, asked = self._waiting.popitem(last=False)
        key, question = asked.popitem(last=False)
        if asked:
            self._waiting[tenant_id] = asked  # behind the others
        return key, question

    async def _start_process(self) -> asyncio.subprocess.Process:
        self.process = await asyncio.create_subprocess_exec(
            *COMMAND,
            cwd=ROOT,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            limit=MAX_LINE_BYTES,
            start_new_session=True,  # Ctrl-C is for the API, which ends this process in its turn
        )
        self._attending = asyncio.create_task(self._attend(self.process))
        return self.process

    async def _attend(self, process: asyncio.subprocess.Process) -> None:
        """Log what it has to say, which quotes no grammar, and hear of its end."""
        assert process.stderr is not None
        while said := await process.stderr.read(MAX_LINE_BYTES):
            for line in filter(None, said.decode(errors="replace").splitlines()):
                log.warning("the grammar compiler says: %s", line[:MAX_LOGGED], extra={"model": self.model_id})
        await process.wait()
        self._has_work.set()

    async def _tell(self, process: asyncio.subprocess.Process, *parts: bytes) -> dict[str, Any]:
        """The answer. Raises ProcessLost or OSError."""
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.writelines(parts)
        await process.stdin.drain()
        try:
            answer: dict[str, Any] = orjson.loads(await process.stdout.readuntil())
        except asyncio.IncompleteReadError as exc:
            raise ProcessLost(f"return code {await process.wait()}") from exc
        return answer

    async def _end_process(self) -> None:
        process, self.process = self.process, None
        if process is None:
            return
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        await process.wait()
        if self._attending is not None:
            await self._attending


def _verdict_of(output: dict[str, Any], answer: dict[str, Any]) -> Verdict | None:
    """None where the machine is to blame, not the grammar."""
    if "return_code" not in answer:
        return Verdict(answer["reason"], answer["place"])
    excess = _EXCESS_BY_RETURN_CODE.get(answer["return_code"])
    kind = next(name for name in StructuredOutput.model_fields if name in output)
    return None if excess is None else Verdict(f"it takes too much {excess} to compile", place=kind)


def unsupported(model_id: str, reason: str) -> UnsupportedParameter:
    return UnsupportedParameter(
        f"{model_id} cannot follow a structured output: {reason}; leave params.structured_output out",
        param="params.structured_output",
    )


MAX_REMEMBERED = 4_096  # verdicts, of at most a few hundred bytes

PATIENCE_SECONDS = 15.0  # of a request, for its model's vocabulary and for its turn

RETRY_SECONDS = 5.0


class GrammarGate:
    """Used on one event loop. A model's compiler starts when it is prepared, or with the first grammar that comes."""

    def __init__(self) -> None:
        self._verdicts: OrderedDict[bytes, Verdict] = OrderedDict()
        self._compilers: dict[str, GrammarCompiler] = {}  # by model
        self._stopping: set[asyncio.Task[None]] = set()
        self._large_loads = asyncio.Lock()

    def prepare(self, views: Iterable[ModelView]) -> None:
        """Have the vocabularies of these models read in the background, and let go of all others'."""
        by_model = {view.spec.id: view for view in views if view.vocabulary is not None}
        for model_id in self._compilers.keys() - by_model.keys():
            self._stop(model_id)
        for view in by_model.values():
            self._compiler_of(view)

    async def check(self, view: ModelView, output: StructuredOutput, tenant_id: UUID) -> None:
        """Raises InvalidRequest, UnsupportedParameter or ServerOverloaded."""
        dumped = output.model_dump(mode="json", exclude_none=True)
        names = f"{view.spec.id}\0{view.revision}\0".encode()
        key = hashlib.sha256(names + orjson.dumps(dumped)).digest()
        verdict = self._known(key)
        if verdict is None:
            compiler = self._compiler_of(view)
            verdict = await _answer_in_time(compiler, compiler.ask(tenant_id, key, dumped))
        if verdict.reason is not None:
            raise InvalidRequest(
                f"params.structured_output.{verdict.place} cannot be followed: {verdict.reason}; simplify it",
                param=f"params.structured_output.{verdict.place}",
            )

    def process_id(self, model_id: str) -> int | None:
        """None while there is no process."""
        compiler = self._compilers.get(model_id)
        process = compiler.process if compiler is not None else None
        return process.pid if process is not None and process.returncode is None else None

    def is_ready(self, model_id: str) -> bool:
        """Whether the model's vocabulary is read."""
        compiler = self._compilers.get(model_id)
        return compiler is not None and compiler.is_ready

    async def aclose(self) -> None:
        for model_id in list(self._compilers):
            self._stop(model_id)
        await asyncio.gather(*self._stopping, return_exceptions=True)

    def _compiler_of(self, view: ModelView) -> GrammarCompiler:
        """Raises UnsupportedParameter."""
        if view.vocabulary is None:
            raise unsupported(view.spec.id, "it runs without a vocabulary")
        compiler = self._compilers.get(view.spec.id)
        if compiler is not None and compiler.revision != view.revision:
            self._stop(view.spec.id)
            compiler = None
        if compiler is None:
            compiler = self._compilers[view.spec.id] = GrammarCompiler(
                view, view.vocabulary, large_loads=self._large_loads, known=self._known, remember=self._remember
            )
        return compiler

    def _stop(self, model_id: str) -> None:
        task = self._compilers.pop(model_id).stop()
        self._stopping.add(task)
        task.add_done_callback(self._stopping.discard)

    def _known(self, key: bytes) -> Verdict | None:
        verdict = self._verdicts.get(key)
        if verdict is not None:
            self._verdicts.move_to_end(key)
        return verdict

    def _remember(self, key: bytes, verdict: Verdict) -> None:
        self._verdicts[key] = verdict
        if len(self._verdicts) > MAX_REMEMBERED:
            self._verdicts.popitem(last=False)


async def _answer_in_time(compiler: GrammarCompiler, answer: "asyncio.Future[Verdict | CeleriacError]") -> Verdict:
    """What comes too late is remembered for the next try."""
    await asyncio.wait({answer}, timeout=PATIENCE_SECONDS)
    if not answer.done():
        reason = "is not compiled yet" if compiler.is_ready else f"waits for the vocabulary of {compiler.model_id}"
        raise ServerOverloaded(f"the grammar {reason}; retry in a moment", retry_after_seconds=RETRY_SECONDS)
    verdict = answer.result()
    if isinstance(verdict, CeleriacError):
        raise verdict
    return verdict
