"""Main of the process that judges grammars for the API, and may die of one that is too costly.

Requests and answers are JSON lines on stdin and stdout, one of each at a time: a model's tokenizer first, then outputs
to be judged for it. The answer is a reason against it, or null, and the field it is about. The process ends with its
stdin.
"""

import resource
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any

import orjson
from llguidance import LLMatcher, LLTokenizer

from domain.structured_output import StructuredOutput
from domain.tools import ToolCalls
from tasks.grammars import error_of, in_short, make_grammar_tokenizer, make_matcher

CPU_SECONDS = 0.5  # for one grammar: the engine compiles it once more, and its batch waits meanwhile
LOAD_CPU_SECONDS = 60.0  # for a tokenizer: one of 262,000 tokens takes seven
MAX_MASK_SECONDS = 0.1
MEMORY_BYTES = 256 * 2**20  # for one grammar, on top of the tokenizers
NUM_STEPS = 32  # of a walk through the grammar: what fails or stalls there would fail a job


def judge(tokenizer: LLTokenizer, output: StructuredOutput) -> dict[str, str | None]:
    """`reason` says why the grammar cannot be followed, None where it can; `place` is the field that is to blame."""
    reason = _reason_against(tokenizer, output)
    if reason is None or output.calls is None:
        return {"reason": reason, "place": output.kind}
    for place, part in _parts_of(output, output.calls):
        part_reason = _reason_against(tokenizer, part)
        if part_reason is not None:
            return {"reason": part_reason, "place": place}
    return {"reason": reason, "place": "calls"}


def _parts_of(output: StructuredOutput, calls: ToolCalls) -> Iterator[tuple[str, StructuredOutput]]:
    if output.kind != "calls":
        yield output.kind, output.model_copy(update={"calls": None})
    for number, tool in enumerate(calls.tools):
        yield f"calls.tools.{number}", StructuredOutput(calls=calls.model_copy(update={"tools": (tool,)}))


def _reason_against(tokenizer: LLTokenizer, output: StructuredOutput) -> str | None:
    try:
        matcher = make_matcher(tokenizer, output)
    except ValueError as exc:
        return in_short(str(exc))
    if matcher.is_error():
        return error_of(matcher)
    warnings = matcher.get_grammar_warnings()
    return in_short(warnings[0]) if warnings else _walk(matcher)


def _walk(matcher: LLMatcher) -> str | None:
    """Follow the grammar along some path, the same each time."""
    slowest = 0.0
    for number in range(NUM_STEPS):
        started = time.process_time()
        mask = int.from_bytes(matcher.compute_bitmask(), "little")
        slowest = max(slowest, time.process_time() - started)
        if matcher.is_error():
            return error_of(matcher)
        if slowest > MAX_MASK_SECONDS:
            return f"one token takes {slowest:.1f} s to choose"
        if matcher.is_stopped() or not mask:
            return None if matcher.is_accepting() else "no output matches it"
        matcher.consume_token(_nth_set_bit(mask, number))
    return None


def _nth_set_bit(mask: int, number: int) -> int:
    positions = [position for position, bit in enumerate(bin(mask)[:1:-1]) if bit == "1"]
    return positions[number * 7919 % len(positions)]


def main() -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    tokenizers: dict[str, LLTokenizer] = {}
    for line in sys.stdin.buffer:
        request = orjson.loads(line)
        if "tokenizer" in request:
            _answer(_load(tokenizers, request))
        else:
            _answer(_judge_within_limits(tokenizers[request["model"]], request["output"]))


def _load(tokenizers: dict[str, LLTokenizer], request: dict[str, Any]) -> dict[str, str | None]:
    _limit_memory(None)
    signal.setitimer(signal.ITIMER_PROF, LOAD_CPU_SECONDS)
    try:
        tokenizers[request["model"]] = make_grammar_tokenizer(
            request["tokenizer"], request["vocab_size"], request["eos_token_ids"]
        )
    except ValueError as exc:
        return {"reason": str(exc)[:200]}
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    return {"reason": None}


def _judge_within_limits(tokenizer: LLTokenizer, output: dict[str, Any]) -> dict[str, str | None]:
    """Beyond its limits the process dies: by SIGPROF for time, by an abort for memory."""
    _limit_memory(MEMORY_BYTES)
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    try:
        return judge(tokenizer, StructuredOutput.model_validate(output))
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _limit_memory(num_bytes: int | None) -> None:
    """How much the address space may still grow; None is without limit."""
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    soft = hard if num_bytes is None else _address_space_bytes() + num_bytes
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _address_space_bytes() -> int:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[0]) * resource.getpagesize()


def _answer(answer: dict[str, str | None]) -> None:
    sys.stdout.buffer.write(orjson.dumps(answer) + b"\n")
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the API, which ends this process in its turn
    main()
