"""What the API has to know of a model, without torch: its tokenizer, chat template, defaults, length and revision."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from tokenizers import Tokenizer

from domain.catalog import Catalog, ModelSpec
from domain.errors import InvalidRequest, UnsupportedParameter
from domain.requests import ChatMessage, GenerationRequest
from domain.tools import ToolDefinition
from tasks.chat_templates import ChatTemplate, plain_message, plain_tool
from tasks.encoders import ByteEncoder, Encoder, TokenizerEncoder, load_tokenizer, special_tokens_of
from tasks.model_files import model_folder, model_revision, read_json_file
from tasks.output_formats import OutputFormat, output_format_of
from tasks.token_table import TokenPiece

FAKE_EMBEDDING_WIDTH = 8

FAKE_CHAT_TEMPLATE = (
    "{% for tool in tools or [] %}tool: {{ tool | tojson }}, called by <tool_call>\n{% endfor %}"
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}"
    "{% for call in message['tool_calls'] or [] %}<tool_call>{{ call['function'] | tojson }}</tool_call>{% endfor %}"
    "{{ '\n' }}{% endfor %}assistant: "
)


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """What applies where a request says nothing: the model's generation_config.json, else the neutral values."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_new_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What following a grammar takes to know of a model's tokens. `size` counts those that pad the model's output."""

    tokenizer: Tokenizer
    size: int
    eos_token_ids: tuple[int, ...]


class ModelView:
    """One model as the API sees it. Thread-safe."""

    def __init__(
        self,
        spec: ModelSpec,
        *,
        revision: str,
        encoder: Encoder,
        chat_template: ChatTemplate | None,
        defaults: GenerationDefaults,
        vocab_size: int,
        vocabulary: Vocabulary | None = None,
        embedding_width: int = 0,
    ) -> None:
        """`vocabulary` is None where no grammar can be followed."""
        self.spec = spec
        self.revision = revision
        self.defaults = defaults
        self.vocab_size = vocab_size
        self.vocabulary = vocabulary
        self.output_format = _output_format(chat_template)
        self.embedding_width = embedding_width  # numbers in a vector, where the model makes any
        self._encoder = encoder
        self._chat_template = chat_template

    @property
    def max_model_len(self) -> int:
        return self.spec.max_model_len

    def render(self, messages: Sequence[ChatMessage], tools: Sequence[ToolDefinition] = ()) -> str:
        """The prompt text of `messages`, with the installation's system prompt first if they bring none."""
        if self._chat_template is None:
            raise InvalidRequest(f"{self.spec.id} has no chat template; send prompt instead", param="messages")
        if tools and not self._chat_template.shows_tools:
            raise UnsupportedParameter(f"the chat template of {self.spec.id} has no tools; remove them", param="tools")
        plain = [plain_message(message) for message in messages]
        if self.spec.system_prompt is not None and all(message["role"] != "system" for message in plain):
            plain.insert(0, {"role": "system", "content": self.spec.system_prompt})
        return self._chat_template.render(plain, [plain_tool(tool) for tool in tools])

    def encode(self, request: GenerationRequest) -> list[int]:
        """The token ids the engine starts from. A chat template writes its special tokens itself."""
        if request.messages is not None:
            return self._encoder.encode(self.render(request.messages, request.tools), add_special_tokens=False)
        if request.prompt_token_ids is not None:
            return self._checked(request.prompt_token_ids, "prompt_token_ids")
        assert request.prompt is not None
        return self._encoder.encode(request.prompt, add_special_tokens=True)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of a prompt that came as ids, special tokens included."""
        return self._encoder.decode(token_ids)

    def pieces(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> list[TokenPiece]:
        """The tokens of a prompt one by one."""
        return self._encoder.pieces(token_ids, skip_special_tokens=skip_special_tokens)

    def encode_input(self, value: str | Sequence[int], place: int) -> list[int]:
        """One of the inputs of an embedding request, with the special tokens that the model wants around it."""
        if isinstance(value, str):
            return self._encoder.encode(value, add_special_tokens=True)
        return self._checked(value, f"inputs.{place}")

    def _checked(self, token_ids: Sequence[int], param: str) -> list[int]:
        highest = max(token_ids)
        if highest >= self.vocab_size:
            raise InvalidRequest(
                f"{param} names token {highest} but {self.spec.id} has ids 0 to {self.vocab_size - 1}; "
                "send ids of this model's tokenizer",
                param=param,
            )
        return list(token_ids)


def _output_format(template: ChatTemplate | None) -> OutputFormat:
    if template is None:
        return OutputFormat()
    try:
        prompt = template.render([{"role": "user", "content": "Hello"}])
    except InvalidRequest:
        prompt = ""  # it wants other messages, and says so to those who send them
    return output_format_of(template.source, prompt)


class ModelViews:
    """The views of a catalog's models, all loaded before the first request."""

    def __init__(self, catalog: Catalog) -> None:
        """Blocking: reads (or downloads) tokenizers. Raises ValueError that names the model at fault."""
        self.catalog = catalog
        self._view_by_id = {spec.id: load_model_view(spec) for spec in catalog}

    def get(self, model_id: str) -> ModelView:
        """Raises ModelNotFound."""
        return self._view_by_id[self.catalog.get(model_id).id]


def load_model_view(spec: ModelSpec) -> ModelView:
    """Blocking. Raises ValueError if the model's files are missing or make no sense."""
    if spec.backend == "fake" and not Path(spec.path).is_dir():
        return _fake_view(spec)
    folder = model_folder(spec)
    config = read_json_file(folder / "config.json")
    tokenizer_config = read_json_file(folder / "tokenizer_config.json")
    special_tokens = special_tokens_of(read_json_file(folder / "special_tokens_map.json") | tokenizer_config)
    generation_config = read_json_file(folder / "generation_config.json")
    tokenizer = load_tokenizer(spec, folder, tokenizer_config, special_tokens)
    encoder = TokenizerEncoder(tokenizer)
    vocab_size = int(config.get("vocab_size") or encoder.vocab_size)
    vocabulary = Vocabulary(tokenizer, vocab_size, _eos_token_ids(generation_config, config))
    return ModelView(
        spec,
        revision=model_revision(spec),
        encoder=encoder,
        chat_template=_load_chat_template(spec, folder, tokenizer_config, special_tokens),
        defaults=_generation_defaults(generation_config),
        vocab_size=vocab_size,
        vocabulary=None if spec.backend == "fake" else vocabulary,
        embedding_width=_embedding_width(config),
    )


def _embedding_width(config: Mapping[str, Any]) -> int:
    """Of the hidden states, by the names that families have for it."""
    config = config.get("text_config") or config
    return int(next((config[name] for name in ("hidden_size", "n_embd", "d_model", "dim") if name in config), 0))


def _load_chat_template(
    spec: ModelSpec, folder: Path, config: Mapping[str, Any], special_tokens: Mapping[str, str]
) -> ChatTemplate | None:
    file = folder / "chat_template.jinja"
    source = file.read_text() if file.is_file() else config.get("chat_template")
    if isinstance(source, list):
        source = {template["name"]: template["template"] for template in source}.get("default")
    if source is None:
        return None
    try:
        return ChatTemplate(source, special_tokens)
    except TemplateError as exc:
        raise ValueError(f"model {spec.id}: its chat template does not compile: {exc}") from exc


def _eos_token_ids(*configs: Mapping[str, Any]) -> tuple[int, ...]:
    values = [config.get("eos_token_id") for config in configs]
    lists = [value if isinstance(value, list) else [value] for value in values if value is not None]
    return tuple(sorted({token_id for ids in lists for token_id in ids}))


def _generation_defaults(config: Mapping[str, Any]) -> GenerationDefaults:
    """`do_sample: false` only counts where it is written down: it is also the value of an absent one."""
    neutral = GenerationDefaults(temperature=0.0 if config.get("do_sample") is False else 1.0)
    names = [field.name for field in fields(GenerationDefaults) if config.get(field.name) is not None]
    return replace(neutral, **{name: config[name] for name in names})


def _fake_view(spec: ModelSpec) -> ModelView:
    return ModelView(
        spec,
        revision=model_revision(spec),
        encoder=ByteEncoder(),
        chat_template=ChatTemplate(FAKE_CHAT_TEMPLATE, {}),
        defaults=GenerationDefaults(),
        vocab_size=ByteEncoder.vocab_size,
        embedding_width=FAKE_EMBEDDING_WIDTH,
    )
