"""Writes what a GGUF file describes, for transformers: `python -m gpu_worker.engine.gguf_conversion describe FILE DIR`.

`describe` writes config and tokenizer, which is what the API reads. `convert` also writes the weights as safetensors:
quantised ones become bfloat16. What that rounds off is a small part of what their quantisation did, and it is the type
that a GPU wants. Those that were whole stay as they are.
"""

import sys
from functools import cache
from pathlib import Path
from typing import Any, Literal

import gguf
import gguf.gguf_reader
import numpy as np

DTYPE_BY_FILE_TYPE = {0: "float32", 1: "float16"}  # `general.file_type`: ALL_F32, MOSTLY_F16


def describe(file: Path, folder: Path) -> None:
    """Raises ValueError, or whatever transformers raises, for files that it does not know."""
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    config.save_pretrained(folder)
    GenerationConfig.from_model_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)


def convert(file: Path, folder: Path) -> None:
    """Raises as `describe` does."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file_type = gguf.GGUFReader(file).fields.get("general.file_type")
    dtype = DTYPE_BY_FILE_TYPE.get(int(file_type.contents()) if file_type else -1, "bfloat16")
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=getattr(torch, dtype))
    _forget_quantisation(model)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)


def _forget_quantisation(model: Any) -> None:
    """Its weights are whole now, but it still says that they are not, and could not be saved."""
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


def _spare_repetitions() -> None:
    """transformers reads the file three times, and makes the table of names anew for each module: half of the time."""
    gguf.gguf_reader.np = PlainArrays()
    gguf.GGUFReader = cache(gguf.GGUFReader)
    gguf.get_tensor_name_map = cache(gguf.get_tensor_name_map)


class PlainArrays:
    """numpy as gguf's reader is to see it. The reader takes each of half a million strings and numbers as a slice of
    the mapped file, and a slice of a `memmap` costs several times one of an array: most of a conversion's time."""

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)

    def memmap(self, path: Path, mode: Literal["r"]) -> Any:
        return np.memmap(path, mode=mode).view(np.ndarray)


def main(verb: str, file: Path, folder: Path) -> None:
    from transformers.utils import logging

    _spare_repetitions()
    logging.set_verbosity_error()
    {"describe": describe, "convert": convert}[verb](file, folder)


if __name__ == "__main__":
    try:
        main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
    except Exception as exc:  # of any kind, for faulty files: the last line is what the user sees
        sys.exit(f"{type(exc).__name__}: {exc}".replace("\n", " "))
