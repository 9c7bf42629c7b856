"""The gate for structured output: each grammar is compiled once before its job is accepted, in a process that may die.

A grammar of a few bytes can ask for hours or gigabytes. So it is compiled where that does no harm: in a child process
with little time and memory, which is killed and started again at need. Verdicts are remembered.
"""

import asyncio
import contextlib
import hashlib
import signal
import sys
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from domain.errors import InvalidRequest, ServerOverloaded, UnsupportedParameter
from domain.structured_output import StructuredOutput
from tasks.models import ModelView, Vocabulary

ROOT = Path(__file__).resolve().parents[1]
MAX_REMEMBERED = 4_096  # verdicts, of at most a few hundred bytes
MAX_WAITING = 32
WAIT_SECONDS = 5.0  # for the process to be free
JUDGE_SECONDS = 5.0  # by the clock, on a busy machine; the process limits itself to half a second of CPU time
START_SECONDS = 600.0  # for a model's tokenizer, by the clock: on a busy machine the process counts its CPU time
MAX_ANSWER_BYTES = 65_536

#: How the process ends when it goes beyond its limits: by its own timer, or by an allocation that was refused.
_EXCESS_BY_RETURN_CODE = {-signal.SIGPROF: "time", -signal.SIGABRT: "memory", -signal.SIGSEGV: "memory"}


@dataclass(frozen=True, slots=True)
class Verdict:
    """`reason` is None where the grammar can be followed; `place` is the field of the output that it is about."""

    reason: str | None
    place: str


class ProcessLost(Exception):
    """The process ended, or was ended, before it answered."""

    def __init__(self, return_code: int) -> None:
        super().__init__(f"return code {return_code}")
        self.return_code = return_code


class GrammarGate:
    """Used on one event loop. The process starts with the first grammar that comes."""

    def __init__(self) -> None:
        self._verdicts: OrderedDict[bytes, Verdict] = OrderedDict()
        self._turn = asyncio.Lock()
        self._num_waiting = 0
        self._process: asyncio.subprocess.Process | None = None
        self._known_models: set[str] = set()  # whose tokenizer the process has

    async def check(self, view: ModelView, output: StructuredOutput) -> None:
        """Raises InvalidRequest, UnsupportedParameter or ServerOverloaded."""
        if view.vocabulary is None:
            raise _unsupported(view, "it runs without a vocabulary")
        dumped = output.model_dump(mode="json", exclude_none=True)
        key = hashlib.sha256(view.spec.id.encode() + b"\0" + orjson.dumps(dumped)).digest()
        verdict = self._verdicts.get(key)
        if verdict is None:
            verdict = await self._judge_in_turn(view, view.vocabulary, dumped, key)
        self._verdicts.move_to_end(key)
        if verdict.reason is not None:
            raise InvalidRequest(
                f"params.structured_output.{verdict.place} cannot be followed: {verdict.reason}; simplify it",
                param=f"params.structured_output.{verdict.place}",
            )

    @property
    def process_id(self) -> int | None:
        """None while there is no process."""
        process = self._process
        return process.pid if process is not None and process.returncode is None else None

    async def aclose(self) -> None:
        await self._end_process()

    async def _judge_in_turn(
        self, view: ModelView, vocabulary: Vocabulary, output: dict[str, Any], key: bytes
    ) -> Verdict:
        if self._num_waiting >= MAX_WAITING:
            raise ServerOverloaded(f"{MAX_WAITING} grammars are waiting to be compiled; retry in a moment")
        self._num_waiting += 1
        try:
            async with asyncio.timeout(WAIT_SECONDS):
                await self._turn.acquire()
        except TimeoutError:
            raise ServerOverloaded(f"no turn to compile the grammar came in {WAIT_SECONDS:.0f} s; retry") from None
        finally:
            self._num_waiting -= 1
        try:
            if key not in self._verdicts:  # another may have asked the same meanwhile
                self._remember(key, await self._judge(view, vocabulary, output))
            return self._verdicts[key]
        finally:
            self._turn.release()

    def _remember(self, key: bytes, verdict: Verdict) -> None:
        self._verdicts[key] = verdict
        if len(self._verdicts) > MAX_REMEMBERED:
            self._verdicts.popitem(last=False)

    async def _judge(self, view: ModelView, vocabulary: Vocabulary, output: dict[str, Any]) -> Verdict:
        kind = next(name for name in StructuredOutput.model_fields if name in output)
        process = await self._process_that_knows(view, vocabulary)
        try:
            answer = await self._ask(process, {"model": view.spec.id, "output": output}, JUDGE_SECONDS)
            return Verdict(answer["reason"], answer["place"])
        except ProcessLost as exc:
            excess = _EXCESS_BY_RETURN_CODE.get(exc.return_code)
            if excess is None:
                raise ServerOverloaded("the grammar could not be compiled; retry in a moment") from exc
            return Verdict(f"it takes too much {excess} to compile", place=kind)

    async def _process_that_knows(self, view: ModelView, vocabulary: Vocabulary) -> asyncio.subprocess.Process:
        """The process, started if need be, with the model's tokenizer loaded."""
        if self.process_id is None:
            await self._end_process()  # somebody else may have ended it
        process = self._process or await self._start_process()
        if view.spec.id in self._known_models:
            return process
        description = {
            "model": view.spec.id,
            "tokenizer": await asyncio.to_thread(vocabulary.tokenizer.to_str),
            "vocab_size": vocabulary.size,
            "eos_token_ids": vocabulary.eos_token_ids,
        }
        try:
            answer = await self._ask(process, description, START_SECONDS)
        except ProcessLost as exc:
            raise ServerOverloaded("the grammar compiler did not start; retry in a moment") from exc
        if answer["reason"] is not None:
            raise _unsupported(view, answer["reason"])
        self._known_models.add(view.spec.id)
        return process

    async def _start_process(self) -> asyncio.subprocess.Process:
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tasks.grammar_process"),
            cwd=ROOT,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,  # what a dying compiler prints may quote the grammar
            limit=MAX_ANSWER_BYTES,
        )
        return self._process

    async def _ask(
        self, process: asyncio.subprocess.Process, question: dict[str, Any], seconds: float
    ) -> dict[str, Any]:
        """Raises ProcessLost; the process is gone then, as it is where this is cancelled."""
        assert process.stdin is not None
        assert process.stdout is not None
        is_answered = False
        try:
            async with asyncio.timeout(seconds):
                process.stdin.write(orjson.dumps(question) + b"\n")
                await process.stdin.drain()
                answer: dict[str, Any] = orjson.loads(await process.stdout.readuntil())
            is_answered = True
            return answer
        except (TimeoutError, OSError, asyncio.IncompleteReadError) as exc:
            raise ProcessLost(await self._end_process()) from exc
        finally:
            if not is_answered:
                await self._end_process()  # else a late answer would meet the next question

    async def _end_process(self) -> int:
        """How it ended; its own end, if it came first."""
        process, self._process = self._process, None
        self._known_models = set()
        if process is None:
            return 0
        if process.stdout is not None and not process.stdout.at_eof():
            with contextlib.suppress(ProcessLookupError):
                process.kill()
        return await process.wait()


def _unsupported(view: ModelView, reason: str) -> UnsupportedParameter:
    return UnsupportedParameter(
        f"{view.spec.id} cannot follow a structured output: {reason}; leave params.structured_output out",
        param="params.structured_output",
    )
