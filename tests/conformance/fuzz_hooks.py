"""Makes well-formed bodies mean something, so that the fuzzer gets behind the first check: the model is one that is
served, and there is one input, not three."""

from typing import Any

import schemathesis
from schemathesis import GenerationMode

MODEL = "test-model"
INPUTS = ("prompt", "messages", "prompt_token_ids")


@schemathesis.hook
def before_call(context: schemathesis.HookContext, case: Any, **kwargs: Any) -> None:
    if case.meta is None or case.meta.generation.mode is not GenerationMode.POSITIVE:
        return
    if not isinstance(case.body, dict) or "model" not in case.body:
        return
    if not any(name in case.body for name in INPUTS):
        case.body["model"] = MODEL
        return
    case.body["model"] = MODEL
    first, *others = [name for name in INPUTS if case.body.get(name) is not None] or ["prompt"]
    for name in others:
        del case.body[name]
    if case.body.get(first) is None:
        case.body[first] = "Once"
