"""The names by which requests ask for a model: `base`, or `base:adapter` for one of its LoRA adapters."""

from functools import lru_cache
from typing import NamedTuple


class ModelName(NamedTuple):
    """`id` is the model in models.toml, to whose queue the job goes; `adapter` is None for the model itself."""

    id: str
    adapter: str | None


@lru_cache(maxsize=1024)  # a request asks a dozen times
def parse_model_name(name: str) -> ModelName:
    """No model's id contains a colon."""
    model_id, _, adapter = name.partition(":")
    return ModelName(model_id, adapter or None)


def model_name(model_id: str, adapter: str | None) -> str:
    return model_id if adapter is None else f"{model_id}:{adapter}"
