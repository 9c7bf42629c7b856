"""Compares all engines that are installed, alone and under the whole system: `python -m bench.engines [--quick]`.

SmolLM2-135M, prompts of 64 tokens that share nothing, 64 new tokens each, greedy, on all cores. Each engine is measured

    own       by its own interface, in a process of its own: its ceiling
    backend   through our Backend, in a process of its own
    server    as its own server (`vllm serve`, `llama_cpp.server`), over HTTP
    system    as an engine of the whole system, over HTTP: PostgreSQL, Redis, Celery, API, worker, streams

with 1, 4 and 16 requests at once; the 16 are of 64 that arrive at once. Own interfaces and servers run in the first
round only. Each way runs while all others are stopped. Ratios are those of one round: a quiet machine is needed, but
not one that stays the same. A way that fails is a line of the report, and the others go on.

`--only` takes names of ways with wildcards, `--at` numbers of requests at once; the ratio that matters most, in three
minutes, is `--only 'transformers/backend' 'transformers/system' --at 16`.

Engines come from the data directory (`celeriac engines install`; OpenVINO: `python -m venv DATA/engines/openvino` and
`pip install openvino-genai` there). What is not installed is left out with a line. Models are pulled into the store.
"""

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from bench.engine_child import MAX_MODEL_LEN, NUM_SLOTS
from bench.engine_models import Models
from bench.engine_processes import Child, Measured, Server, WholeSystem
from local.engine_environments import environment_folder
from settings import get_settings

NUM_PROMPT_TOKENS = NUM_NEW_TOKENS = 64
NUM_REQUESTS = {1: 2, 4: 8}  # by how many are at once
BACKENDS = ("transformers", "llama_cpp-Q4_1", "llama_cpp-Q8_0", "vllm")
ENGINES = ("openvino", *BACKENDS)
#: Ratios that are told wherever both have been measured.
PAIRS = (
    *((f"{engine}/system", f"{engine}/backend") for engine in BACKENDS),
    *((f"{engine}/backend", f"{engine}/own") for engine in BACKENDS),
    *((f"{engine}/system", f"{engine}/own") for engine in BACKENDS),
    *((f"{engine}/system", f"{engine}/server") for engine in BACKENDS),
    ("transformers/backend", "vllm/own"),
    ("llama_cpp-Q4_1/backend", "openvino/own"),
)


@dataclass(frozen=True, slots=True)
class Way:
    """An engine, measured in one way."""

    engine: str
    kind: str  # own, backend, server, system
    thing: Child | Server | WholeSystem

    @property
    def name(self) -> str:
        return f"{self.engine}/{self.kind}"


@dataclass(slots=True)
class Figures:
    """All results: tokens per second by way and level, one for each round."""

    rates: dict[str, dict[int, list[float]]] = field(default_factory=dict)
    others: dict[str, dict[str, Any]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)  # the reason, by way

    def add(self, way: Way, level: int, measured: Measured) -> None:
        self.rates.setdefault(way.name, {}).setdefault(level, []).append(measured.rate)
        line = measured.summary() | {"memory_mb": round(way.thing.memory_bytes() / 1e6)}
        self.others.setdefault(way.name, {"load_seconds": round(way.thing.load_seconds, 1)})[str(level)] = line
        shown = ", ".join(f"{name} {value}" for name, value in line.items())
        print(f"  {way.name:26} {level:2} at once: {measured.rate:6.1f} tokens/s; {shown}", flush=True)

    def fail(self, way: Way, exc: Exception) -> None:
        lines = str(exc).strip().splitlines() or ["no reason given"]
        self.failures[way.name] = f"{type(exc).__name__}: {lines[-1][:300]}"
        print(f"  {way.name:26} FAILED, {self.failures[way.name]}", flush=True)

    def ratios(self) -> dict[str, list[float]]:
        """By round."""
        found = {}
        for over, under in PAIRS:
            for level, rates in self.rates.get(over, {}).items():
                others = self.rates.get(under, {}).get(level, [])
                if pairs := [round(one / other, 3) for one, other in zip(rates, others, strict=False)]:
                    found[f"{over} over {under}, {level} at once"] = pairs
        return found


def make_prompts(tokenizer: Tokenizer, count: int, seed: int) -> list[list[int]]:
    """Of whole words, so that servers that only take text see the same tokens."""
    words = [token for text, token in tokenizer.get_vocab().items() if text.startswith("Ġ") and text[1:].isalpha()]
    rng = random.Random(seed)
    return [[rng.choice(sorted(words)) for _ in range(NUM_PROMPT_TOKENS)] for _ in range(count)]


def entry_of(name: str, models: Models) -> dict[str, Any]:
    """models.toml's entry of an engine that we have a back end for."""
    common: dict[str, Any] = {"id": "bench", "max_model_len": MAX_MODEL_LEN, "max_num_seqs": NUM_SLOTS}
    common["kv_cache_tokens"] = MAX_MODEL_LEN * NUM_SLOTS
    backend, _, kind = name.partition("-")
    if backend == "transformers":
        return common | {"path": str(models.safetensors()), "device": "cpu"}
    if backend == "vllm":
        return common | {"path": str(models.safetensors()), "backend": "vllm", "dtype": "float32"}
    return common | {"path": str(models.gguf(kind)), "backend": backend}


def ways(only: Sequence[str], models: Models, data_dir: Path, folder: Path) -> Iterator[Way]:
    """Those whose names match, in the order in which a round takes them: ceilings first."""
    for name in ENGINES:
        kinds = [
            kind
            for kind in ("own", "server", "backend", "system")
            if any(fnmatchcase(f"{name}/{kind}", pattern) for pattern in only)
        ]
        if not kinds:
            continue
        environment = name.partition("-")[0]
        python = str(environment_folder(data_dir, environment) / "bin" / "python")
        if environment != "transformers" and not Path(python).exists():
            print(f"without {name}: there is no {python}")
            continue
        yield from (way for way in ways_of(name, python, models, folder) if way.kind in kinds)


def ways_of(name: str, python: str, models: Models, folder: Path) -> Iterator[Way]:
    environment, _, kind = name.partition("-")
    if environment in ("llama_cpp", "openvino"):
        file = next(models.gguf(kind or "Q4_1").glob("*.gguf"))
        yield Way(name, "own", Child(python, environment, {"file": str(file)}, folder))
        if kind == "Q4_1":
            serve = [python, "-m", "llama_cpp.server", "--model", str(file), "--n_ctx", "2048"]
            # By default, a request that arrives ends the one that runs.
            yield from server(name, [*serve, "--interrupt_requests", "false"], folder)
    if environment == "vllm":
        place = str(models.safetensors())
        yield Way(name, "own", Child(python, "vllm", {"folder": place}, folder))
        serve = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", place, "--dtype", "float32"]
        serve += ["--max-model-len", str(MAX_MODEL_LEN), "--max-num-seqs", str(NUM_SLOTS)]
        yield from server(name, serve, folder)
    if name in BACKENDS:
        entry = entry_of(name, models)
        entry |= {} if environment == "transformers" else {"python": python}
        yield Way(name, "backend", Child(entry.get("python"), "backend", entry, folder))
        yield Way(name, "system", WholeSystem(entry, folder))


def server(name: str, command: list[str], folder: Path) -> Iterator[Way]:
    """An engine's own server, if it is installed with the engine."""
    takes_text = "llama_cpp.server" in command
    asked = subprocess.run([command[0], "-c", "import llama_cpp.server.app"], capture_output=True, check=False)
    if takes_text and asked.returncode != 0:
        print(f"without {name}'s own server: {command[0]} -m pip install 'llama-cpp-python[server]'")
        return
    yield Way(name, "server", Server(command, folder, takes_text=takes_text))


def run_round(number: int, all_ways: list[Way], tokenizer: Tokenizer, levels: dict[int, int], figures: Figures) -> None:
    """`levels` has how many requests there are by how many are at once."""
    print(f"round {number + 1}", flush=True)
    for way in all_ways:
        if way.name in figures.failures or (number and way.kind in ("own", "server")):
            continue
        try:
            measure(way, number, tokenizer, levels, figures)
        except Exception as exc:  # whatever goes wrong with one engine is told, and the others are measured
            figures.fail(way, exc)
            way.thing.close()


def measure(way: Way, number: int, tokenizer: Tokenizer, levels: dict[int, int], figures: Figures) -> None:
    with way.thing.running():
        way.thing.measure(make_prompts(tokenizer, 2, 99), NUM_NEW_TOKENS // 8, 2)  # warms it up
        for level, count in levels.items():
            count = min(count, 8) if way.kind == "server" and "llama" in way.name else count  # one at a time
            prompts = make_prompts(tokenizer, count, number * 100 + level)
            figures.add(way, level, way.thing.measure(prompts, NUM_NEW_TOKENS, level))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = "own, server, backend, system"
    parser.add_argument("--only", nargs="+", default=["*"], help=f"ENGINE/KIND of {', '.join(ENGINES)} and {kinds}")
    parser.add_argument("--at", nargs="+", type=int, default=[1, 4, NUM_SLOTS], choices=[1, 4, NUM_SLOTS])
    parser.add_argument("--jobs", type=int, default=64, help=f"requests of which {NUM_SLOTS} are at once")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="one round, 32 requests")
    given = parser.parse_args()
    num_rounds, num_jobs = (1, 32) if given.quick else (given.rounds, given.jobs)
    levels = {level: NUM_REQUESTS.get(level, num_jobs) for level in given.at}
    settings = get_settings()
    models = Models(settings.store_dir, environment_folder(settings.data_dir, "llama_cpp") / "bin" / "python")
    tokenizer = Tokenizer.from_file(str(models.safetensors() / "tokenizer.json"))
    print(f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    figures = Figures()
    with (
        tempfile.TemporaryDirectory(prefix="celeriac-bench-", ignore_cleanup_errors=True) as name,
        ExitStack() as stack,
    ):
        found = list(ways(given.only, models, settings.data_dir, Path(name)))
        for way in found:
            stack.callback(way.thing.close)
        for number in range(num_rounds):
            run_round(number, found, tokenizer, levels, figures)
    for what, ratios in figures.ratios().items():
        print(f"  {what}: {statistics.median(ratios):.2f} {ratios}")
    report = {"bench": "engines", "ratios": figures.ratios(), "figures": figures.others, "failed": figures.failures}
    print(json.dumps(report))


if __name__ == "__main__":
    main()
