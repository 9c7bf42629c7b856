"""Structured output and tool calls as grammars of llguidance.

Tool calls as a grammar: in the words in which their model calls, with arguments held to each tool's schema.

Beside calls an answer in JSON may be allowed. The two are told apart by their first characters, also where a call is
bare JSON: the calls' own keys are followed by a colon and a blank, and JSON that a grammar leads has no blanks.

Structured output as llguidance takes it: read in one way by the API, which judges it, and the engine, which obeys.

llguidance (https://github.com/guidance-ai/llguidance) walks a grammar and a tokenizer's vocabulary together and says
which tokens may come next. It raises nothing for a bad grammar: a matcher is then in error, and stays so.
"""

import json
import re
from collections.abc import Iterable
from typing import Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from domain.json_schemas import without_annotations
from domain.structured_output import CallableTool, StructuredOutput, ToolCalls, ToolFormat

#: Without whitespace: a model that may write some can write it for ever. What cannot be kept is refused (`lenient`).
JSON_OPTIONS = {"whitespace_flexible": False, "coerce_one_of": False, "lenient": False}

#: One call, and any number of them.
_SHAPES = {
    ToolFormat.HERMES: (
        r'"<tool_call>\n" call "\n</tool_call>"',
        r'"<tool_call>\n" call "\n</tool_call>" ("\n<tool_call>\n" call "\n</tool_call>")*',
    ),
    ToolFormat.MISTRAL: ('"[" call "]"', '"[" call (", " call)* "]"'),
    ToolFormat.LLAMA3: ("call", "call"),
}

_ARGUMENTS_KEYS = {ToolFormat.HERMES: "arguments", ToolFormat.MISTRAL: "arguments", ToolFormat.LLAMA3: "parameters"}


def calls_in_lark(calls: ToolCalls, *, alternative: str | None = None) -> str:
    """llguidance's variant of Lark. `alternative` is the rule of an output that is no calls."""
    shape = _SHAPES[calls.format][0 if calls.is_single else 1]
    marker = "" if calls.marker_token_id is None else f"<[{calls.marker_token_id}]>? "
    any_tool = " | ".join(f"tool_{number}" for number in range(len(calls.tools)))
    key = _ARGUMENTS_KEYS[calls.format]
    rules = [rule for number, tool in enumerate(calls.tools) for rule in _rules_of(number, tool, key)]
    start = "calls" if alternative is None else f"calls | {alternative}"
    return "\n".join([f"start: {start}", f"calls: {marker}{shape}", f"call: {any_tool}", *rules])


def _rules_of(number: int, tool: CallableTool, key: str) -> tuple[str, str]:
    """The schema stands by itself, so that what it refers to is found in it. The pieces of the head are those in which
    a JSON answer is read: of a longer one, its first character would already decide for a call."""
    head = ("{", '"name"', ": ", f'"{tool.name}"', ", ", f'"{key}"', ": ")
    schema = tool.arguments | {"x-guidance": JSON_OPTIONS}
    return (
        f'tool_{number}: {" ".join(map(json.dumps, head))} arguments_{number} "}}"',
        f"arguments_{number}: %json {json.dumps(schema)}",
    )


#: Beyond these a matcher is in error. Measured on adversarial grammars: the worst mask takes some 30 ms of one core and
#: the memory stays below 150 MB, where llguidance's own limits allow 1.5 s and 300 MB. Rows are wide enough for as many
#: properties as a schema may have.
LIMITS = LLParserLimits(
    max_items_in_row=5_000,
    initial_lexer_fuel=200_000,
    step_lexer_fuel=30_000,
    step_max_items=20_000,
    max_lexer_states=20_000,
    max_grammar_size=100_000,
    verbose_errors=False,
)

#: What llguidance says in words of its own, in those of whoever wrote the grammar.
_PLAIN_WORDS = (
    (re.compile("NoExtensionBias"), "its rules refer to each other without ever coming to a character"),
    (re.compile("circular references with sibling keys.*"), "a $ref leads back to itself without anything between"),
    (
        re.compile("oneOf constraints are not supported.*"),
        "the branches of a oneOf may overlap, so that it cannot be told that exactly one is met; use anyOf",
    ),
    (re.compile(r"Unimplemented keys: \[(.*?)\]"), r"it has keywords that cannot be enforced: \1"),
    (re.compile(r"Failed to generate regex for (integer|float) range:.*"), r"a bound of a number is too large"),
    (re.compile(r"Value for 'multipleOf' has too many digits.*"), "a multipleOf has too many digits"),
    (re.compile(r"patternProperty regexes (.*) are not disjoint"), r"the patternProperties \1 overlap"),
    (re.compile(r"Pointer '(.*?)' does not exist"), r"a $ref leads to \1, and there is nothing"),
    (re.compile(r"Unsatisfiable schema: "), "nothing can match it: "),
    (re.compile(r"^(.* )?at \d+\(\d+\): |failed to compile JSON schema: "), ""),
    (re.compile(r"anyOf is empty"), "no branch of an anyOf or enum is possible"),
)

_SPACE_MARK = "\u2581"

_PLAIN_DECODER = {
    "type": "Sequence",
    "decoders": [
        {"type": "Replace", "pattern": {"String": _SPACE_MARK}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ],
}


def make_grammar_tokenizer(tokenizer_json: str, vocab_size: int, eos_token_ids: Iterable[int]) -> LLTokenizer:
    """The vocabulary as bytes. `tokenizer_json` is a `tokenizers.Tokenizer` as text; `vocab_size` may be padded.

    Takes a second for 100,000 tokens. Raises ValueError where the tokens cannot be read as bytes, or none ends a text.
    """
    tokenizer: dict[str, Any] = json.loads(tokenizer_json)
    tokenizer |= {"truncation": None, "padding": None, "decoder": _readable_decoder(tokenizer.get("decoder"))}
    num_tokens = _count_tokens(tokenizer)
    known_eos = sorted(token_id for token_id in eos_token_ids if token_id < num_tokens)
    if not known_eos:
        raise ValueError("the model has no end-of-sequence token")
    return LLTokenizer(json.dumps(tokenizer), n_vocab=max(vocab_size, num_tokens), eos_token=known_eos)


def make_matcher(tokenizer: LLTokenizer, output: StructuredOutput) -> LLMatcher:
    """In error where the grammar cannot be followed: ask `is_error`. Lets go of the GIL."""
    return LLMatcher(tokenizer, _grammar_of(output), log_level=0, limits=LIMITS)


def error_of(matcher: LLMatcher) -> str:
    """What a matcher in error says, without the grammar around it."""
    return in_short(matcher.get_error())


def in_short(message: str) -> str:
    """The first line, and the one that a parser of regular expressions adds below its drawing of the place."""
    first, *others = message.splitlines() or [""]
    details = [line.removeprefix("error: ") for line in others if line.startswith("error: ")]
    for internal, plain in _PLAIN_WORDS:
        first = internal.sub(plain, first)
    return " ".join([first[:150], *details[:1]])[:250]


def _grammar_of(output: StructuredOutput) -> str:
    """llguidance's JSON form. Raises ValueError for a schema that is none."""
    if output.calls is None:
        return json.dumps({"grammars": [_answer_of(output)]})
    if output.kind == "calls":
        return json.dumps({"grammars": [{"lark_grammar": calls_in_lark(output.calls)}]})
    calls = {"name": "calls_or_answer", "lark_grammar": calls_in_lark(output.calls, alternative="@answer")}
    return json.dumps({"grammars": [calls, _answer_of(output) | {"name": "answer"}]})


def _answer_of(output: StructuredOutput) -> dict[str, Any]:
    """Of an output that is no calls."""
    if output.json_schema is not None:
        return {"json_schema": without_annotations(output.json_schema) | {"x-guidance": JSON_OPTIONS}}
    if output.json_object is not None:
        return {"json_schema": {"type": "object", "x-guidance": JSON_OPTIONS}}
    if output.regex is not None:
        [grammar] = json.loads(LLMatcher.grammar_from_regex(output.regex))["grammars"]
        return {"lark_grammar": grammar["lark_grammar"]}
    if output.choices is not None:
        return {"lark_grammar": "start: " + " | ".join(map(json.dumps, output.choices))}
    assert output.lark is not None
    return {"lark_grammar": output.lark}


def _count_tokens(tokenizer: dict[str, Any]) -> int:
    """The highest id and one. Unigram models list their tokens in order, the others map them to ids."""
    vocabulary = tokenizer["model"]["vocab"]
    highest: int = max(vocabulary.values(), default=-1) if isinstance(vocabulary, dict) else len(vocabulary) - 1
    added_ids: list[int] = [token["id"] for token in tokenizer.get("added_tokens", [])]
    return 1 + max([highest, *added_ids])


def _readable_decoder(decoder: dict[str, Any] | None) -> dict[str, Any] | None:
    """SentencePiece's way of writing spaces, in the one form that llguidance reads."""
    return _PLAIN_DECODER if decoder is not None and _SPACE_MARK in json.dumps(decoder, ensure_ascii=False) else decoder
