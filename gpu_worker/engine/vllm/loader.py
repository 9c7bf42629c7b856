"""vLLM's loader of safetensors, which also tells how far it has come.

With several GPUs vLLM loads in processes of its own, which tell nothing.
"""

from collections.abc import Iterator
from typing import Any

from torch import Tensor
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from domain.catalog import ModelEntry
from gpu_worker.engine import load_progress
from text.model_files import model_folder


class TellingLoader(DefaultModelLoader):
    def get_all_weights(self, model_config: Any, model: Any) -> Iterator[tuple[str, Tensor]]:
        folder = model_folder(
            ModelEntry(id="engine", path=model_config.model, revision=model_config.revision or "main")
        )
        num_bytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        yield from load_progress.reported(super().get_all_weights(model_config, model), num_bytes)


def register() -> None:
    """Have vLLM use it for the load format safetensors, by vLLM's own means."""
    register_model_loader("safetensors")(TellingLoader)
