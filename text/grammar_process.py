"""The grammar compiler process: checks grammars for the API, each in a fork that a too costly grammar may kill.

It reads a header and the model's tokenizer from stdin, then one JSON line per structured output. It answers each with
one JSON line on stdout: why the output cannot be enforced (or null) and the field at fault, or the return code with
which the fork died. What it writes to stderr never quotes a grammar. The process ends when its stdin is closed.
"""

import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import orjson
from llguidance import LLMatcher, LLTokenizer

from domain.structured_output import StructuredOutput, ToolCalls
from local.lifetime import end_with_parent
from text.grammars import error_of, in_short, make_grammar_tokenizer, make_matcher

CPU_SECONDS = 0.5  # per grammar; the engine compiles it again while its whole batch waits
JUDGE_SECONDS = 10.0  # wall-clock time, on a busy machine
LOAD_CPU_SECONDS = 60.0  # per tokenizer; one with 262,000 tokens takes seven
LOAD_SECONDS = 600.0  # wall-clock time
MAX_MASK_SECONDS = 0.1
MEMORY_BYTES = 256 * 2**20  # per grammar, on top of the tokenizer
NUM_STEPS = 32  # how many tokens to follow the grammar for; an error or stall there would make a job fail


def judge(tokenizer: LLTokenizer, output: StructuredOutput) -> dict[str, str | None]:
    """`reason` is why the grammar cannot be enforced, or None; `place` is the field at fault."""
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
    """Follow the grammar along one deterministic path."""
    slowest = 0.0
    for number in range(NUM_STEPS):
        started = time.process_time()
        mask = int.from_bytes(matcher.compute_bitmask(), "little")
        slowest = max(slowest, time.process_time() - started)
        if matcher.is_error():
            return error_of(matcher)
        if slowest > MAX_MASK_SECONDS:
            return f"choosing one token takes {slowest:.1f} s"
        if matcher.is_stopped() or not mask:
            return None if matcher.is_accepting() else "no output matches it"
        matcher.consume_token(_nth_set_bit(mask, number))
    return None


def _nth_set_bit(mask: int, number: int) -> int:
    """The position of a set bit, found by bisection: for a large vocabulary, a scan of all bits would take longer than
    the grammar itself."""
    wanted = number * 7919 % mask.bit_count()
    first, num_bits = 0, mask.bit_length()
    while num_bits > 1:
        num_low = num_bits // 2
        low = mask & ((1 << num_low) - 1)
        num_set = low.bit_count()
        if wanted < num_set:
            mask, num_bits = low, num_low
        else:
            wanted -= num_set
            mask, first, num_bits = mask >> num_low, first + num_low, num_bits - num_low
    return first


def main() -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _limit_time(LOAD_CPU_SECONDS, LOAD_SECONDS)
    header = orjson.loads(sys.stdin.buffer.readline())
    tokenizer_json = sys.stdin.buffer.read(header["num_bytes"]).decode()
    try:
        tokenizer = make_grammar_tokenizer(tokenizer_json, header["vocab_size"], header["eos_token_ids"])
    except ValueError as exc:
        _answer({"reason": str(exc)[:200]})
        return
    del tokenizer_json
    _limit_time(0, 0)
    _answer({"reason": None})
    for line in sys.stdin.buffer:
        return_code = _judge_apart(tokenizer, line)
        if return_code != 0:
            _answer({"return_code": return_code})


def _judge_apart(tokenizer: LLTokenizer, line: bytes) -> int:
    """Judge in a fork, which shares the vocabulary and may be killed by the grammar. If it returns 0, it has
    answered."""
    our_id = os.getpid()
    process_id = os.fork()
    if process_id == 0:
        end_with_parent(our_id)
        _judge_and_exit(tokenizer, orjson.loads(line))
    _, status = os.waitpid(process_id, 0)
    return os.waitstatus_to_exitcode(status)


def _judge_and_exit(tokenizer: LLTokenizer, request: dict[str, Any]) -> NoReturn:
    """Runs in the fork, which dies if it exceeds its limits: of SIGPROF for time, of SIGABRT for memory."""
    errors = os.dup(2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what a dying compiler prints may quote the grammar
    try:
        _limit_memory(MEMORY_BYTES)
        _limit_time(CPU_SECONDS, JUDGE_SECONDS)
        output = StructuredOutput.model_validate(request)
        answer = judge(tokenizer, output)
        _limit_time(0, 0)
        _answer(answer)
    except MemoryError:
        os.abort()
    except BaseException as exc:  # a panic in a Rust library is not an Exception
        _limit_time(0, 0)
        place = traceback.extract_tb(exc.__traceback__)[-1]
        os.write(errors, f"{type(exc).__name__} in line {place.lineno} of {place.filename}\n".encode())
        _answer({"reason": f"the grammar compiler failed ({type(exc).__name__})", "place": next(iter(request))})
    finally:
        os._exit(0)


def _limit_time(cpu_seconds: float, seconds: float) -> None:
    """Kill this process with SIGPROF or SIGALRM once a limit is exceeded; 0 means no limit."""
    signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
    signal.setitimer(signal.ITIMER_REAL, seconds)


def _limit_memory(num_bytes: int) -> None:
    """Limit how much the address space may still grow."""
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_address_space_bytes() + num_bytes, hard))


def _address_space_bytes() -> int:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[0]) * resource.getpagesize()


def _answer(answer: Mapping[str, str | int | None]) -> None:
    sys.stdout.buffer.write(orjson.dumps(answer) + b"\n")
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
