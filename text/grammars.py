"""Structured output and tool calls as grammars for llguidance, built the same way in the API and the engine.

llguidance (https://github.com/guidance-ai/llguidance) follows a grammar over a tokenizer's vocabulary and computes
which tokens may come next. A bad grammar does not raise: its matcher enters an error state and stays there.

Tool calls have the model's own syntax, with arguments constrained by each tool's schema. A JSON answer may be allowed
instead of calls. The two differ in their first characters, even if a call is bare JSON: a call has a space after the
colon of each of its own keys, and constrained JSON has no spaces.
"""

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from llguidance.gbnf_to_lark import GbnfToLarkError, any_to_lark

from domain.json_schemas import without_annotations
from domain.structured_output import CallableTool, StructuredOutput, ToolCalls
from text.call_formats import CallShape, call_format

#: No whitespace, as a model that may write it could write it forever. Not lenient: what cannot be enforced is refused.
JSON_OPTIONS = {"whitespace_flexible": False, "coerce_one_of": False, "lenient": False}


def calls_in_lark(calls: ToolCalls, *, alternative: str | None = None) -> str:
    """The calls in llguidance's variant of Lark. `alternative` is the rule for an output without calls."""
    shape = call_format(calls.format).shape
    marker = "" if calls.marker_token_id is None else f"<[{calls.marker_token_id}]>? "
    any_tool = " | ".join(f"tool_{number}" for number in range(len(calls.tools)))
    begin, between, end = (_spelt(text or "", calls) for text in (shape.begin, shape.between, shape.end))
    others = "" if shape.between is None or calls.is_single else f"({between} call)*"
    start = "calls" if alternative is None else f"calls | {alternative}"
    rules = [rule for number, tool in enumerate(calls.tools) for rule in _rules_of(number, tool, shape, calls)]
    return "\n".join([f"start: {start}", f"calls: {marker}{begin} call {others} {end}", f"call: {any_tool}", *rules])


def _rules_of(number: int, tool: CallableTool, shape: CallShape, calls: ToolCalls) -> Iterator[str]:
    """The rules of one tool. Its schema stays separate, so that its references resolve within it."""
    before, _, after = shape.call.replace("{name}", tool.name).partition("{arguments}")
    yield f"tool_{number}: {_spelt(before, calls)} arguments_{number} {_spelt(after, calls)}"
    rule = f"arguments_{number}"
    if shape.arguments is None:
        yield f"{rule}: {_json_value(tool.arguments)}"
    else:
        yield from shape.arguments.rules(rule, tool.arguments, _json_value, lambda text: _spelt(text, calls))


def _json_value(schema: Any) -> str:
    return f"%json {json.dumps(schema | {'x-guidance': JSON_OPTIONS} if isinstance(schema, dict) else schema)}"


def _spelt(text: str, calls: ToolCalls) -> str:
    """A text as terminals: special tokens by their ids, and the rest in the same pieces as a JSON answer: the first
    character of a longer piece would already decide for a call."""
    tokens = "|".join(map(re.escape, sorted(calls.token_ids, key=len, reverse=True)))
    pieces = re.split(f"({tokens})", text) if tokens else [text]
    spelt = []
    for piece in filter(None, pieces):
        if piece in calls.token_ids:
            spelt.append(f"<[{calls.token_ids[piece]}]>")
        else:
            spelt += map(json.dumps, _JSON_PIECE.findall(piece))
    return " ".join(spelt)


_JSON_PIECE = re.compile(r'"[^"]*"|[{}\[\]]|[^"{}\[\]]+|"')

#: Beyond these a matcher enters its error state. Measured on adversarial grammars: the worst mask takes about 30 ms of
#: one core and memory stays below 150 MB, while llguidance's defaults allow 1.5 s and 300 MB. Rows are wide enough for
#: the most properties that a schema may have.
LIMITS = LLParserLimits(
    max_items_in_row=5_000,
    initial_lexer_fuel=200_000,
    step_lexer_fuel=30_000,
    step_max_items=20_000,
    max_lexer_states=20_000,
    max_grammar_size=100_000,
    verbose_errors=False,
)

#: llguidance's messages, reworded for the author of the grammar.
_PLAIN_WORDS = (
    (re.compile("NoExtensionBias"), "its rules refer to each other without ever producing a character"),
    (re.compile("circular references with sibling keys.*"), "a $ref leads directly back to itself"),
    (
        re.compile("oneOf constraints are not supported.*"),
        "the branches of a oneOf may overlap, so matching exactly one cannot be enforced; use anyOf",
    ),
    (re.compile(r"Unimplemented keys: \[(.*?)\]"), r"it has keywords that cannot be enforced: \1"),
    (re.compile(r"Failed to generate regex for (integer|float) range:.*"), r"a bound of a number is too large"),
    (re.compile(r"Value for 'multipleOf' has too many digits.*"), "a multipleOf has too many digits"),
    (re.compile(r"patternProperty regexes (.*) are not disjoint"), r"the patternProperties \1 overlap"),
    (re.compile(r"Pointer '(.*?)' does not exist"), r"a $ref points to \1, which does not exist"),
    (re.compile(r"Unsatisfiable schema: "), "no value can match it: "),
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
    """The vocabulary for llguidance. `tokenizer_json` is a serialised `tokenizers.Tokenizer`; `vocab_size` may be
    padded.

    Takes a second for 100,000 tokens. Raises ValueError if the tokens cannot be read as bytes, or if none of them is an
    end token.
    """
    tokenizer: dict[str, Any] = json.loads(tokenizer_json)
    tokenizer |= {"truncation": None, "padding": None, "decoder": _readable_decoder(tokenizer.get("decoder"))}
    num_tokens = _count_tokens(tokenizer)
    known_eos = sorted(token_id for token_id in eos_token_ids if token_id < num_tokens)
    if not known_eos:
        raise ValueError("the model has no end-of-sequence token")
    return LLTokenizer(json.dumps(tokenizer), n_vocab=max(vocab_size, num_tokens), eos_token=known_eos)


def make_matcher(tokenizer: LLTokenizer, output: StructuredOutput) -> LLMatcher:
    """A matcher for the output; check its `is_error`. Releases the GIL."""
    return LLMatcher(tokenizer, _grammar_of(output), log_level=0, limits=LIMITS)


def error_of(matcher: LLMatcher) -> str:
    """The message of a matcher in its error state, without the grammar that it quotes."""
    return in_short(matcher.get_error())


def in_short(message: str) -> str:
    """The first line in plain words, plus the line that the regex parser adds below its diagram."""
    first, *others = message.splitlines() or [""]
    details = [line.removeprefix("error: ") for line in others if line.startswith("error: ")]
    for internal, plain in _PLAIN_WORDS:
        first = internal.sub(plain, first)
    return " ".join([first[:150], *details[:1]])[:250]


def _grammar_of(output: StructuredOutput) -> str:
    """The grammar in llguidance's JSON form. Raises ValueError for an invalid schema."""
    if output.calls is None:
        return json.dumps({"grammars": [_answer_of(output)]})
    if output.kind == "calls":
        return json.dumps({"grammars": [{"lark_grammar": calls_in_lark(output.calls)}]})
    calls = {"name": "calls_or_answer", "lark_grammar": calls_in_lark(output.calls, alternative="@answer")}
    return json.dumps({"grammars": [calls, _answer_of(output) | {"name": "answer"}]})


MAX_GBNF_CHARS = 8_192


def gbnf_in_lark(grammar: str) -> str:
    """A grammar in llama.cpp's GBNF as one in Lark, whose rule `start` is `root`; one in Lark stays as it is.
    Raises ValueError."""
    if len(grammar) > MAX_GBNF_CHARS:
        raise ValueError(f"the grammar has {len(grammar)} characters; send at most {MAX_GBNF_CHARS}")
    try:
        return str(any_to_lark(grammar))
    except RecursionError:
        raise ValueError("the grammar is nested too deeply; give its parts names") from None
    except Exception as exc:  # the converter raises Exception itself for a rule that is missing
        reason = str(exc).splitlines() or [type(exc).__name__]
        what = "GBNF" if isinstance(exc, GbnfToLarkError) else "a whole grammar"
        raise ValueError(f"it is not {what}: {reason[0][:150]}; correct it") from None


def _answer_of(output: StructuredOutput) -> dict[str, Any]:
    """The grammar of an output without calls."""
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
    """The highest id plus one. Unigram models list their tokens in order, the others map them to ids."""
    vocabulary = tokenizer["model"]["vocab"]
    highest: int = max(vocabulary.values(), default=-1) if isinstance(vocabulary, dict) else len(vocabulary) - 1
    added_ids: list[int] = [token["id"] for token in tokenizer.get("added_tokens", [])]
    return 1 + max([highest, *added_ids])


def _readable_decoder(decoder: dict[str, Any] | None) -> dict[str, Any] | None:
    """The decoder with SentencePiece's spaces in the one form that llguidance understands."""
    return _PLAIN_DECODER if decoder is not None and _SPACE_MARK in json.dumps(decoder, ensure_ascii=False) else decoder
