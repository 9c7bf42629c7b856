"""GPT-OSS: outputs in harmony's channels, whole and cut anywhere, and the markers that the detokenizer must show."""

from collections.abc import Sequence

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models

from domain.requests import SamplingParams
from gpu_worker.engine.detokenizer import TextStream, with_visible_reasoning
from text.harmony import HarmonyParser
from text.outputs import (
    CallArguments,
    CallName,
    ContentPiece,
    Piece,
    ReasoningFormat,
    ReasoningPiece,
    joined,
    output_format_of,
)

NEXT = "<|start|>assistant"
THOUGHT = "<|channel|>analysis<|message|>Hm < 2 <|x"
CALL = '<|channel|>commentary to=functions.add <|constrain|>json<|message|>{"a": 1}'
FINAL = "<|channel|>final<|message|>It is 3."

REASONING = ReasoningPiece("Hm < 2 <|x")
ADD: list[Piece] = [CallName(0, "add"), CallArguments(0, '{"a": 1}')]

CASES: list[tuple[str, list[Piece]]] = [
    (THOUGHT + "<|end|>" + NEXT + FINAL + "<|return|>", [REASONING, ContentPiece("It is 3.")]),
    (THOUGHT + NEXT + FINAL, [REASONING, ContentPiece("It is 3.")]),
    (THOUGHT + "<|end|>" + NEXT + CALL + "<|call|>", [REASONING, *ADD]),
    (THOUGHT + NEXT + " to=functions.add<|channel|>commentary json<|message|>" + '{"a": 1}', [REASONING, *ADD]),
    (
        "<|channel|>commentary<|message|>Let me add." + NEXT + CALL + NEXT + CALL.replace("add", "find"),
        [ContentPiece("Let me add."), *ADD, CallName(1, "find"), CallArguments(1, '{"a": 1}')],
    ),
    (CALL.replace("functions.add", "browser.open"), [ReasoningPiece('{"a": 1}')]),
    (THOUGHT + NEXT + "<|channel|>analysis<|message|>So.", [ReasoningPiece("Hm < 2 <|x\nSo.")]),
    (THOUGHT + NEXT + "<|channel|>fin", [REASONING]),
    ("plain <|start text", [ContentPiece("plain <|start text")]),
    (FINAL, [ContentPiece("It is 3.")]),
]


def parse(texts: Sequence[str], *, max_calls: int | None = None) -> list[Piece]:
    parser = HarmonyParser(tool_names=frozenset({"add", "find"}), max_calls=max_calls)
    return joined([piece for text in texts for piece in parser.push(text)] + parser.finish(is_cut=False))


@pytest.mark.parametrize(("text", "expected"), CASES)
def test_an_output_is_taken_apart_wherever_it_is_cut(text: str, expected: list[Piece]) -> None:
    assert parse([text]) == expected
    assert parse(list(text)) == expected
    for cut in range(1, len(text)):
        assert parse([text[:cut], text[cut:]]) == expected, text[:cut]


def test_calls_beyond_the_first_are_dropped_if_there_may_be_one() -> None:
    assert parse([CALL + NEXT + CALL.replace("add", "find")], max_calls=1) == ADD


def test_the_format_is_recognised_by_the_template() -> None:
    format = output_format_of("<|start|>assistant<|channel|>analysis<|message|> {{ tools }}", "<|start|>assistant")
    assert format.tools == "harmony"
    assert format.reasoning is ReasoningFormat.CHANNELS


def test_markers_that_are_special_tokens_appear_in_the_text_and_end_the_reasoning() -> None:
    words = ["<|channel|>", "analysis", "<|message|>", "Hm", "<|end|>", "<|start|>", "assistant", "final", "Hi"]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="Hm"))
    tokenizer.add_special_tokens([AddedToken(word, special=True) for word in words if word.startswith("<|")])
    tokenizer.decoder = decoders.Fuse()
    stream = TextStream(with_visible_reasoning(tokenizer), [], SamplingParams())
    ids = [0, 1, 2, 3, 4, 5, 6, 0, 7, 2, 8]
    has_reasoned = []
    text = ""
    for token_id in ids:
        text += stream.push(token_id, may_stop=False)[0]
        has_reasoned.append(stream.has_reasoned)
    assert text == "<|channel|>analysis<|message|>Hm<|start|>assistant<|channel|>final<|message|>Hi"
    assert has_reasoned == [False] * 8 + [True] * 3
