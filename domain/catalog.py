"""The model catalogue: one entry per model of `models.toml` and of the store, for the API, maintenance and workers."""

import logging
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, JsonValue, StringConstraints, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from domain.errors import ModelNotFound, ModelUnavailable
from domain.jobs import Frozen
from domain.model_names import model_name, parse_model_name

log = logging.getLogger(__name__)

#: In each folder of the store: what models.toml would say of the model that lies there.
ENTRY_FILE = "models.toml"


class LlamaCppOptions(Frozen):
    """How llama.cpp runs a model; llama.h explains each. Its n_ctx is kv_cache_tokens, its n_batch
    max_num_batched_tokens."""

    n_gpu_layers: int = Field(default=999, ge=0)  # on a build for GPUs; 999 are all
    n_threads: int | None = Field(default=None, ge=1)  # default: one for each core
    n_ubatch: int = Field(default=512, ge=16)  # tokens computed at once
    repack: bool | None = None  # lay weights out for the CPU's instructions; default: unless AMX was compiled in
    cache_type: Literal["f32", "f16", "q8_0", "q4_0"] = "f16"  # of keys and values


MAX_ADAPTERS = 64

AdapterName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]

AdapterPath = Annotated[str, StringConstraints(min_length=1, max_length=4096)]

_UNSHOWN = "unshown"  # the type of an error whose value may be a secret


def _plain_url(url: str) -> str:
    """A key in an address would be shown wherever the address is."""
    parts = urlsplit(url)
    if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
        raise PydanticCustomError(
            _UNSHOWN, "it has a user, password, query or fragment; put a key in a variable that api_key_env names"
        )
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("it must be an http or https address such as http://127.0.0.1:8000/v1")
    return url.rstrip("/")


ServerUrl = Annotated[str, Field(max_length=2048), AfterValidator(_plain_url)]


class RemoteOptions(Frozen):
    """An OpenAI-compatible server that runs the model. docs/engines.md explains each option."""

    url: ServerUrl  # up to and including /v1
    model: str | None = Field(default=None, min_length=1, max_length=256)  # its name there; default: the entry's id
    mode: Literal["tokens", "text", "chat"] = "tokens"  # what is exchanged
    resume: Literal["restart", "fail"] = "restart"  # mode chat: of an interrupted answer
    structured_output: Literal["none", "response_format", "structured_outputs"] = "none"  # mode chat: what it takes
    api_key_env: str | None = Field(default=None, pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,127}$")
    verify: bool = True  # the server's certificate
    ca_file: str | None = Field(default=None, min_length=1)  # of the authority that signed it, if not a public one
    connect_seconds: float = Field(default=5.0, gt=0, le=600)
    silence_seconds: float = Field(default=300.0, gt=0, le=86_400)  # before a request counts as broken off
    metrics_url: ServerUrl | None = None  # where it tells how many requests wait there

    @property
    def output_kinds(self) -> frozenset[str]:
        """The kinds of structured output that are passed to the server in mode chat."""
        schemas = {"json_schema", "json_object"} if self.structured_output != "none" else set()
        grammars = {"regex", "choices", "lark"} if self.structured_output == "structured_outputs" else set()
        return frozenset({"calls", *schemas, *grammars})

    @model_validator(mode="after")
    def _options_of_chat(self) -> Self:
        for name in ("resume", "structured_output"):
            if self.mode != "chat" and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f'{name} is set, but mode is {self.mode!r}; it belongs to mode = "chat"')
        return self


#: Parameters without a counterpart in OpenAI's completions, and those that a continuation could not keep.
_LACKED_BY_TEXT = frozenset(
    {"best_of", "ignore_eos", "logit_bias", "logprobs", "min_p", "min_tokens", "repetition_penalty", "stop_token_ids"}
    | {"allowed_token_ids", "skip_special_tokens", "top_k"}
)
_LACKED_BY_ALL = frozenset({"bad_token_ids", "bad_words", "prompt_logprobs", "structured_output"})


Task = Literal["generation", "embedding", "scoring"]

#: Which models serve requests without a model, best first; after them the default one.
_MADE_FOR: dict[Task, tuple[Task, ...]] = {
    "generation": (),
    "embedding": ("embedding",),
    "scoring": ("scoring", "embedding"),
}

Price = Annotated[Decimal, Field(ge=0, le=1_000_000, max_digits=13, decimal_places=6, allow_inf_nan=False)]


class ModelEntry(Frozen):
    """One model as described in models.toml. `path` is a local folder (relative to models.toml) or a Hugging Face
    repository id. docs/models.md explains each key."""

    id: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]{0,127}$")
    path: str = Field(min_length=1)
    revision: str = "main"  # part of the job row: a resumed job never mixes two revisions
    backend: Literal["transformers", "llama_cpp", "vllm", "remote", "fake"] = "transformers"
    python: str | None = Field(default=None, min_length=1)  # the engine's interpreter; default: see docs/engines.md
    autostart: bool = False  # whether `celeriac up` starts a worker for it
    task: Task = "generation"  # embedding: an encoder, or a decoder made for vectors; scoring: a cross-encoder
    max_model_len: int | None = Field(default=None, ge=16, le=10_000_000)  # prompt and output; default: its own
    max_num_seqs: int | None = Field(default=None, ge=1, le=1024)  # sequences in the running batch; default: by device
    max_num_batched_tokens: int | None = Field(default=None, ge=16)  # per step, prompts included; default: by device
    kv_cache_tokens: int | None = Field(default=None, ge=256)  # size of the paged cache; default: by memory
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    quantization: Literal["none", "auto", "int8", "int4"] = "none"  # of the weights, at load, on a CPU
    device: Literal["auto", "cpu", "cuda"] = "auto"
    decode_graphs: bool = True  # on a GPU: capture the passes of decodes at load, for speed
    system_prompt: str | None = None
    chat_template: str | None = None  # the name of one, if the model has several
    special_tokens_in_content: bool = False  # whether to recognise them in clients' texts, too
    trust_remote_code: bool = False
    response_cache: bool = True  # whether CELERIAC_RESPONSE_CACHE applies to it
    adapters: dict[AdapterName, AdapterPath] = Field(default_factory=dict, max_length=MAX_ADAPTERS)  # LoRA, by name
    price_per_million_prompt_tokens: Price | None = None  # what the usage reports calculate with
    price_per_million_output_tokens: Price | None = None
    price_per_million_cached_tokens: Price | None = None  # of the prompt, found in the cache; default: as the others
    llama_cpp: LlamaCppOptions = LlamaCppOptions()
    vllm: dict[str, JsonValue] = Field(default_factory=dict, max_length=64)  # fields of vLLM's EngineArgs
    remote: RemoteOptions | None = None
    fake: dict[str, float | int | str | bool] = Field(default_factory=dict)  # options of the fake back end

    @model_validator(mode="after")
    def _remote_with_its_server(self) -> Self:
        if (self.backend == "remote") != (self.remote is not None):
            raise ValueError('backend = "remote" and a table [models.remote] with the url of a server belong together')
        return self

    @property
    def lacking_params(self) -> frozenset[str]:
        """The sampling parameters that the model's engine does not have."""
        if self.remote is None:
            return frozenset()
        if self.passes_messages:
            return (_LACKED_BY_ALL | _LACKED_BY_TEXT) - {"structured_output"}
        return _LACKED_BY_ALL if self.remote.mode == "tokens" else _LACKED_BY_ALL | _LACKED_BY_TEXT

    @property
    def passes_messages(self) -> bool:
        """Whether a server gets the messages as they are, instead of a prompt."""
        return self.remote is not None and self.remote.mode == "chat"

    @property
    def can_embed(self) -> bool:
        """Whether the model can make embeddings. Generation models can, too, if their back end exposes hidden
        states."""
        return self.backend in ("transformers", "fake") and self.task != "scoring"

    @property
    def can_score(self) -> bool:
        """Whether the model reads two texts together and says how well they match."""
        return self.backend in ("transformers", "fake") and self.task == "scoring"

    def cost_of(self, *, prompt_tokens: int, cached_tokens: int, output_tokens: int) -> Decimal | None:
        """By the prices of the entry; None if it has none. `cached_tokens` are some of `prompt_tokens`."""
        prompt, output = self.price_per_million_prompt_tokens, self.price_per_million_output_tokens
        cached = prompt if self.price_per_million_cached_tokens is None else self.price_per_million_cached_tokens
        if prompt is None and output is None and cached is None:
            return None
        priced = ((prompt, prompt_tokens - cached_tokens), (cached, cached_tokens), (output, output_tokens))
        return sum(((price or Decimal()) * count for price, count in priced), Decimal()) / 1_000_000

    @property
    def names(self) -> list[str]:
        """What requests may ask for: the model itself, and the model with each of its adapters."""
        return [model_name(self.id, adapter) for adapter in (None, *self.adapters)]

    @property
    def queue(self) -> str:
        """The Celery queue of this model."""
        return f"celeriac.{self.id}"


class StepSize(NamedTuple):
    """Default limits of one engine step, used where models.toml has none."""

    max_num_seqs: int
    max_num_batched_tokens: int


#: A few rows saturate a CPU; more would only make every running sequence wait longer for its next token.
CPU_STEP = StepSize(max_num_seqs=16, max_num_batched_tokens=512)
#: An H100 reads 16 GB of weights per step (an 8B model in bfloat16) in 5 ms, and can compute about 300 tokens in that
#: time, so 256 sequences decode in the time of one. A step with a prompt chunk costs 10 to 20 ms of kernel
#: launches whatever its size, so a prompt of 16,000 tokens takes two steps instead of thirty-two.
CUDA_STEP = StepSize(max_num_seqs=256, max_num_batched_tokens=8192)
#: A server decides itself how many of its requests it runs at once; only those that it has are there to be resumed.
REMOTE_STEP = StepSize(max_num_seqs=64, max_num_batched_tokens=512)


class ModelSpec(ModelEntry):
    """A model that can be served: its context length and step size are resolved."""

    max_model_len: int = Field(ge=16, le=10_000_000)
    max_num_seqs: int = Field(default=CPU_STEP.max_num_seqs, ge=1, le=1024)
    max_num_batched_tokens: int = Field(default=CPU_STEP.max_num_batched_tokens, ge=16)


@dataclass(frozen=True, slots=True)
class _Content:
    """The result of reading the file once."""

    default_id: str
    entry_by_id: Mapping[str, ModelEntry]
    reason_by_id: Mapping[str, str] = field(default_factory=dict)  # of invalid entries


class Catalog:
    """All models of one `models.toml`, and those that were pulled into a store. The first one is the default, unless
    another is named. An invalid entry is kept with its reason and does not affect the others. Thread-safe."""

    def __init__(self, entries: Iterable[ModelEntry], path: Path | None = None) -> None:
        """`path` is the file that `refresh` reads; None if there is none."""
        entry_by_id = {entry.id: entry for entry in entries}
        self._content = _Content(next(iter(entry_by_id), ""), entry_by_id)
        self._failures: dict[str, str] = {}
        self._path = path
        self._store: Path | None = None
        self._chosen_default: str | None = None
        self._read_as: object = None

    @classmethod
    def load(cls, path: Path, *, store: Path | None = None, default_id: str | None = None) -> "Catalog":
        """`store` is a folder with a folder for each model that was pulled. Raises ValueError or OSError if models.toml
        as a whole cannot be read or parsed."""
        catalog = cls([], path)
        catalog._store = store
        catalog._chosen_default = default_id
        catalog._read_as = _signatures(path, store)
        catalog._content = _read_all(path, store, default_id)
        return catalog

    def refresh(self) -> bool:
        """Read the file again if it has changed. An invalid edit is logged, and the models stay as they were. Returns
        whether anything is new."""
        if self._path is None:
            return False
        signature = _signatures(self._path, self._store)
        if signature == self._read_as:
            return False
        self._read_as = signature
        try:
            content = _read_all(self._path, self._store, self._chosen_default)
        except (OSError, ValueError) as exc:
            log.error(
                "models.toml has changed but cannot be read; its models stay as they were", extra={"reason": str(exc)}
            )
            return False
        self._content = _with_former_entries(content, self._content)
        log.info("models.toml has changed and was read again", extra={"models": list(self._content.entry_by_id)})
        return True

    def get(self, name: str) -> ModelEntry:
        """The entry of a model, also for the name of one of its adapters. Raises ModelNotFound, which lists the names,
        or ModelUnavailable, which says why."""
        content = self._content
        model_id = parse_model_name(name).id
        reason = self._failures.get(model_id) or content.reason_by_id.get(model_id)
        if reason is not None:
            raise ModelUnavailable(
                f"model {model_id!r} is unavailable: {reason}", param="model", retry_after_seconds=RETRY_SECONDS
            )
        entry = content.entry_by_id.get(model_id)
        if entry is None or (name != model_id and name not in entry.names):
            near = content.entry_by_id.values() if entry is None else [entry]
            known = ", ".join(sorted(known for other in near for known in other.names))
            raise ModelNotFound(f"model {name[:200]!r} is not served here; choose one of: {known}", param="model")
        return entry

    def entry_of(self, model_id: str) -> ModelEntry:
        """The entry of a model that has jobs, even if it is no longer in models.toml: they run as long as it has
        workers."""
        return self._content.entry_by_id.get(model_id) or ModelEntry(id=model_id, path=model_id)

    @property
    def default(self) -> ModelEntry:
        """The default model. Raises ModelUnavailable if it is unavailable; no other model replaces it."""
        return self.get(self._content.default_id)

    @property
    def first(self) -> ModelEntry:
        """The first available model, which a worker serves by default. Raises ModelUnavailable if there is none."""
        return next(iter(self), None) or self.default

    @property
    def default_id(self) -> str:
        """The id of the default model, even if it is unavailable."""
        return self._content.default_id

    def default_id_for(self, task: Task) -> str:
        """The id of the default model; for embeddings and scores, of the first available model that is made for them,
        if any is, since the default model may be able to embed as well."""
        made_for = (entry.id for wanted in _MADE_FOR[task] for entry in self if entry.task == wanted)
        return next(made_for, self.default_id)

    @property
    def ids(self) -> list[str]:
        """The ids of the available models, the default one first."""
        return [entry.id for entry in self]

    @property
    def entries(self) -> list[ModelEntry]:
        """The valid entries, including those whose model files are invalid."""
        return list(self._content.entry_by_id.values())

    @property
    def unavailable(self) -> Mapping[str, str]:
        """Why models are unavailable, by model id."""
        return {**self._content.reason_by_id, **self._failures}

    def set_failures(self, reason_by_id: Mapping[str, str]) -> None:
        """Set why models' files are invalid or cannot be loaded now, by model id."""
        self._failures = dict(reason_by_id)

    def __iter__(self) -> Iterator[ModelEntry]:
        """The models that are available."""
        unavailable = self.unavailable
        return iter([entry for entry in self.entries if entry.id not in unavailable])


RETRY_SECONDS = 30.0  # between attempts to read the files of an unavailable model


def _signatures(path: Path, store: Path | None) -> object:
    return _signature(path), [(file, _signature(file)) for file in _entry_files(store)]


def _entry_files(store: Path | None) -> list[Path]:
    """Those of the store's complete models: what is still being pulled lies in hidden folders."""
    files = [] if store is None else sorted(store.glob(f"*/{ENTRY_FILE}"))
    return [file for file in files if not file.parent.name.startswith(".")]


def _signature(path: Path) -> object:
    try:
        stat = path.stat()
    except OSError as exc:
        return type(exc)
    return stat.st_mtime_ns, stat.st_size, stat.st_ino


def _read_all(path: Path, store: Path | None, default_id: str | None) -> _Content:
    """An entry of models.toml takes precedence over a model of the store with the same id."""
    content = _read(path)
    entry_by_id, reason_by_id = dict(content.entry_by_id), dict(content.reason_by_id)
    for file in _entry_files(store):
        try:
            pulled = _read(file)
        except (OSError, ValueError) as exc:
            reason_by_id.setdefault(file.parent.name, str(exc))
            continue
        taken = entry_by_id.keys() | reason_by_id.keys()
        entry_by_id |= {key: entry for key, entry in pulled.entry_by_id.items() if key not in taken}
        reason_by_id |= {key: reason for key, reason in pulled.reason_by_id.items() if key not in taken}
    if default_id is None:
        return _Content(content.default_id, entry_by_id, reason_by_id)
    chosen = {default_id: entry_by_id[default_id]} if default_id in entry_by_id else {}
    return _Content(default_id, chosen | entry_by_id, reason_by_id)


def _read(path: Path) -> _Content:
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except ValueError as exc:  # not TOML, or not UTF-8
        raise ValueError(f"{path}: {exc}; correct the file") from exc
    tables = document.get("models", [])
    if not isinstance(tables, list) or not tables:
        raise ValueError(f"{path} has no models; add a [[models]] table with id and path")
    ids = [_id_of(table, number) for number, table in enumerate(tables, 1)]
    entry_by_id: dict[str, ModelEntry] = {}
    reason_by_id: dict[str, str] = {}
    for model_id, table in zip(ids, tables, strict=True):
        if ids.count(model_id) > 1:
            reason_by_id[model_id] = f"{path.name} has {model_id} more than once; give each model a unique id"
            continue
        try:
            entry_by_id[model_id] = _with_absolute_paths(ModelEntry.model_validate(table), path.parent)
        except ValidationError as exc:
            reason_by_id[model_id] = f"{path.name}: {_in_words(exc)}"
    return _Content(ids[0], entry_by_id, reason_by_id)


def _id_of(table: Any, number: int) -> str:
    model_id = table.get("id") if isinstance(table, dict) else None
    return model_id if isinstance(model_id, str) and model_id else f"models.{number}"


def _in_words(exc: ValidationError) -> str:
    """The first field at fault, the value seen and the remedy."""
    error = exc.errors(include_url=False)[0]
    name = ".".join(map(str, error["loc"])) or "the entry"
    if error["type"] == "missing":
        return f"{name} is missing; a model needs id and path, all other keys are optional"
    if error["type"] == "extra_forbidden":
        return f"{name} is not a known key; remove it, or see docs/models.md for the keys of a model"
    if error["type"] == _UNSHOWN:
        return f"{name} cannot be used: {error['msg']}"
    return f"{name} is {repr(error['input'])[:100]}, but: {error['msg'][:1].lower()}{error['msg'][1:]}; correct it"


def _with_former_entries(new: _Content, old: _Content) -> _Content:
    """`new`, but with the former entries of models whose new ones are invalid."""
    kept = {model_id: old.entry_by_id[model_id] for model_id in new.reason_by_id if model_id in old.entry_by_id}
    for model_id, reason in new.reason_by_id.items():
        remains = "it stays as it was" if model_id in kept else "it is unavailable"
        log.error(f"a model of models.toml is invalid; {remains}", extra={"model": model_id, "reason": reason})
    reasons = {model_id: reason for model_id, reason in new.reason_by_id.items() if model_id not in kept}
    return _Content(new.default_id, {**new.entry_by_id, **kept}, reasons)


def _with_absolute_paths(entry: ModelEntry, base: Path) -> ModelEntry:
    place = base / Path(entry.path).expanduser()
    paths: dict[str, Any] = {"path": str(place.resolve())} if place.exists() else {}
    if entry.adapters:
        paths["adapters"] = {name: str((base / Path(p).expanduser()).resolve()) for name, p in entry.adapters.items()}
    if entry.python is not None:
        paths["python"] = str(base.absolute() / Path(entry.python).expanduser())  # a link tells which environment it is
    if entry.remote is not None and entry.remote.ca_file is not None:
        ca_file = str((base / Path(entry.remote.ca_file).expanduser()).absolute())
        paths["remote"] = entry.remote.model_copy(update={"ca_file": ca_file})
    return entry.model_copy(update=paths)
