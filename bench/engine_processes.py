"""What bench/engines.py measures, each in processes of its own: an engine alone, a server, the whole system."""

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import IO, Any

import httpx
import psutil
from tokenizers import Tokenizer

from bench.engine_child import NUM_SLOTS
from bench.stream_client import stream_completion
from local.lifetime import ending_with_us
from local.processes import free_port
from settings import ROOT
from tests.chaos.plant import Plant, Process, start_python

START_SECONDS = 300.0
ANSWER_SECONDS = 600.0


@dataclass(frozen=True, slots=True)
class Measured:
    """One level of one way. Of servers, `first` includes waiting for a place, and `gaps` are those between chunks."""

    seconds: float
    num_tokens: int
    first: list[float]
    gaps: list[float]
    cpu_seconds: float

    @property
    def rate(self) -> float:
        return self.num_tokens / self.seconds

    def summary(self) -> dict[str, float]:
        return {
            "tokens_per_second": round(self.rate, 1),
            "first_token_ms": _quantile(self.first, 0.5),
            "gap_p50_ms": _quantile(self.gaps, 0.5),
            "gap_p99_ms": _quantile(self.gaps, 0.99),
            "cpu_seconds_per_1000": round(1000 * self.cpu_seconds / self.num_tokens, 1),
        }


class Child:
    """bench/engine_child.py in an environment. It is stopped, not ended, while others are measured."""

    def __init__(self, python: str | None, kind: str, options: Mapping[str, Any], folder: Path) -> None:
        self._command = [python or sys.executable, "-m", "bench.engine_child", kind, json.dumps(options)]
        self._log = folder / "children.log"
        self._process: subprocess.Popen[str] | None = None
        self.load_seconds = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        if self._process is None:
            self._process, told = self._start()
            self.load_seconds = told["load_seconds"]
        _signal_tree(self._process.pid, signal.SIGCONT)
        try:
            yield
        finally:
            _signal_tree(self._process.pid, signal.SIGSTOP)

    def measure(self, prompts: list[list[int]], num_new_tokens: int, level: int) -> Measured:
        assert self._process is not None
        assert self._process.stdin is not None
        before = _cpu_seconds([self._process.pid])
        order = {"prompts": prompts, "num_new_tokens": num_new_tokens, "num_at_once": level}
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        told = self._hear(self._process)
        return Measured(**told, cpu_seconds=_cpu_seconds([self._process.pid]) - before)

    def memory_bytes(self) -> int:
        return _memory_bytes([self._process.pid]) if self._process else 0

    def close(self) -> None:
        if self._process is not None:
            _end_tree(self._process.pid)
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    pipe.close()
            self._process.wait()

    def _start(self) -> tuple[subprocess.Popen[str], Any]:
        with self._log.open("ab") as log:
            process = subprocess.Popen(
                ending_with_us(self._command),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                cwd=ROOT,
            )
        return process, self._hear(process)

    def _hear(self, process: "subprocess.Popen[str]") -> Any:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self._command[3]} ended: {self._log.read_text(errors='replace')[-2000:]}")
        return json.loads(line)


class Server:
    """An engine's own server. Like Child, it is stopped while others are measured."""

    def __init__(self, command: list[str], folder: Path, *, takes_text: bool) -> None:
        self._command = command
        self._log = folder / "servers.log"
        self._takes_text = takes_text
        self._process: subprocess.Popen[bytes] | None = None
        self.load_seconds = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        if self._process is None:
            self._start()
        assert self._process is not None
        _signal_tree(self._process.pid, signal.SIGCONT)
        try:
            yield
        finally:
            _signal_tree(self._process.pid, signal.SIGSTOP)

    def measure(self, prompts: list[list[int]], num_new_tokens: int, level: int) -> Measured:
        assert self._process is not None
        pids = [self._process.pid]
        tokenizer = None
        if self._takes_text:
            model = Path(self._command[self._command.index("--model") + 1])
            tokenizer = Tokenizer.from_file(str(model.with_name("tokenizer.json")))
        return _measure_http(self._url, self._model, prompts, num_new_tokens, level, pids, tokenizer)

    def memory_bytes(self) -> int:
        return _memory_bytes([self._process.pid]) if self._process else 0

    def close(self) -> None:
        if self._process is not None:
            _end_tree(self._process.pid)
            self._process.wait()

    def _start(self) -> None:
        port = free_port("127.0.0.1", 0)
        self._url = f"http://127.0.0.1:{port}"
        command = ending_with_us([*self._command, "--host", "127.0.0.1", "--port", str(port)])
        variables = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "2"}
        started = time.monotonic()
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=variables)
        while time.monotonic() < started + START_SECONDS:
            with suppress(httpx.HTTPError):
                self._model = httpx.get(f"{self._url}/v1/models", timeout=5).json()["data"][0]["id"]
                self.load_seconds = time.monotonic() - started
                return
            if self._process.poll() is not None:
                break
            time.sleep(0.5)
        raise RuntimeError(f"{self._command} did not start: {self._log.read_text(errors='replace')[-2000:]}")


class WholeSystem:
    """Every process that `celeriac up` starts but Flower, with one worker. Started anew for each round, since it cannot
    be stopped without its leases running out."""

    def __init__(self, entry: Mapping[str, Any], folder: Path) -> None:
        self._models = "[[models]]\n" + "".join(f"{name} = {json.dumps(value)}\n" for name, value in entry.items())
        self.load_seconds = 0.0
        self._plant: Plant | None = None

    @contextmanager
    def running(self) -> Iterator[None]:
        folder = Path(tempfile.mkdtemp(prefix="celeriac-bench-"))
        settings = {"models_dir": folder / "none"}
        plant = Plant(folder, models=self._models, worker_models={"bench": "bench"}, settings=settings, start=_start)
        started = time.monotonic()
        try:
            plant.start_servers()
            plant.start_parts()
            self._wait(plant, started)
            self.load_seconds = time.monotonic() - started
            self._plant = plant
            yield
        finally:
            self._plant = None
            plant.close()
            shutil.rmtree(folder, ignore_errors=True)

    def measure(self, prompts: list[list[int]], num_new_tokens: int, level: int) -> Measured:
        assert self._plant is not None
        return _measure_http(self._plant.api_urls[0], "bench", prompts, num_new_tokens, level, self._pids(), None)

    def memory_bytes(self) -> int:
        return _memory_bytes(self._pids())

    def close(self) -> None:
        """It has ended with its round."""

    def _pids(self) -> list[int]:
        assert self._plant is not None
        servers = [server.pid for server in (self._plant.postgres, self._plant.redis) if server.pid is not None]
        return [*(part.pid for part in self._plant.parts), *servers]

    def _wait(self, plant: Plant, started: float) -> None:
        while not plant._is_ready():
            if time.monotonic() > started + START_SECONDS:
                raise RuntimeError(f"the system did not start: {plant.workers[0].log()[-2000:]}")
            time.sleep(0.2)


def _start(arguments: list[str], environment: Mapping[str, str], log: IO[bytes], folder: Path) -> Process:
    """With all cores: tests give each process one."""
    variables = {name: value for name, value in environment.items() if name != "OMP_NUM_THREADS"}
    return start_python(arguments, variables, log, folder)


def _measure_http(
    url: str,
    model: str,
    prompts: Sequence[list[int]],
    num_new_tokens: int,
    level: int,
    pids: list[int],
    tokenizer: Tokenizer | None,
) -> Measured:
    """With 16 at once, all arrive at the same time; else each follows the end of another. `tokenizer` is for servers
    that only take text."""
    place = asyncio.Semaphore(level if level < NUM_SLOTS else len(prompts))
    first: list[float] = []
    gaps: list[float] = []

    async def one(prompt: list[int]) -> int:
        body: dict[str, Any] = {"model": model, "max_tokens": num_new_tokens, "temperature": 0, "stream": True}
        body |= {"prompt": prompt if tokenizer is None else tokenizer.decode(prompt)}
        if tokenizer is None:
            body |= {"ignore_eos": True, "stream_options": {"include_usage": True}}
        async with place:
            began = time.perf_counter()
            streamed = await stream_completion(url, body)
        first.append(streamed.arrivals[0] - began)
        gaps.extend(later - earlier for earlier, later in pairwise(streamed.arrivals))
        return streamed.num_tokens

    async def all_of_them() -> list[int]:
        async with asyncio.timeout(ANSWER_SECONDS):
            return await asyncio.gather(*map(one, prompts))

    before, started = _cpu_seconds(pids), time.perf_counter()
    counts = asyncio.run(all_of_them())
    seconds = time.perf_counter() - started
    return Measured(seconds, sum(counts), first, gaps, _cpu_seconds(pids) - before)


def _tree(pids: Sequence[int]) -> dict[int, psutil.Process]:
    found: dict[int, psutil.Process] = {}
    for pid in pids:
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            found |= {each.pid: each for each in (process, *process.children(recursive=True))}
    return found


def _cpu_seconds(pids: Sequence[int]) -> float:
    seconds = 0.0
    for process in _tree(pids).values():
        with suppress(psutil.NoSuchProcess):
            seconds += sum(process.cpu_times()[:2])
    return seconds


def _memory_bytes(pids: Sequence[int]) -> int:
    """Memory that processes share counts once."""
    total = 0
    for process in _tree(pids).values():
        with suppress(psutil.NoSuchProcess):
            total += process.memory_full_info().pss
    return total


def _signal_tree(pid: int, signal_number: signal.Signals) -> None:
    for process in _tree([pid]).values():
        with suppress(psutil.NoSuchProcess):
            process.send_signal(signal_number)


def _end_tree(pid: int) -> None:
    for process in _tree([pid]).values():
        with suppress(psutil.NoSuchProcess):
            process.kill()


def _quantile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values) or [0.0]
    return round(1000 * ordered[min(int(share * len(ordered)), len(ordered) - 1)], 1)
