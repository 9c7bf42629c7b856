"""Makes well-formed bodies mean something, so that the fuzzer gets behind the first check: the model is one that is
served, there is one input, not three, and what a batch or a response names exists."""

import json
import os
from typing import Any

import schemathesis
from schemathesis import GenerationMode
from schemathesis.generation.meta import TestPhase

MODEL = "test-model"
LENGTHS = ("max_tokens", "min_tokens", "max_completion_tokens", "max_output_tokens")
MAX_LENGTH = 16  # tokens; the model holds 64, the prompt with them
TIMEOUTS = ("start_timeout", "run_timeout")
MIN_SECONDS = 1.0  # there is no maintenance here, which would end a job that nobody has claimed in time
IDS: dict[str, str] = json.loads(os.environ["FUZZ_IDS"])  # of what there is, by the name of its path parameter
INPUTS_BY_PATH = {
    "/v1/jobs": ("prompt", "messages", "prompt_token_ids"),
    "/generate": ("prompt", "prompts", "inputs"),
    "/generate_stream": ("prompt", "inputs"),
}


@schemathesis.hook
def before_call(context: schemathesis.HookContext, case: Any, **kwargs: Any) -> None:
    if case.meta is None:
        return
    if isinstance(case.body, dict):
        give_time(case.body)
    if case.meta.generation.mode is not GenerationMode.POSITIVE:
        case.body = without_nulls(case.body)
        return
    # In a sequence it is to be what the answer before has named.
    is_alone = case.meta.phase.name is not TestPhase.STATEFUL
    if is_alone and case.method == "GET" and case.path_parameters:
        case.path_parameters |= {name: IDS[name] for name in case.path_parameters.keys() & IDS.keys()}
    if isinstance(case.body, dict):
        make_sense(case.body, INPUTS_BY_PATH.get(case.operation.path, ()))


def without_nulls(part: Any) -> Any:
    """A null in the place of something else is no mistake here: it says nothing. This is one everywhere."""
    if isinstance(part, dict):
        return {name: without_nulls(inner) for name, inner in part.items()}
    if isinstance(part, list):
        return [without_nulls(inner) for inner in part]
    return [{"no": "null"}] if part is None else part


def give_time(body: dict[str, Any]) -> None:
    for name in TIMEOUTS:
        seconds = body.get(name)
        if isinstance(seconds, int | float) and not isinstance(seconds, bool) and 0 < seconds < MIN_SECONDS:
            body[name] = MIN_SECONDS


def make_sense(body: dict[str, Any], inputs: tuple[str, ...]) -> None:
    if "model" in body:
        body["model"] = MODEL
    if "input_file_id" in body:
        body["input_file_id"] = IDS["file_id"]
    body.pop("previous_response_id", None)
    body.pop("conversation", None)
    for name in LENGTHS:
        if isinstance(body.get(name), int) and body[name] > MAX_LENGTH:
            del body[name]
    keep_one_input(body, inputs)


def keep_one_input(body: dict[str, Any], names: tuple[str, ...]) -> None:
    """Of `names`, if there are any: the first that is given."""
    if not names:
        return
    first, *others = [name for name in names if body.get(name) is not None] or ["prompt"]
    for name in others:
        del body[name]
    if body.get(first) is None:
        body[first] = "Once"
