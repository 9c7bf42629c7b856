"""Checks structured output: every grammar is compiled before its job is accepted, in one child process per model.

A grammar of a few bytes can cost hours or gigabytes, so it is compiled in a child process with tight limits on time and
memory. Verdicts are cached per model revision.

A vocabulary of 262,000 tokens takes seven seconds of CPU time to read and up to 900 MB meanwhile; then the process
keeps some 250 MB. So each model has its own process, which reads the vocabulary before the first grammar arrives and
lives as long as the model is served: models do not wait for each other, and forks share its pages. Large vocabularies
are read one at a time. A process that dies is restarted.
"""

import asyncio
import contextlib
import hashlib
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID

import orjson

from domain.errors import CeleriacError, InvalidRequest, Overloaded, ServerOverloaded, UnsupportedParameter
from domain.shares import SharedMemory, SharedQueue
from domain.structured_output import StructuredOutput
from local.lifetime import ending_with_us
from observability import describe_exception
from text.models import ModelView, Vocabulary

log = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parents[1]

COMMAND = (sys.executable, "-m", "text.grammar_process")

LARGE_VOCABULARY = 100_000  # tokens

MAX_WAITING = 64  # grammars of all tenants, per model

FIRST_PAUSE_SECONDS = 1.0  # before a dead process is restarted; doubled each time until one is ready

LAST_PAUSE_SECONDS = 60.0

MAX_LINE_BYTES = 65_536  # per line of the process's output

MAX_LOGGED = 500  # characters

#: The return codes with which a compiler that exceeds its limits dies: its own timer, or a failed allocation.
_EXCESS_BY_RETURN_CODE = {
    -signal.SIGPROF: "time",
    -signal.SIGABRT: "memory",
    -signal.SIGSEGV: "memory",
}


@dataclass(frozen=True, slots=True)
class GrammarVerdict:
    """`reason` is None if the grammar can be followed; `place` is the field of the structured output at fault."""

    reason: str | None
    place: str


@dataclass(frozen=True, slots=True)
class Question:
    """A grammar to compile. An error is the result of `answer`, not its exception, which might never be retrieved."""

    key: bytes
    output: dict[str, Any]
    answer: "asyncio.Future[GrammarVerdict | CeleriacError]" = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )


class ProcessLost(Exception):
    """The compiler process ended."""


class GrammarCompiler:
    """One model's compiler process and the grammars that wait for it. Bound to one event loop until `stop`."""

    def __init__(
        self,
        view: ModelView,
        vocabulary: Vocabulary,
        *,
        large_loads: asyncio.Lock,
        verdicts: SharedMemory[bytes, GrammarVerdict],
        charge: Callable[[UUID, float], None],
    ) -> None:
        """`large_loads` is held while a large vocabulary is read. `verdicts` are those of all models.
        `charge(tenant, seconds)` is called for each grammar that is refused."""
        self.model_id, self.revision = view.spec.id, view.revision
        self.is_ready = False
        self.process: asyncio.subprocess.Process | None = None
        self._vocabulary = vocabulary
        self._turn_to_load = large_loads if vocabulary.size > LARGE_VOCABULARY else contextlib.nullcontext()
        self._verdicts, self._charge = verdicts, charge
        self._waiting: SharedQueue[Question] = SharedQueue(MAX_WAITING)
        self._asked: dict[tuple[UUID, bytes], Question] = {}  # those that wait
        self._has_work = asyncio.Event()
        self._unsupported: str | None = None  # why the model cannot follow any grammar
        self._attending: asyncio.Task[None] | None = None
        self._running = asyncio.create_task(self._run())

    def ask(
        self, tenant_id: UUID, key: bytes, output: dict[str, Any]
    ) -> "asyncio.Future[GrammarVerdict | CeleriacError]":
        """A future of the answer, which must not be cancelled, as others may await it, too. Tenants take turns, so a
        tenant with many slow grammars delays the others by at most one. Raises ServerOverloaded or
        UnsupportedParameter."""
        if self._unsupported is not None:
            raise unsupported(self.model_id, self._unsupported)
        question = self._asked.get((tenant_id, key))
        if question is None:
            question = Question(key, output)
            self._waiting.append(tenant_id, question, what="grammars are waiting to be compiled")
            self._asked[tenant_id, key] = question
            self._has_work.set()
        return question.answer

    def stop(self) -> "asyncio.Task[None]":
        """Stop the process. The returned task is done when the process has ended."""
        self._running.cancel()
        return self._running

    async def _run(self) -> None:
        pause_seconds = FIRST_PAUSE_SECONDS
        try:
            while self._unsupported is None:
                try:
                    await self._load_and_serve()
                except Exception as exc:  # an outermost loop: whatever happened, the process is restarted
                    pause_seconds = FIRST_PAUSE_SECONDS if self.is_ready else pause_seconds
                    reason = describe_exception(exc)
                    log.warning(
                        "the grammar compiler ended unexpectedly", extra={"model": self.model_id, "reason": reason}
                    )
                finally:
                    self.is_ready = False
                    await self._end_process()
                if self._unsupported is None:
                    await asyncio.sleep(pause_seconds)
                    pause_seconds = min(2 * pause_seconds, LAST_PAUSE_SECONDS)
        finally:
            self._refuse_waiting()

    def _refuse_waiting(self) -> None:
        while len(self._waiting):
            _, question = self._waiting.pop()
            if self._unsupported is not None:
                question.answer.set_result(unsupported(self.model_id, self._unsupported))
            else:
                question.answer.set_result(ServerOverloaded("the model was reloaded meanwhile; retry in a moment"))
        self._asked.clear()

    async def _load_and_serve(self) -> None:
        """Serve until the process ends, then raise ProcessLost or OSError. Returns only if the model cannot follow any
        grammar."""
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
            if len(self._waiting):
                await self._answer_next(process)
            else:
                self._has_work.clear()
                await self._has_work.wait()
        raise ProcessLost(f"return code {process.returncode}")

    async def _answer_next(self, process: asyncio.subprocess.Process) -> None:
        """Raises ProcessLost or OSError."""
        tenant_id, question = self._waiting.pop()
        del self._asked[tenant_id, question.key]
        answer: GrammarVerdict | CeleriacError = ServerOverloaded(
            "the grammar could not be compiled; retry in a moment"
        )
        try:
            verdict = self._verdicts.find(tenant_id, question.key)  # since then compiled for another request
            if verdict is None:
                began_at = time.monotonic()
                verdict = _verdict_of(question.output, await self._tell(process, orjson.dumps(question.output) + b"\n"))
                if verdict is not None:
                    self._verdicts.keep(tenant_id, question.key, verdict)
                if verdict is not None and verdict.reason is not None:
                    self._charge(tenant_id, time.monotonic() - began_at)
            answer = verdict or answer
        finally:
            question.answer.set_result(answer)

    async def _start_process(self) -> asyncio.subprocess.Process:
        self.process = await asyncio.create_subprocess_exec(
            *ending_with_us(COMMAND),
            cwd=ROOT,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            limit=MAX_LINE_BYTES,
            start_new_session=True,  # so that Ctrl-C reaches only the API, which then stops this process
        )
        self._attending = asyncio.create_task(self._attend(self.process))
        return self.process

    async def _attend(self, process: asyncio.subprocess.Process) -> None:
        """Log the process's stderr, which does not quote grammars, until it ends."""
        assert process.stderr is not None
        while said := await process.stderr.read(MAX_LINE_BYTES):
            for line in filter(None, said.decode(errors="replace").splitlines()):
                log.warning("the grammar compiler wrote: %s", line[:MAX_LOGGED], extra={"model": self.model_id})
        await process.wait()
        self._has_work.set()

    async def _tell(self, process: asyncio.subprocess.Process, *parts: bytes) -> dict[str, Any]:
        """Send `parts` and read one answer. Raises ProcessLost or OSError."""
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


def _verdict_of(output: dict[str, Any], answer: dict[str, Any]) -> GrammarVerdict | None:
    """The verdict; None if the process died for a reason other than the grammar."""
    if "return_code" not in answer:
        return GrammarVerdict(answer["reason"], answer["place"])
    excess = _EXCESS_BY_RETURN_CODE.get(answer["return_code"])
    kind = next(name for name in StructuredOutput.model_fields if name in output)
    return None if excess is None else GrammarVerdict(f"it takes too much {excess} to compile", place=kind)


def unsupported(model_id: str, reason: str) -> UnsupportedParameter:
    return UnsupportedParameter(
        f"{model_id} does not support structured output: {reason}; leave out params.structured_output",
        param="params.structured_output",
    )


MAX_REMEMBERED = 4_096  # verdicts, of at most a few hundred bytes each

PATIENCE_SECONDS = 15.0  # how long a request waits for the vocabulary and for its turn

MAX_REFUSAL_SECONDS = 60.0  # that one tenant's refused grammars may take

REGAINED_SECONDS_PER_SECOND = 0.25

RETRY_SECONDS = 5.0  # Retry-After of a request whose grammar was not compiled in time


class RefusalBudget:
    """How much compiling each tenant has spent on grammars that were refused: a bucket that leaks."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._spent: dict[UUID, tuple[float, float]] = {}  # seconds, and as of when

    def charge(self, tenant_id: UUID, seconds: float) -> None:
        now = self._clock()
        spent = {tenant: self._seconds_of(tenant) for tenant in self._spent}
        self._spent = {tenant: (left, now) for tenant, left in spent.items() if left > 0}
        self._spent[tenant_id] = (spent.get(tenant_id, 0.0) + seconds, now)

    def refuse_if_spent(self, tenant_id: UUID) -> None:
        """Raises Overloaded."""
        excess = self._seconds_of(tenant_id) - MAX_REFUSAL_SECONDS
        if excess > 0:
            raise Overloaded(
                f"your refused grammars took more than {MAX_REFUSAL_SECONDS:.0f} s to compile, so no new ones are "
                "compiled for now; send grammars that were accepted before, or retry later with simpler ones",
                retry_after_seconds=excess / REGAINED_SECONDS_PER_SECOND,
                param="params.structured_output",
            )

    def _seconds_of(self, tenant_id: UUID) -> float:
        seconds, since = self._spent.get(tenant_id, (0.0, 0.0))
        return max(0.0, seconds - REGAINED_SECONDS_PER_SECOND * (self._clock() - since))


class GrammarGate:
    """The compilers of all models. Bound to one event loop. A model's compiler starts when the model is prepared or its
    first grammar arrives."""

    def __init__(self) -> None:
        # By tenant, or else one could tell by the time whether another has used a grammar.
        self._verdicts: SharedMemory[bytes, GrammarVerdict] = SharedMemory(MAX_REMEMBERED)
        self._compilers: dict[str, GrammarCompiler] = {}  # by model
        self._stopping: set[asyncio.Task[None]] = set()
        self._large_loads = asyncio.Lock()
        self._budget = RefusalBudget()

    def prepare(self, views: Iterable[ModelView]) -> None:
        """Read the vocabularies of these models in the background, and stop the compilers of all others."""
        by_model = {view.spec.id: view for view in views if view.vocabulary is not None}
        for model_id in self._compilers.keys() - by_model.keys():
            self._stop(model_id)
        for view in by_model.values():
            self._compiler_of(view)

    async def check(self, view: ModelView, output: StructuredOutput, tenant_id: UUID) -> None:
        """Returns if the model can follow the grammar. Raises InvalidRequest, UnsupportedParameter or
        ServerOverloaded."""
        dumped = output.model_dump(mode="json", exclude_none=True)
        names = f"{view.spec.id}\0{view.revision}\0".encode()
        key = hashlib.sha256(names + orjson.dumps(dumped)).digest()
        verdict = self._verdicts.find(tenant_id, key)
        if verdict is None:
            self._budget.refuse_if_spent(tenant_id)
            compiler = self._compiler_of(view)
            verdict = await _answer_in_time(compiler, compiler.ask(tenant_id, key, dumped))
        if verdict.reason is not None:
            raise InvalidRequest(
                f"params.structured_output.{verdict.place} cannot be enforced: {verdict.reason}; simplify it",
                param=f"params.structured_output.{verdict.place}",
            )

    def process_id(self, model_id: str) -> int | None:
        """The id of the model's compiler process; None if there is no process."""
        compiler = self._compilers.get(model_id)
        process = compiler.process if compiler is not None else None
        return process.pid if process is not None and process.returncode is None else None

    def is_ready(self, model_id: str) -> bool:
        """Whether the model's vocabulary has been read."""
        compiler = self._compilers.get(model_id)
        return compiler is not None and compiler.is_ready

    async def aclose(self) -> None:
        for model_id in list(self._compilers):
            self._stop(model_id)
        await asyncio.gather(*self._stopping, return_exceptions=True)

    def _compiler_of(self, view: ModelView) -> GrammarCompiler:
        """Raises UnsupportedParameter."""
        if view.vocabulary is None:
            raise unsupported(view.spec.id, "it has no vocabulary")
        compiler = self._compilers.get(view.spec.id)
        if compiler is not None and compiler.revision != view.revision:
            self._stop(view.spec.id)
            compiler = None
        if compiler is None:
            compiler = self._compilers[view.spec.id] = GrammarCompiler(
                view,
                view.vocabulary,
                large_loads=self._large_loads,
                verdicts=self._verdicts,
                charge=self._budget.charge,
            )
        return compiler

    def _stop(self, model_id: str) -> None:
        task = self._compilers.pop(model_id).stop()
        self._stopping.add(task)
        task.add_done_callback(self._stopping.discard)


async def _answer_in_time(
    compiler: GrammarCompiler, answer: "asyncio.Future[GrammarVerdict | CeleriacError]"
) -> GrammarVerdict:
    """Wait for the answer for a limited time. A later answer is cached for the retry."""
    await asyncio.wait({answer}, timeout=PATIENCE_SECONDS)
    if not answer.done():
        reason = "is not compiled yet" if compiler.is_ready else f"is waiting for the vocabulary of {compiler.model_id}"
        raise ServerOverloaded(f"the grammar {reason}; retry in a moment", retry_after_seconds=RETRY_SECONDS)
    verdict = answer.result()
    if isinstance(verdict, CeleriacError):
        raise verdict
    return verdict
