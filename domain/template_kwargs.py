"""Values that a client hands to the chat template of a model, within limits: `chat_template_kwargs`.

The name is that of other servers. A template reads those it knows: Qwen3's reads `enable_thinking`. The names under
which a template gets the conversation itself cannot be taken.
"""

import json
from typing import Annotated, Any

from pydantic import AfterValidator, Field, StringConstraints

MAX_TEMPLATE_KWARGS = 16

MAX_TEMPLATE_KWARGS_BYTES = 4_096

MAX_TEMPLATE_KWARGS_DEPTH = 4

#: What a template gets from us or from Jinja, and the other arguments of transformers' `apply_chat_template`.
RESERVED_NAMES = frozenset(
    {
        *("messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "conversation"),
        *("chat_template", "tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict"),
        *("return_assistant_tokens_mask", "tokenizer_kwargs", "raise_exception", "strftime_now", "namespace", "dict"),
        *("range", "lipsum", "cycler", "joiner", "self", "loop", "context", "environment"),
    }
)


def _check(kwargs: dict[str, Any]) -> dict[str, Any]:
    for name in kwargs:
        if name in RESERVED_NAMES or name.endswith(("_token", "_tokens")):
            raise ValueError(f"{name} is what the template gets from the server; leave it out")
    if _depth(kwargs) > MAX_TEMPLATE_KWARGS_DEPTH:
        raise ValueError(f"its values are nested more than {MAX_TEMPLATE_KWARGS_DEPTH} levels deep; flatten them")
    num_bytes = len(json.dumps(kwargs, ensure_ascii=False).encode("utf-8", "replace"))
    if num_bytes > MAX_TEMPLATE_KWARGS_BYTES:
        raise ValueError(f"it has {num_bytes} bytes of JSON; send at most {MAX_TEMPLATE_KWARGS_BYTES}")
    return kwargs


def _depth(value: Any) -> int:
    """How many lists and objects there are inside one another. Stops at the limit."""
    level, depth = [value], 0
    while depth <= MAX_TEMPLATE_KWARGS_DEPTH:
        containers = [part for part in level if isinstance(part, dict | list)]
        if not containers:
            return depth
        depth += 1
        level = [part for whole in containers for part in (whole.values() if isinstance(whole, dict) else whole)]
    return depth


TemplateKwargs = Annotated[
    dict[Annotated[str, StringConstraints(pattern=r"^[A-Za-z][A-Za-z0-9_]{0,63}$")], Any],
    Field(max_length=MAX_TEMPLATE_KWARGS),
    AfterValidator(_check),
]
