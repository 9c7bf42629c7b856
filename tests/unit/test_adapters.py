"""The files of LoRA adapters, as the API reads them: what is refused and how, and their part of the revision."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from domain.catalog import Catalog, ModelEntry
from domain.errors import ModelNotFound
from domain.requests import EmbeddingRequest, GenerationRequest
from tasks.submit import fingerprint
from text.adapters import adapters_revision, read_adapters

LAYER = "base_model.model.model.layers.0.self_attn.q_proj"
GOOD = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none", "target_modules": ["q_proj"]}


def write_weights(folder: Path, shapes: dict[str, tuple[str, Any]]) -> None:
    header = {name: {"dtype": kind, "shape": shape, "data_offsets": [0, 0]} for name, (kind, shape) in shapes.items()}
    raw = json.dumps(header | {"__metadata__": {"format": "pt"}}).encode()
    (folder / "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw)


def write_pair(folder: Path, name: str = LAYER, *, kind: str = "F32", rank: int = 4) -> None:
    write_weights(folder, {f"{name}.lora_A.weight": (kind, [rank, 64]), f"{name}.lora_B.weight": (kind, [32, rank])})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "poems"
    folder.mkdir()
    configure(folder)
    write_pair(folder)
    return folder


def configure(folder: Path, **changes: object) -> None:
    (folder / "adapter_config.json").write_text(json.dumps(GOOD | changes))


def entry_of(folder: Path, **fields: Any) -> ModelEntry:
    return ModelEntry(id="base", path="nowhere", adapters={"poems": str(folder)}, **fields)


def test_an_adapter_is_read_with_its_sizes_and_scaling(folder: Path) -> None:
    [files] = read_adapters(entry_of(folder)).values()
    assert (files.rank, files.scaling) == (4, 2.0)
    [(module, size)] = files.size_by_module.items()
    assert (module, size.num_in, size.num_out) == ("model.layers.0.self_attn.q_proj", 64, 32)
    configure(folder, use_rslora=True, lora_alpha=6.0)
    assert read_adapters(entry_of(folder))["poems"].scaling == 3.0


def pickle_it(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


FAULTS: list[tuple[Callable[[Path], object], str]] = [
    (pickle_it, r"its weights are pickled"),
    (lambda folder: (folder / "adapter_model.safetensors").unlink(), r"no adapter_model\.safetensors; fetch"),
    (lambda folder: (folder / "adapter_config.json").unlink(), r"no adapter_config\.json"),
    (lambda folder: (folder / "adapter_config.json").write_text("{"), r"adapter_config\.json is not valid JSON"),
    (lambda folder: (folder / "adapter_config.json").write_text("[]"), r"contains a list"),
    (lambda folder: (folder / "adapter_config.json").write_text(" " * 2**20 + "{}"), r"more than 1048576 bytes"),
    (lambda folder: configure(folder, peft_type="IA3"), r"peft_type is 'IA3'"),
    (lambda folder: configure(folder, r=0), r"r is 0; it must be a whole number from 1 to 256"),
    (lambda folder: configure(folder, r=257), r"r is 257"),
    (lambda folder: configure(folder, r=True), r"r is True"),
    (lambda folder: configure(folder, lora_alpha="8"), r"lora_alpha is '8'"),
    (lambda folder: configure(folder, use_rslora="yes"), r"use_rslora is 'yes'"),
    (lambda folder: configure(folder, use_dora=True), r"use_dora is 'True', which is not supported; merge"),
    (lambda folder: configure(folder, bias="all"), r"bias is 'all'"),
    (lambda folder: configure(folder, modules_to_save=["lm_head"]), r"modules_to_save is"),
    (lambda folder: configure(folder, rank_pattern={"q_proj": 8}), r"rank_pattern is"),
    (lambda folder: configure(folder, fan_in_fan_out=True), r"fan_in_fan_out is 'True'"),
    (lambda folder: write_pair(folder, rank=8), r"lora_A\.weight is 8 x 64, but adapter_config\.json says r is 4"),
    (lambda folder: write_pair(folder, kind="I8"), r"is I8 \[4, 64\], not a matrix of floats"),
    (lambda folder: write_weights(folder, {}), r"is empty"),
    (lambda folder: write_weights(folder, {f"{LAYER}.lora_A.weight": ("F32", [4, 64])}), r"has lora_A alone"),
    (lambda folder: write_weights(folder, {f"{LAYER}.lora_A.weight": ("F32", [4, -1])}), r"not a matrix"),
    (lambda folder: write_weights(folder, {"base_model.model.lm_head.weight": ("F32", [4, 4])}), r"lm_head\.weight'"),
    (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"\xff" * 9), r"header of \d+ bytes"),
    (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"1"), r"header of 0 bytes"),
    (
        lambda folder: (folder / "adapter_model.safetensors").write_bytes(struct.pack("<Q", 4) + b"[{}]"),
        r"cannot be re",
    ),
]


@pytest.mark.parametrize(("break_it", "words"), FAULTS, ids=[words for _, words in FAULTS])
def test_an_adapter_that_cannot_be_served_is_refused_with_file_and_field(
    break_it: Callable[[Path], object], words: str, folder: Path
) -> None:
    break_it(folder)
    with pytest.raises(ValueError, match=rf"adapter 'poems': .*{words}"):
        read_adapters(entry_of(folder))


def test_back_ends_without_adapters_refuse_them(folder: Path) -> None:
    with pytest.raises(ValueError, match="adapters cannot be served by backend 'llama_cpp'"):
        read_adapters(entry_of(folder, backend="llama_cpp"))
    with pytest.raises(ValueError, match="adapters cannot be served by a model with task 'embedding'"):
        read_adapters(entry_of(folder, task="embedding"))


def test_the_revision_follows_the_names_and_content_of_all_adapters(folder: Path, tmp_path: Path) -> None:
    assert adapters_revision(ModelEntry(id="base", path="nowhere")) == ""
    first = adapters_revision(entry_of(folder))
    renamed = adapters_revision(ModelEntry(id="base", path="nowhere", adapters={"verses": str(folder)}))
    copy = tmp_path / "copy"
    copy.mkdir()
    configure(copy)
    write_pair(copy)
    assert adapters_revision(entry_of(copy)) == first
    changed = tmp_path / "changed"
    changed.mkdir()
    configure(changed, lora_alpha=9)
    write_pair(changed)
    assert len({first, renamed, adapters_revision(entry_of(changed))}) == 3


def test_a_name_finds_its_model_and_an_unknown_adapter_is_told_those_there_are(folder: Path) -> None:
    catalog = Catalog([entry_of(folder), ModelEntry(id="other", path="nowhere")])
    assert catalog.get("base:poems").id == catalog.get("base").id == "base"
    assert catalog.get("base").names == ["base", "base:poems"]
    for name in ("base:prose", "base:", "other:poems", ":poems", "base:poems:poems"):
        with pytest.raises(ModelNotFound, match=r"is not served here; choose one of: "):
            catalog.get(name)
    with pytest.raises(ModelNotFound, match=r"choose one of: base, base:poems$"):
        catalog.get("base:prose")


def test_paths_of_adapters_are_relative_to_the_file_that_names_them(folder: Path) -> None:
    (folder.parent / "models.toml").write_text('[[models]]\nid = "a"\npath = "x"\nadapters = { poems = "poems" }\n')
    assert Catalog.load(folder.parent / "models.toml").get("a").adapters == {"poems": str(folder)}


def test_one_invalid_name_makes_the_model_unavailable(tmp_path: Path) -> None:
    (tmp_path / "models.toml").write_text('[[models]]\nid = "a"\npath = "x"\nadapters = { "a:b" = "poems" }\n')
    assert "adapters.a:b" in Catalog.load(tmp_path / "models.toml").unavailable["a"]


def test_requests_tell_model_and_adapter_apart() -> None:
    request = GenerationRequest(model="base:poems", prompt="x")
    assert (request.model_id, request.adapter) == ("base", "poems")
    plain = GenerationRequest(model="base", prompt="x")
    assert (plain.model_id, plain.adapter) == ("base", None)
    assert fingerprint("r", [1], request) != fingerprint("r", [1], plain)
    vectors = EmbeddingRequest(model="base:poems", inputs=("x",))
    assert (vectors.model_id, vectors.adapter) == ("base", "poems")
