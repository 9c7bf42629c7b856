"""Measures the cost of structured outputs: compilation, masks, and their share of a step of the embedded model.

    python -m bench.structured_output --rows 16 --steps 60

First comes the ceiling: the same rows without a grammar. Then comes each kind of output, for all rows at once, at a
temperature of 0.7. Times are CPU times of all the process's threads, which a busy machine changes little; "mask" is the
time to make the masks alone, per row. The last line is one JSON object.
"""

import argparse
import json
import time
from typing import Any

import torch

from domain.catalog import ModelSpec
from domain.structured_output import StructuredOutput
from gpu_worker.engine.backends.transformers import build_engine
from gpu_worker.engine.engine import Engine
from gpu_worker.engine.loading import eos_token_ids, load_model, load_tokenizer, vocab_size
from gpu_worker.engine.sampling import token_masks
from gpu_worker.engine.sequence import Grammar
from settings import ROOT
from tests.engine_driver import make_add, step
from text.grammars import make_grammar_tokenizer, make_matcher

SPEC = ModelSpec(id="mini", path=str(ROOT / "models" / "celeriac-mini"), max_model_len=1024, max_num_seqs=64)
TEXT = {"type": "string", "minLength": 300, "maxLength": 400}
RECORD: dict[str, Any] = {
    "type": "object",
    "properties": {"kind": {"enum": ["a", "b"]}, "n": {"type": "integer"}, "text": TEXT},
}
RECORD |= {"required": ["kind", "n", "text"], "additionalProperties": False}
OUTPUT_BY_NAME: dict[str, dict[str, Any]] = {
    "schema": {"json_schema": {"type": "array", "items": RECORD, "minItems": 20}},
    "schema of 512 properties": {
        "json_schema": {"type": "object", "properties": {f"p{number}": {"type": "string"} for number in range(512)}}
    },
    "regex": {"regex": "([a-z]{2,9} ){60,90}"},
    "choices": {"choices": [f"{number} and " + "so on " * 100 for number in range(1_000)]},
}


def compile_seconds(tokenizer: Any, output: StructuredOutput) -> float:
    """CPU time of the fastest of five compilations, including the first mask."""
    times = []
    for _ in range(5):
        started = time.process_time()
        make_matcher(tokenizer, output).compute_bitmask()
        times.append(time.process_time() - started)
    return min(times)


def run_steps(
    engine: Engine, num_rows: int, num_steps: int, output: dict[str, Any] | None, num_tokens: int
) -> tuple[float, float]:
    """CPU seconds of a step, and of making the masks for one row in a step, for a vocabulary of `num_tokens`."""
    params: dict[str, Any] = {"temperature": 0.7, "max_tokens": num_steps + 20, "min_tokens": num_steps + 10}
    if output is not None:
        params["structured_output"] = output
    for number in range(num_rows):
        engine.add(make_add(f"job{number}", [20 + number, 21, 22, 23], seed=number, **params))
    for _ in range(4):
        step(engine)  # computes the prompts, and builds what the first masks need
    started = time.process_time()
    for _ in range(num_steps):
        step(engine)
    step_seconds = (time.process_time() - started) / num_steps
    sequences = list(engine.scheduler.running)
    started = time.process_time()
    for _ in range(20):
        token_masks(sequences, num_tokens)
    mask_seconds = (time.process_time() - started) / 20 / max(1, len(sequences))
    for number in range(num_rows):
        engine.abort(f"job{number}", 1, "")
    return step_seconds, mask_seconds if any(isinstance(s.grammar, Grammar) for s in sequences) else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    torch.set_num_threads(1)
    model, tokenizer = load_model(SPEC, device), load_tokenizer(SPEC)
    num_tokens = vocab_size(model)
    for_grammars = make_grammar_tokenizer(tokenizer.to_str(), num_tokens, eos_token_ids(model))
    engine = build_engine(SPEC, model, tokenizer, device)
    run_steps(engine, arguments.rows, 5, None, num_tokens)  # warm
    ceiling, _ = run_steps(engine, arguments.rows, arguments.steps, None, num_tokens)
    print(f"{SPEC.id} on {device}, {arguments.rows} rows, one thread, CPU time", flush=True)
    print(f"ceiling: a step without grammars {ceiling * 1e3:.2f} ms")
    figures: dict[str, Any] = {"rows": arguments.rows, "device": str(device), "plain_step_ms": round(ceiling * 1e3, 3)}
    for name, output in OUTPUT_BY_NAME.items():
        compiled = compile_seconds(for_grammars, StructuredOutput.model_validate(output))
        seconds, mask = run_steps(engine, arguments.rows, arguments.steps, output, num_tokens)
        print(
            f"{name:>26}: compile {compiled * 1e3:6.1f} ms, step {seconds * 1e3:6.2f} ms "
            f"({seconds / ceiling:.2f} of the ceiling's), mask {mask * 1e6:5.0f} us a row"
        )
        figures[name] = {
            "compile_ms": round(compiled * 1e3, 2),
            "step_ms": round(seconds * 1e3, 3),
            "step_ratio": round(seconds / ceiling, 3),
            "mask_us_per_row": round(mask * 1e6, 1),
        }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
