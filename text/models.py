"""Models as the API sees them, without torch: tokenizer, chat templates, defaults, context length and revision."""

import asyncio
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from threading import Lock
from time import monotonic
from typing import Any

from tokenizers import Tokenizer

from domain.catalog import CPU_STEP, CUDA_STEP, REMOTE_STEP, RETRY_SECONDS, Catalog, ModelEntry, ModelSpec
from domain.errors import InvalidRequest, ModelUnavailable, UnsupportedParameter
from domain.requests import ChatMessage, Effort, GenerationRequest
from domain.structured_output import ToolDefinition
from local.engine_environments import GPU_DEVICES
from observability import describe_exception
from text.content_marks import ContentMarks, Rendered
from text.model_files import (
    GenerationDefaults,
    embedding_width,
    eos_token_ids,
    generation_defaults,
    model_folder,
    model_revision,
    own_length,
    read_json_file,
    refuse_unservable,
    vocabulary_size,
)
from text.outputs import OutputFormat, ReasoningFormat, output_format_of
from text.passed_on import EVERY_EFFORT, PASSED_ON, text_to_count
from text.templates import DEFAULT, NO_VALUES, ChatTemplate, TemplateChoice, load_templates, plain_message, plain_tool
from text.tokenizers import (
    ByteEncoder,
    Encoder,
    TokenizerEncoder,
    TokenPiece,
    content_marks,
    load_tokenizer,
    special_tokens_of,
)

log = logging.getLogger(__name__)

FAKE_EMBEDDING_WIDTH = 8
FAKE_LENGTH = 1_024
FOLLOW_SECONDS = 2.0  # between checks of models.toml

FAKE_CHAT_TEMPLATE = (
    "{% for tool in tools or [] %}tool: {{ tool | tojson }}, called by <tool_call>\n{% endfor %}"
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}"
    "{% for call in message['tool_calls'] or [] %}<tool_call>{{ call['function'] | tojson }}</tool_call>{% endfor %}"
    "{{ '\n' }}{% endfor %}assistant: "
)


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The vocabulary of a model, as a grammar compiler needs it. `size` includes tokens that only pad the model's
    output. `tokenizer_json` is kept because serialising a large vocabulary blocks all threads for about 0.4 s."""

    tokenizer: Tokenizer
    size: int
    eos_token_ids: tuple[int, ...]
    tokenizer_json: bytes


class ModelView:
    """One model as the API sees it. Thread-safe."""

    def __init__(
        self,
        spec: ModelSpec,
        *,
        revision: str,
        encoder: Encoder,
        chat_template: TemplateChoice | None,
        defaults: GenerationDefaults,
        vocab_size: int,
        vocabulary: Vocabulary | None = None,
        embedding_width: int = 0,
        marks: ContentMarks | None = None,
    ) -> None:
        """`vocabulary` is None if the model cannot follow grammars, `marks` if contents may contain control tokens."""
        self.spec = spec
        self.revision = revision
        self.defaults = defaults
        self.vocab_size = vocab_size
        self.vocabulary = vocabulary
        self._chat_template = chat_template or TemplateChoice(spec, {})
        self.output_format = PASSED_ON if spec.passes_messages else _output_format(self._chat_template)
        self.thinking = EVERY_EFFORT if spec.passes_messages else self._chat_template.thinking
        self.embedding_width = embedding_width  # numbers per vector, if the model can embed
        self._encoder = encoder
        self._marks = marks or ContentMarks([])

    @property
    def max_model_len(self) -> int:
        return self.spec.max_model_len

    def render(self, messages: Sequence[ChatMessage], tools: Sequence[ToolDefinition] = ()) -> str:
        """The prompt text of `messages`, starting with the installation's system prompt if they have none."""
        return self._render(messages, tools).text

    def _rendered(self, request: GenerationRequest) -> Rendered:
        assert request.messages is not None
        if not request.continue_final_message:
            return self._render(request.messages, request.tools, self._template_values(request))
        *before, begun = request.messages
        if self.output_format.reasoning_of(request) is ReasoningFormat.OPENED:
            raise UnsupportedParameter(
                f"the last message is the assistant's, but {self.spec.id} begins every answer by thinking, so none can "
                "be begun for it; end with a message of the user",
                param="messages",
            )
        return self._render(before, request.tools, self._template_values(request), beginning=begun.content)

    def template_ignores(self, name: str) -> bool:
        """Whether no chat template of the model reads this name."""
        return name not in self._chat_template.names

    def _template_values(self, request: GenerationRequest) -> Mapping[str, Any]:
        """What the chat template gets besides the conversation. Raises UnsupportedParameter."""
        effort = request.reasoning_effort
        if effort is None:
            return request.chat_template_kwargs
        if not self.thinking.takes(effort):
            raise refused_effort(effort, self, "reasoning_effort")
        return self.thinking.values_for(effort) | request.chat_template_kwargs

    def _render(
        self,
        messages: Sequence[ChatMessage],
        tools: Sequence[ToolDefinition],
        values: Mapping[str, Any] = NO_VALUES,
        *,
        beginning: str = "",
        add_generation_prompt: bool = True,
    ) -> Rendered:
        """`beginning` is that of the answer, `add_generation_prompt` whether there is to be one."""
        template = self._chat_template.choose(has_tools=bool(tools))
        plain = [plain_message(message) for message in messages]
        if self.spec.system_prompt is not None and all(message["role"] != "system" for message in plain):
            plain.insert(0, {"role": "system", "content": self.spec.system_prompt})
        marked = [
            {name: value if name == "role" else self._marks.protect(value) for name, value in message.items()}
            for message in plain
        ]
        marked_tools = self._marks.protect([plain_tool(tool) for tool in tools])
        protected = self._marks.protect(dict(values))
        text = template.render(marked, marked_tools, protected, add_generation_prompt=add_generation_prompt)
        rendered = self._marks.resolve(text + self._marks.mark(beginning))
        template.refuse_unseen(plain, marked_tools)
        return rendered

    def encode(self, request: GenerationRequest) -> list[int]:
        """The token ids of the prompt. A chat template writes its special tokens itself; text from messages and tools
        never becomes a control token, even if it looks like one. Raises InvalidRequest."""
        if self.spec.passes_messages:
            return self._encoder.encode(text_to_count(request, self.spec.id), add_special_tokens=True)
        if request.messages is not None:
            return self._in_vocabulary(self._encoder.encode_rendered(self._rendered(request)), "messages")
        if request.prompt_token_ids is not None:
            return self._checked_ids(request.prompt_token_ids, "prompt_token_ids")
        assert request.prompt is not None
        return self._in_vocabulary(self._encoder.encode(request.prompt, add_special_tokens=True), "prompt")

    def encode_conversation(self, messages: Sequence[ChatMessage], *, add_generation_prompt: bool) -> list[int]:
        """The token ids of a conversation that is not to be answered, but embedded. Raises InvalidRequest."""
        rendered = self._render(messages, (), add_generation_prompt=add_generation_prompt)
        return self._in_vocabulary(self._encoder.encode_rendered(rendered), "messages")

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of a prompt that was given as ids, special tokens included."""
        return self._encoder.decode(token_ids)

    def decode_checked(self, token_ids: Sequence[int]) -> str:
        """Like `decode`, for ids that may not be of this model. Raises InvalidRequest."""
        return self.decode(self._checked_ids(token_ids, "tokens")) if token_ids else ""

    def encode_text(self, text: str) -> list[int]:
        """The token ids of a text alone, without the special tokens that begin or end a prompt."""
        return self._in_vocabulary(self._encoder.encode(text, add_special_tokens=False), "prompt")

    def pieces(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> list[TokenPiece]:
        """The tokens of a prompt one by one."""
        return self._encoder.pieces(token_ids, skip_special_tokens=skip_special_tokens)

    def encode_input(self, value: str | Sequence[int], place: int, max_tokens: int | None = None) -> list[int]:
        """The token ids of one input of an embedding request, with the special tokens that the model expects. What is
        more than `max_tokens` is cut from the end of the text."""
        if not isinstance(value, str):
            return self._checked_ids(value, f"inputs.{place}")[:max_tokens]
        token_ids = self._encoder.encode(value, add_special_tokens=True)
        if max_tokens is not None and len(token_ids) > max_tokens:
            token_ids = self._cut(token_ids, self._encoder.encode(value, add_special_tokens=False), max_tokens)
        return self._in_vocabulary(token_ids, f"inputs.{place}")

    def encode_pair(self, query: str, value: str, place: int, max_tokens: int | None = None) -> list[int]:
        """The token ids of a query and an input that a scoring model reads together. What is more than `max_tokens` is
        cut from the end of the input."""
        token_ids = self._encoder.encode_pair(query, value)
        if max_tokens is not None and len(token_ids) > max_tokens:
            token_ids = self._cut(token_ids, self._encoder.encode(value, add_special_tokens=False), max_tokens)
        return self._in_vocabulary(token_ids, f"inputs.{place}")

    @staticmethod
    def _cut(token_ids: list[int], text_ids: list[int], max_tokens: int) -> list[int]:
        """Cut the text, and keep what is around it, as far as there is room. The text comes last but for special
        tokens."""
        num_special = len(token_ids) - len(text_ids)
        starts = range(num_special, -1, -1)
        start = next((at for at in starts if token_ids[at : at + len(text_ids)] == text_ids), 0)
        kept = text_ids[: max(0, max_tokens - num_special)]
        return [*token_ids[:start], *kept, *token_ids[start + len(text_ids) :]][:max_tokens]

    def _checked_ids(self, token_ids: Sequence[int], param: str) -> list[int]:
        highest = max(token_ids)
        if highest >= self.vocab_size:
            raise InvalidRequest(
                f"{param} has token {highest} but {self.spec.id} has ids 0 to {self.vocab_size - 1}; "
                "send ids of this model's tokenizer",
                param=param,
            )
        return list(token_ids)

    def _in_vocabulary(self, token_ids: list[int], param: str) -> list[int]:
        """Refuse text with tokens that only the tokenizer has, not the model, such as those for images."""
        highest = max(token_ids, default=0)
        if highest >= self.vocab_size:
            raise InvalidRequest(
                f"{param} contains {self._encoder.decode([highest])!r}, which is token {highest}, but {self.spec.id} "
                f"has ids 0 to {self.vocab_size - 1}; remove it",
                param=param,
            )
        return token_ids


def _output_format(templates: TemplateChoice) -> OutputFormat:
    switches = templates.thinking.switches
    off, on = (_sample(templates, dict.fromkeys(switches, is_on)) for is_on in (False, True))
    return output_format_of(templates.text, _sample(templates), (off, on) if switches else None)


def _sample(templates: TemplateChoice, values: Mapping[str, Any] = NO_VALUES) -> str:
    """Some prompt of the model."""
    try:
        return templates.choose(has_tools=False).render([{"role": "user", "content": "Hello"}], values=values)
    except InvalidRequest:
        return ""  # it requires other messages, and refuses requests with its own error


def refused_effort(effort: Effort, view: ModelView, place: str) -> UnsupportedParameter:
    remedy = "send 'low'" if view.thinking.takes("low") else "leave it out"
    return UnsupportedParameter(
        f"{place} is {effort!r}, but the chat template of {view.spec.id} has no way to do that; {remedy}", param=place
    )


@dataclass(frozen=True, slots=True)
class _Loaded:
    """A view and the entry of models.toml from which it was made."""

    entry: ModelEntry
    view: ModelView


class ModelViews:
    """The views of a catalog's models, all loaded before the first request. A model that cannot be loaded is
    unavailable and retried."""

    def __init__(self, catalog: Catalog) -> None:
        """Loads every model. Blocking: reads (or downloads) tokenizers."""
        self.catalog = catalog
        self._loaded: dict[str, _Loaded] = {}
        self._failed: dict[str, tuple[ModelEntry, float]] = {}  # the entry, and when to retry it
        self._reasons: dict[str, str] = {}
        self._refreshing = Lock()
        for model_id, reason in catalog.unavailable.items():
            log.error("a model of models.toml is invalid", extra={"model": model_id, "reason": reason})
        self._load_new()

    def get(self, model_id: str) -> ModelView:
        """The view for a new job. Raises ModelNotFound or ModelUnavailable."""
        loaded = self._loaded.get(self.catalog.get(model_id).id)
        if loaded is None:
            raise ModelUnavailable(f"model {model_id!r} is being loaded; retry in a moment", param="model")
        return loaded.view

    def loaded(self) -> list[ModelView]:
        """The views of the models that accept jobs."""
        loaded = [self._loaded.get(entry.id) for entry in self.catalog.entries]
        return [one.view for one in loaded if one is not None]

    def output_format(self, model_id: str) -> OutputFormat:
        """The format for an existing job, whose model may have been removed since."""
        loaded = self._loaded.get(model_id)
        return loaded.view.output_format if loaded is not None else OutputFormat()

    def refresh(self) -> None:
        """Apply changes of models.toml and retry unavailable models. Blocking; returns at once if another thread is
        doing so. A model whose new entry cannot be loaded stays as it was."""
        if self._refreshing.acquire(blocking=False):
            try:
                self.catalog.refresh()
                self._load_new()
            finally:
                self._refreshing.release()

    def _load_new(self) -> None:
        entries = {entry.id: entry for entry in self.catalog.entries}
        reasons = {model_id: reason for model_id, reason in self._reasons.items() if model_id in entries}
        due = [entry for entry in entries.values() if self._is_due(entry)]
        reasons |= {entry.id: "it is being loaded" for entry in due if entry.id not in self._loaded | reasons}
        self.catalog.set_failures(reasons)
        for entry in due:
            try:
                self._loaded[entry.id] = _Loaded(entry, load_model_view(entry))
                self._failed.pop(entry.id, None)
                reasons.pop(entry.id, None)
            except Exception as exc:  # a model with bad files must not affect the others
                self._failed[entry.id] = (entry, monotonic() + RETRY_SECONDS)
                reason = str(exc) if isinstance(exc, ValueError) else describe_exception(exc)
                if entry.id not in self._loaded:
                    reasons[entry.id] = reason.removeprefix(f"model {entry.id}: ")
                log.error("a model cannot be loaded", extra={"model": entry.id, "reason": reason})
        self.catalog.set_failures(reasons)
        self._reasons = reasons

    def _is_due(self, entry: ModelEntry) -> bool:
        loaded, failed = self._loaded.get(entry.id), self._failed.get(entry.id)
        if loaded is not None and loaded.entry == entry:
            return False
        return failed is None or failed[0] != entry or monotonic() >= failed[1]


async def follow_models(views: ModelViews, *, on_check: Callable[[], None] = lambda: None) -> None:
    """Keep the views in step with models.toml until cancelled. `on_check` is called after each check."""
    while True:
        try:
            await asyncio.to_thread(views.refresh)
            on_check()
        except Exception as exc:  # an outermost loop: the models stay as they were
            log.exception("could not apply models.toml, will retry: %s", describe_exception(exc))
        await asyncio.sleep(FOLLOW_SECONDS)


def load_model_view(entry: ModelEntry) -> ModelView:
    """Load one model. Blocking. Raises ValueError if its files are missing or invalid."""
    if entry.backend == "fake" and not Path(entry.path).is_dir():
        return _fake_view(entry)
    try:
        return _load_view(entry)
    except ValueError as exc:
        raise ValueError(f"model {entry.id}: {str(exc).removeprefix(f'model {entry.id}: ')}") from exc


def complete(entry: ModelEntry) -> ModelSpec:
    """The spec of an entry: what models.toml leaves out comes from the model (its length) and the device (step size).
    Blocking. Raises ValueError, which names the model and says what is wrong with its files."""
    if entry.backend == "fake" and not Path(entry.path).is_dir():
        return _spec_of(entry, entry.max_model_len or FAKE_LENGTH)
    try:
        folder = model_folder(entry)
        config = read_json_file(folder / "config.json")
        refuse_unservable(entry, folder, config)
        tokenizer_config = read_json_file(folder / "tokenizer_config.json")
        return _spec_of(entry, entry.max_model_len or own_length(entry, folder, config, tokenizer_config))
    except ValueError as exc:
        raise ValueError(f"model {entry.id}: {exc}") from exc


def files_at_fault(catalog: Catalog) -> dict[str, str]:
    """Why models in folders on this machine cannot be served, by id. Downloads nothing."""
    reasons = {}
    for entry in catalog:
        try:
            if Path(entry.path).exists() or Path(entry.path).is_absolute():
                load_model_view(entry)
        except ValueError as exc:
            reasons[entry.id] = str(exc).removeprefix(f"model {entry.id}: ")
    return reasons


def _spec_of(entry: ModelEntry, max_model_len: int) -> ModelSpec:
    step = REMOTE_STEP if entry.backend == "remote" else CUDA_STEP if uses_gpu(entry) else CPU_STEP
    given = entry.model_dump(exclude_none=True)
    return ModelSpec.model_validate(step._asdict() | given | {"max_model_len": max_model_len})


def uses_gpu(entry: ModelEntry) -> bool:
    """Whether the engine will use a GPU, as far as can be told without torch: this machine has one that is not
    hidden."""
    if entry.device != "auto" or entry.backend not in ("transformers", "vllm"):
        return entry.device == "cuda"
    is_hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1")
    return not is_hidden and any(device.exists() for device in GPU_DEVICES)


def _load_view(entry: ModelEntry) -> ModelView:
    folder = model_folder(entry)
    config = read_json_file(folder / "config.json")
    refuse_unservable(entry, folder, config)
    tokenizer_config = read_json_file(folder / "tokenizer_config.json")
    special_tokens = special_tokens_of(read_json_file(folder / "special_tokens_map.json") | tokenizer_config)
    generation_config = read_json_file(folder / "generation_config.json")
    tokenizer = load_tokenizer(folder, tokenizer_config, special_tokens)
    vocab_size = vocabulary_size(config, default=tokenizer.get_vocab_size())
    vocabulary = None
    if entry.backend != "fake" and entry.task == "generation" and not entry.passes_messages:
        # Must be taken before the encoder adds its separator token.
        eos_ids = eos_token_ids(generation_config, config)
        vocabulary = Vocabulary(tokenizer, vocab_size, eos_ids, tokenizer.to_str().encode())
    if entry.task == "scoring":
        # The engine finds the query's end by the separator, which texts therefore must not contain.
        tokenizer.encode_special_tokens = True
    templates = load_templates(entry, folder, tokenizer_config, special_tokens)
    return ModelView(
        complete(entry),
        revision=model_revision(entry),
        encoder=TokenizerEncoder(tokenizer),
        chat_template=templates,
        defaults=generation_defaults(generation_config).without(entry.lacking_params),
        vocab_size=vocab_size,
        vocabulary=vocabulary,
        embedding_width=1 if entry.task == "scoring" else embedding_width(config),
        marks=None if entry.special_tokens_in_content else content_marks(tokenizer, templates.text),
    )


@cache
def _fake_template() -> ChatTemplate:
    return ChatTemplate(FAKE_CHAT_TEMPLATE, {})


def _fake_view(entry: ModelEntry) -> ModelView:
    return ModelView(
        complete(entry),
        revision=model_revision(entry),
        encoder=ByteEncoder(),
        chat_template=TemplateChoice(entry, {DEFAULT: _fake_template()}),
        defaults=GenerationDefaults(),
        vocab_size=ByteEncoder.vocab_size,
        embedding_width=1 if entry.task == "scoring" else FAKE_EMBEDDING_WIDTH,
    )
