"""The gate for structured output: each grammar is compiled once before its job is accepted, in a process that may die.

A grammar of a few bytes can ask for hours or gigabytes. So it is compiled where that does no harm: in a child process
with little time and memory. Verdicts are remembered, for the model's revision that they were made for.
"""

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import Iterable
from uuid import UUID

import orjson

from domain.errors import CeleriacError, InvalidRequest, ServerOverloaded
from domain.structured_output import StructuredOutput
from tasks.grammar_compiler import GrammarCompiler, Verdict, unsupported
from tasks.models import ModelView

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
