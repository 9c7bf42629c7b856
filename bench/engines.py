"""Compares all engines that are installed, alone and under the whole system: `python -m bench.engines [--quick]`.

SmolLM2-135M, prompts of 64 tokens that share nothing, 64 new tokens each, greedy, on all cores. Each engine is measured

    own       by its own interface, in a process of its own: its ceiling
    backend   through our Backend, in a process of its own
    server    as its own server (`vllm serve`, `llama_cpp.server`), over HTTP
    system    as an engine of the whole system, over HTTP: PostgreSQL, Redis, Celery, API, worker, streams

with 1 and 4 requests at once in the first round, and in every round with 16 of 64 that arrive at once. Own interfaces
and servers run in the first round only. Each way runs while all others are stopped. Ratios are those of one round: a
quiet machine is needed, but not one that stays the same.

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
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from bench.engine_child import MAX_MODEL_LEN, NUM_SLOTS
from bench.engine_models import Models
from bench.engine_processes import Child, Measured, Server, WholeSystem
from local.engine_environments import environment_folder
from settings import get_settings

NUM_PROMPT_TOKENS = NUM_NEW_TOKENS = 64
SMALL_LEVELS = {1: 2, 4: 8}  # requests by how many are at once
BACKENDS = ("transformers", "llama_cpp Q4_1", "llama_cpp Q8_0", "vllm")


@dataclass(frozen=True, slots=True)
class Way:
    """An engine, measured in one way."""

    engine: str
    kind: str  # own, backend, server, system
    thing: Child | Server | WholeSystem

    @property
    def name(self) -> str:
        return f"{self.engine}, {self.kind}"


@dataclass(slots=True)
class Figures:
    """All results: tokens per second by way and level, one for each round."""

    rates: dict[str, dict[int, list[float]]] = field(default_factory=dict)
    others: dict[str, dict[str, Any]] = field(default_factory=dict)

    def add(self, way: Way, level: int, measured: Measured) -> None:
        self.rates.setdefault(way.name, {}).setdefault(level, []).append(measured.rate)
        line = measured.summary() | {"memory_mb": round(way.thing.memory_bytes() / 1e6)}
        self.others.setdefault(way.name, {"load_seconds": round(way.thing.load_seconds, 1)})[str(level)] = line
        shown = ", ".join(f"{name} {value}" for name, value in line.items())
        print(f"  {way.name:26} {level:2} at once: {measured.rate:6.1f} tokens/s; {shown}", flush=True)

    def ratio(self, over: str, under: str) -> list[float]:
        """By round, with 16 at once."""
        pairs = zip(
            self.rates.get(over, {}).get(NUM_SLOTS, []), self.rates.get(under, {}).get(NUM_SLOTS, []), strict=False
        )
        return [round(one / other, 3) for one, other in pairs]

    def ratios(self) -> dict[str, list[float]]:
        found = {}
        for engine in BACKENDS:
            found[f"{engine}: system / backend"] = self.ratio(f"{engine}, system", f"{engine}, backend")
            found[f"{engine}: backend / own"] = self.ratio(f"{engine}, backend", f"{engine}, own")
            found[f"{engine}: system / server"] = self.ratio(f"{engine}, system", f"{engine}, server")
        found["transformers / vllm own"] = self.ratio("transformers, backend", "vllm, own")
        found["llama_cpp Q4_1 / openvino"] = self.ratio("llama_cpp Q4_1, backend", "openvino, own")
        return {name: ratios for name, ratios in found.items() if ratios}


def make_prompts(tokenizer: Tokenizer, count: int, seed: int) -> list[list[int]]:
    """Of whole words, so that servers that only take text see the same tokens."""
    words = [token for text, token in tokenizer.get_vocab().items() if text.startswith("Ġ") and text[1:].isalpha()]
    rng = random.Random(seed)
    return [[rng.choice(sorted(words)) for _ in range(NUM_PROMPT_TOKENS)] for _ in range(count)]


def entries(models: Models) -> dict[str, dict[str, Any]]:
    """models.toml's entry of each engine that we have a back end for."""
    common = {"max_model_len": MAX_MODEL_LEN, "max_num_seqs": NUM_SLOTS, "kv_cache_tokens": MAX_MODEL_LEN * NUM_SLOTS}
    return {
        "transformers": common | {"path": str(models.safetensors()), "device": "cpu"},
        "llama_cpp Q4_1": common | {"path": str(models.gguf("Q4_1")), "backend": "llama_cpp"},
        "llama_cpp Q8_0": common | {"path": str(models.gguf("Q8_0")), "backend": "llama_cpp"},
        "vllm": common | {"path": str(models.safetensors()), "backend": "vllm", "dtype": "float32"},
    }


def ways(names: list[str], models: Models, data_dir: Path, folder: Path) -> Iterator[Way]:
    """In the order in which a round takes them: ceilings first."""
    for name in names:
        environment, _, kind = name.partition(" ")
        python = str(environment_folder(data_dir, environment) / "bin" / "python")
        if environment != "transformers" and not Path(python).exists():
            print(f"without {name}: there is no {python}")
            continue
        if environment in ("llama_cpp", "openvino"):
            file = next(models.gguf(kind or "Q4_1").glob("*.gguf"))
            yield Way(name, "own", Child(python, environment, {"file": str(file)}, folder))
            if kind == "Q4_1":
                yield from server(
                    name, [python, "-m", "llama_cpp.server", "--model", str(file), "--n_ctx", "2048"], folder
                )
        if environment == "vllm":
            place = str(models.safetensors())
            yield Way(name, "own", Child(python, "vllm", {"folder": place}, folder))
            serve = [python, "-m", "vllm.entrypoints.cli.main", "serve", place, "--dtype", "float32"]
            serve += ["--max-model-len", str(MAX_MODEL_LEN), "--max-num-seqs", str(NUM_SLOTS)]
            yield from server(name, serve, folder)
        if name in BACKENDS:
            entry = entries(models)[name] | {"id": "bench"}
            entry |= {} if environment == "transformers" else {"python": python}
            yield Way(name, "backend", Child(entry.get("python"), "backend", entry, folder))
            if kind != "Q8_0":
                yield Way(name, "system", WholeSystem(entry, folder))


def server(name: str, command: list[str], folder: Path) -> Iterator[Way]:
    """An engine's own server, if it is installed with the engine."""
    takes_text = "llama_cpp.server" in command
    asked = subprocess.run([command[0], "-c", "import llama_cpp.server.app"], capture_output=True, check=False)
    if takes_text and asked.returncode != 0:
        print(f"without {name}'s own server: {command[0]} -m pip install 'llama-cpp-python[server]'")
        return
    yield Way(name, "server", Server(command, folder, takes_text=takes_text))


def run_round(number: int, all_ways: list[Way], tokenizer: Tokenizer, num_jobs: int, figures: Figures) -> None:
    print(f"round {number + 1}", flush=True)
    levels = {**(SMALL_LEVELS if number == 0 else {}), NUM_SLOTS: num_jobs}
    for way in all_ways:
        if number and way.kind in ("own", "server"):
            continue
        with way.thing.running():
            way.thing.measure(make_prompts(tokenizer, 2, 99), NUM_NEW_TOKENS // 8, 2)  # warms it up
            for level, count in levels.items():
                count = min(count, 8) if way.kind == "server" and "llama" in way.name else count  # one at a time
                prompts = make_prompts(tokenizer, count, number * 100 + level)
                figures.add(way, level, way.thing.measure(prompts, NUM_NEW_TOKENS, level))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", nargs="+", default=["openvino", *BACKENDS], choices=["openvino", *BACKENDS])
    parser.add_argument("--kinds", nargs="+", default=["own", "server", "backend", "system"])
    parser.add_argument("--jobs", type=int, default=64, help="requests that arrive at once")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="one round, 32 requests")
    given = parser.parse_args()
    num_rounds, num_jobs = (1, 32) if given.quick else (given.rounds, given.jobs)
    settings = get_settings()
    models = Models(settings.store_dir, environment_folder(settings.data_dir, "llama_cpp") / "bin" / "python")
    tokenizer = Tokenizer.from_file(str(models.safetensors() / "tokenizer.json"))
    print(f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    figures = Figures()
    with (
        tempfile.TemporaryDirectory(prefix="celeriac-bench-", ignore_cleanup_errors=True) as name,
        ExitStack() as stack,
    ):
        found = [way for way in ways(given.engines, models, settings.data_dir, Path(name)) if way.kind in given.kinds]
        for way in found:
            stack.callback(way.thing.close)
        for number in range(num_rounds):
            run_round(number, found, tokenizer, num_jobs, figures)
    for what, ratios in figures.ratios().items():
        print(f"  {what}: {statistics.median(ratios):.2f} {ratios}")
    print(json.dumps({"bench": "engines", "ratios": figures.ratios(), "figures": figures.others}))


if __name__ == "__main__":
    main()
