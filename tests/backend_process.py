"""A back end in a process and an environment of its own, called as if it were here: for the contract that all keep.

The process has no engine loop, so that a test decides when each step runs. Run as a program, this file is that process;
it must not need more than the light packages.
"""

import os
import subprocess
import sys
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Self

from domain import errors
from domain.catalog import ModelSpec
from gpu_worker.engine.backends import LoadedModel, RecordStep, StepMember, import_backend
from gpu_worker.engine_process.frames import AddJob, EmbedJob, EngineStats, StepDone
from settings import ROOT


class BackendProcess:
    """A Backend by remote procedure calls, of which each has an answer: a value, or the CeleriacError it raised."""

    def __init__(self, spec: ModelSpec, *, python: str, environment: dict[str, str]) -> None:
        ours, theirs = os.pipe(), os.pipe()
        self._process = subprocess.Popen(
            [python, "-m", "tests.backend_process", str(theirs[0]), str(ours[1])],
            cwd=ROOT,
            env=os.environ | environment,
            stdin=subprocess.DEVNULL,
            pass_fds=(theirs[0], ours[1]),
        )
        os.close(theirs[0])
        os.close(ours[1])
        self._answers, self._calls = Connection(ours[0], writable=False), Connection(theirs[1], readable=False)
        self.loaded: LoadedModel = self._call("load", spec)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._calls.close()
        self._process.kill()
        self._process.wait()
        self._answers.close()

    @property
    def has_work(self) -> bool:
        return bool(self._call("has_work"))

    def add(self, command: AddJob) -> None:
        self._call("add", command)

    def embed(self, command: EmbedJob) -> None:
        self._call("embed", command)

    def abort(self, job_id: str, attempt: int, reason: str) -> None:
        self._call("abort", job_id, attempt, reason)

    def step(self, record: RecordStep) -> StepDone:
        records, done = self._call("step")
        for members in records:
            record(members)
        return done  # type: ignore[no-any-return]

    def stats(self) -> EngineStats:
        return self._call("stats")  # type: ignore[no-any-return]

    def _call(self, name: str, *arguments: object) -> Any:
        self._calls.send((name, arguments))
        refused, value = self._answers.recv()  # EOFError if the process has ended: its stderr tells why
        if refused is not None:
            raise getattr(errors, refused)(value)
        return value


class Server:
    def __init__(self) -> None:
        self._backend: Any = None

    def answer(self, name: str, arguments: tuple[Any, ...]) -> object:
        match name:
            case "load":
                (spec,) = arguments
                self._backend = import_backend(spec)(spec)
                return self._backend.loaded
            case "has_work":
                return self._backend.has_work
            case "step":
                records: list[list[StepMember]] = []
                done = self._backend.step(lambda members: records.append(list(members)))
                return records, done
            case _:
                return getattr(self._backend, name)(*arguments)


def main() -> None:
    calls, answers = Connection(int(sys.argv[1]), writable=False), Connection(int(sys.argv[2]), readable=False)
    server = Server()
    while True:
        try:
            name, arguments = calls.recv()
        except EOFError:
            return
        try:
            answers.send((None, server.answer(name, arguments)))
        except errors.CeleriacError as exc:
            answers.send((type(exc).__name__, exc.message))


if __name__ == "__main__":
    main()
