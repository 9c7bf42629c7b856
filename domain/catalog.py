"""The model registry: `models.toml` read into ModelSpec objects, for the API and the worker alike."""

import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from domain.errors import ModelNotFound
from domain.jobs import Frozen


class ModelSpec(Frozen):
    """One servable model. `path` is a local folder (relative to models.toml) or a Hugging Face repository id."""

    id: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]{0,127}$")
    path: str
    revision: str = "main"  # part of the job row: a resumed job never mixes two revisions
    backend: Literal["transformers", "fake"] = "transformers"
    task: Literal["generation", "embedding"] = "generation"  # embedding: an encoder, or a decoder made for vectors
    max_model_len: int = Field(ge=16, le=10_000_000)  # tokens, prompt and output together
    max_num_seqs: int = Field(default=16, ge=1, le=1024)  # sequences in the running batch
    max_num_batched_tokens: int = Field(default=512, ge=16)  # per step; the budget of chunked prefill
    kv_cache_tokens: int | None = Field(default=None, ge=256)  # size of the paged cache; default: by memory
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    decode_graphs: bool = True  # on a GPU: capture the passes of decodes at load, for speed
    compile: bool = False  # on a GPU: torch.compile the model, which takes minutes at load
    system_prompt: str | None = None
    trust_remote_code: bool = False
    fake: dict[str, float | int | str | bool] = Field(default_factory=dict)  # knobs of the fake back end

    @property
    def can_embed(self) -> bool:
        """A model that generates can embed, too, where its back end shows its hidden states."""
        return self.backend in ("transformers", "fake")

    @property
    def queue(self) -> str:
        """The Celery queue of this model."""
        return f"celeriac.{self.id}"


class Catalog:
    """All models of one `models.toml`; the first one is the default."""

    def __init__(self, specs: list[ModelSpec]) -> None:
        self._specs_by_id = {spec.id: spec for spec in specs}

    @classmethod
    def load(cls, path: Path) -> "Catalog":
        """Read `path`; a local model folder in it is made absolute. Raises ValueError that names the entry at fault."""
        entries = tomllib.loads(path.read_text()).get("models", [])
        if not entries:
            raise ValueError(f"{path} names no model; add a [[models]] table with id, path and max_model_len")
        try:
            specs = [ModelSpec.model_validate(entry) for entry in entries]
        except ValidationError as exc:
            raise ValueError(f"{path}: {exc}") from exc
        duplicates = {spec.id for spec in specs if sum(other.id == spec.id for other in specs) > 1}
        if duplicates:
            raise ValueError(f"{path} names {', '.join(sorted(duplicates))} more than once; model ids must be unique")
        return cls([_with_absolute_path(spec, path.parent) for spec in specs])

    def get(self, model_id: str) -> ModelSpec:
        """Raises ModelNotFound, which lists what there is."""
        spec = self._specs_by_id.get(model_id)
        if spec is None:
            known = ", ".join(sorted(self._specs_by_id))
            raise ModelNotFound(f"model {model_id[:128]!r} is not served here; choose one of: {known}", param="model")
        return spec

    @property
    def default(self) -> ModelSpec:
        return next(iter(self._specs_by_id.values()))

    def __iter__(self) -> Iterator[ModelSpec]:
        return iter(self._specs_by_id.values())


def _with_absolute_path(spec: ModelSpec, base: Path) -> ModelSpec:
    folder = (base / spec.path).resolve()
    return spec.model_copy(update={"path": str(folder)}) if folder.is_dir() else spec
