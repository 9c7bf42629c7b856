"""What every family of models must show; tests/families has a file for each, whose classes state how it writes.

The templates there are our own: small, with the markup and the features of Jinja that the family's own one has.
"""

import json
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import pytest
from tokenizers import AddedToken, Tokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from dialects import openai_chat
from dialects.bodies import parse_model
from dialects.openai_chat import ChatCompletionBody
from domain.catalog import ModelSpec
from domain.requests import ChatMessage, GenerationRequest, SamplingParams
from domain.structured_output import ToolCall, ToolDefinition
from gpu_worker.engine.detokenizer import TextStream, with_visible_reasoning
from settings import ROOT
from text.call_formats import FORMATS
from text.grammars import make_grammar_tokenizer, make_matcher
from text.model_files import GenerationDefaults
from text.models import ModelView, Vocabulary
from text.outputs import CallArguments, CallName, ContentPiece, OutputParser, Piece, ReasoningPiece, joined
from text.parsers import parser_of
from text.templates import DEFAULT, ChatTemplate, TemplateChoice, plain_message, plain_tool
from text.tokenizers import TokenizerEncoder

GOLDEN = Path(__file__).parent / "families" / "golden"

GO_PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {
        "to": {"type": "string", "description": "a place"},
        "at": {"type": "integer"},
        "by": {"enum": ["car", "foot"]},
        "via": {"type": "array", "items": {"type": "string"}},
    },
    "required": ["to", "at"],
}
TOOLS = (
    ToolDefinition(name="go", description="Go there.", parameters=GO_PARAMETERS),
    ToolDefinition(name="stop", description="Stop."),
)
MESSAGES = (
    ChatMessage(role="system", content="Be brief."),
    ChatMessage(role="user", content="Go to “Köln” & <b>back</b>\n"),
    ChatMessage(
        role="assistant",
        content="",
        tool_calls=(ToolCall(id="call00001", name="go", arguments='{"to": "Köln", "at": 3}'),),
    ),
    ChatMessage(role="tool", content='{"ok": true}', tool_call_id="call00001", name="go"),
    ChatMessage(role="assistant", content="Done."),
    ChatMessage(role="user", content="Thanks."),
)

#: What `GO` in a family's own words must come to, whatever blanks it writes.
GO = ("go", {"to": "Köln <3", "at": 3})


def content(text: str) -> ContentPiece:
    return ContentPiece(text)


def thought(text: str) -> ReasoningPiece:
    return ReasoningPiece(text)


def call(number: int, name: str, arguments: str) -> tuple[CallName, CallArguments]:
    return CallName(number, name), CallArguments(number, arguments)


grammar_tokenizer_of = lru_cache(maxsize=4)(make_grammar_tokenizer)


Outputs = Sequence[tuple[str, Sequence[Piece]]]


class FamilyTests:
    FORMAT: ClassVar[str | None]  # the name of its entry in FORMATS; None if it cannot call
    TEMPLATE: ClassVar[str]
    VALUES: ClassVar[dict[str, Any]] = {}  # for the template
    OUTPUTS: ClassVar[Outputs]
    NO_CALLS: ClassVar[Sequence[str]] = ()  # outputs that are text, though they begin like calls
    GO: ClassVar[str | None] = None  # a call of `go` in the one form that the grammar allows
    TWO: ClassVar[str | None] = None  # calls of `go` and `stop`; None if there can be only one
    SPECIAL: ClassVar[tuple[str, ...]] = ()  # what the tokenizer declares special, besides the format's markers

    @pytest.fixture(scope="class", params=[True, False], ids=["special tokens", "plain text"])
    @classmethod
    def view(cls, request: pytest.FixtureRequest) -> ModelView:
        """The markers are special tokens, or no tokens at all."""
        return cls._view(has_special_tokens=request.param)

    def test_its_template_tells_the_format(self, view: ModelView) -> None:
        assert view.output_format.tools == self.FORMAT

    def test_prompts_are_those_of_apply_chat_template(self) -> None:
        template = ChatTemplate(self.TEMPLATE, {"bos_token": "<s>", "eos_token": "</s>"})
        messages = [plain_message(message) for message in MESSAGES]
        tools = [plain_tool(tool) for tool in TOOLS]
        if self.FORMAT is None:
            messages = [message for message in messages if "tool_calls" not in message and message["role"] != "tool"]
            tools = []
        prompt = template.render(messages, tools, self.VALUES)
        [theirs], _ = render_jinja_template(
            [messages],
            tools=tools or None,
            chat_template=self.TEMPLATE,
            add_generation_prompt=True,
            bos_token="<s>",
            eos_token="</s>",
            **self.VALUES,
        )
        golden = GOLDEN / f"{type(self).__name__.removeprefix('Test').lower()}.txt"
        assert prompt == theirs
        assert prompt == golden.read_text(encoding="utf-8")

    def test_outputs_are_taken_apart_wherever_they_are_cut(self) -> None:
        view = self._view(has_special_tokens=False)
        for text, pieces in self.OUTPUTS:
            expected = joined([*pieces])
            assert self._parse(view, [text]) == expected
            assert self._parse(view, list(text)) == expected, text
            for cut in range(1, len(text)):
                assert self._parse(view, [text[:cut], text[cut:]]) == expected, text[:cut]

    def test_outputs_are_taken_apart_token_by_token(self, view: ModelView) -> None:
        assert view.vocabulary is not None
        tokenizer = with_visible_reasoning(view.vocabulary.tokenizer)
        for text, pieces in self.OUTPUTS:
            stream = TextStream(tokenizer, [], SamplingParams())
            token_ids = tokenizer.encode(text, add_special_tokens=False).ids
            texts = [stream.push(token_id, may_stop=False)[0] for token_id in token_ids]
            assert self._parse(view, [*texts, stream.flush()]) == joined([*pieces]), text

    def test_an_output_that_ends_anywhere_reads_the_same_whole_and_in_pieces(self) -> None:
        view = self._view(has_special_tokens=False)
        for text, _ in self.OUTPUTS:
            for end in range(len(text)):
                is_cut = end % 2 == 0
                whole = self._parse(view, [text[:end]], is_cut=is_cut)
                assert self._parse(view, list(text[:end]), is_cut=is_cut) == whole, text[:end]

    def test_what_is_no_call_is_text_without_a_character_lost(self) -> None:
        view = self._view(has_special_tokens=False)
        for text in self.NO_CALLS:
            for texts in ([text], list(text)):
                assert self._parse(view, texts) == [ContentPiece(text)]

    def test_a_forced_call_is_written_in_the_familys_own_words(self, view: ModelView) -> None:
        if self.GO is None:
            pytest.skip("it cannot call")
        named = {"type": "function", "function": {"name": "go"}}
        for choice in ("required", named):
            request = self._request(view, tool_choice=choice)
            assert self._takes(view, request, self.GO), choice
            assert not self._takes(view, request, self.GO.replace("3", "x")), choice
            assert not self._takes(view, request, "Certainly!"), choice
            assert self._called(request, view, self.GO) == [GO]
        other = self._request(view, tool_choice={"type": "function", "function": {"name": "stop"}})
        assert not self._takes(view, other, self.GO)

    def test_several_calls_are_forced_where_the_family_can_write_them(self, view: ModelView) -> None:
        if self.TWO is None:
            pytest.skip("it writes one call")
        request = self._request(view, tool_choice="required")
        assert self._takes(view, request, self.TWO)
        assert self._called(request, view, self.TWO) == [GO, ("stop", {})]
        single = self._request(view, tool_choice="required", parallel_tool_calls=False)
        assert not self._takes(view, single, self.TWO)

    def test_beside_a_schema_there_is_either_a_call_or_the_answer(self, view: ModelView) -> None:
        if self.GO is None:
            pytest.skip("it cannot call")
        schema = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}
        shape = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}
        request = self._request(view, response_format=shape)
        assert self._takes(view, request, self.GO)
        assert self._takes(view, request, '{"name":"go"}')
        assert self._called(request, view, self.GO) == [GO]
        for name in ("go", self.GO):
            answer = json.dumps({"name": name}, ensure_ascii=False, separators=(",", ":"))
            assert self._called(request, view, answer) == []

    @classmethod
    def _view(cls, *, has_special_tokens: bool) -> ModelView:
        tokenizer = Tokenizer.from_file(str(ROOT / "models" / "celeriac-mini" / "tokenizer.json"))
        markers = FORMATS[cls.FORMAT].markers if cls.FORMAT is not None else ()
        special = sorted({one for one in markers if len(one) > 4} | set(cls.SPECIAL)) if has_special_tokens else []
        tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
        spec = ModelSpec(
            id="m", path="m", backend="fake", max_model_len=4_000, max_num_seqs=8, max_num_batched_tokens=16
        )
        template = ChatTemplate(cls.TEMPLATE, {"bos_token": "<s>", "eos_token": "</s>"})
        eos_id = tokenizer.token_to_id("<|end|>") or 0
        json_text = tokenizer.to_str().encode()
        return ModelView(
            spec,
            revision="r",
            encoder=TokenizerEncoder(Tokenizer.from_str(json_text.decode())),
            chat_template=TemplateChoice(spec, {DEFAULT: template}),
            defaults=GenerationDefaults(),
            vocab_size=tokenizer.get_vocab_size(),
            vocabulary=Vocabulary(tokenizer, tokenizer.get_vocab_size(), (eos_id,), json_text),
        )

    def _request(self, view: ModelView, **more: Any) -> GenerationRequest:
        tools = [{"type": "function", "function": tool.model_dump(exclude_none=True)} for tool in TOOLS]
        body = {"model": "m", "messages": [{"role": "user", "content": "x"}], "tools": tools} | more
        return openai_chat.to_generation_request(parse_model(json.dumps(body).encode(), ChatCompletionBody), view)

    def _parser(self, view: ModelView) -> OutputParser:
        messages = (ChatMessage(role="user", content="x"),)
        values = {"chat_template_kwargs": self.VALUES} if self.VALUES else {}
        tools = TOOLS if self.FORMAT is not None else ()
        request = GenerationRequest(model="m", messages=messages, tools=tools, **values)
        return parser_of(request, view.output_format)

    def _parse(self, view: ModelView, texts: Sequence[str], *, is_cut: bool = False) -> list[Piece]:
        parser = self._parser(view)
        return joined([piece for text in texts for piece in parser.push(text)] + parser.finish(is_cut=is_cut))

    def _called(self, request: GenerationRequest, view: ModelView, text: str) -> list[tuple[str, Any]]:
        """The calls of an output that follows the request's grammar, however it is cut."""
        found = [list(self._calls_in(request, view, texts)) for texts in ([text], list(text))]
        assert found[0] == found[1]
        return found[0]

    def _calls_in(self, request: GenerationRequest, view: ModelView, texts: Sequence[str]) -> Iterator[tuple[str, Any]]:
        parser = parser_of(request, view.output_format)
        pieces = joined([piece for one in texts for piece in parser.push(one)] + parser.finish(is_cut=False))
        for name, arguments in pairwise(pieces):
            if isinstance(name, CallName):
                assert isinstance(arguments, CallArguments)
                yield name.name, json.loads(arguments.text)

    def _takes(self, view: ModelView, request: GenerationRequest, text: str) -> bool:
        """Whether the grammar lets the model write this, in the API's vocabulary and in the engine's, whose markers are
        not special."""
        vocabulary = view.vocabulary
        assert vocabulary is not None
        assert request.params.structured_output is not None
        taken = []
        for tokenizer in (vocabulary.tokenizer, with_visible_reasoning(vocabulary.tokenizer)):
            grammar_tokenizer = grammar_tokenizer_of(tokenizer.to_str(), vocabulary.size, vocabulary.eos_token_ids)
            matcher = make_matcher(grammar_tokenizer, request.params.structured_output)
            assert not matcher.is_error(), matcher.get_error()
            token_ids = tokenizer.encode(text, add_special_tokens=False).ids
            taken.append(bool(matcher.try_consume_tokens(token_ids) == len(token_ids) and matcher.is_accepting()))
        assert taken[0] == taken[1]
        return taken[0]
