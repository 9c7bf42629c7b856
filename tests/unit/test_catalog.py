"""models.toml: what is wrong with one model harms that one alone, and says so; changes are followed."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from domain.catalog import Catalog
from domain.errors import ModelNotFound, ModelUnavailable
from tests.unit.test_models import make_spec, write_model
from text import models
from text.models import ModelViews, complete, load_model_view

GOOD = '[[models]]\nid = "good"\npath = "fake"\nbackend = "fake"\nmax_model_len = 64\n'


def write(folder: Path, text: str) -> Path:
    file = folder / "models.toml"
    file.write_text(text)
    return file


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ('id = "bad"', "path is missing"),
        ('id = "bad"\npath = "x"\nmax_model_len = 4', "max_model_len is 4, but: input should be greater"),
        ('id = "bad"\npath = "x"\nmax_model_len = "64k"', "max_model_len is '64k'"),
        ('id = "bad"\npath = "x"\nmax_num_seq = 4', "max_num_seq is not a known key"),
        ('id = "bad"\npath = 3', "path is 3"),
        ('id = "bad"\npath = "x"\nbackend = "tensorrt"', "backend is 'tensorrt'"),
        ('id = "bad"\npath = "x"\n[[models]]\nid = "bad"\npath = "y"', "more than once"),
        ('id = "bad"\npath = "/nowhere/at/all"', "not a folder on this machine"),
        ('id = "bad"\npath = "./nowhere"', "not a folder on this machine"),
        ('id = "bad"\npath = "fake"\nbackend = "fake"\nchat_template = "rag"', "chat_template is 'rag'"),
    ],
)
def test_one_bad_entry_is_unavailable_with_the_reason_and_the_others_are_served(
    tmp_path: Path, entry: str, says: str
) -> None:
    views = ModelViews(Catalog.load(write(tmp_path, f"{GOOD}[[models]]\n{entry}\n")))
    assert views.get("good").spec.id == "good"
    with pytest.raises(ModelUnavailable, match="bad") as refused:
        views.get("bad")
    assert says in refused.value.message
    assert "pydantic" not in refused.value.message
    assert "http" not in refused.value.message
    assert views.catalog.ids == ["good"]


def test_an_entry_without_an_id_is_called_by_its_place(tmp_path: Path) -> None:
    catalog = Catalog.load(write(tmp_path, GOOD + '[[models]]\npath = "x"\n'))
    assert list(catalog.unavailable) == ["models.2"]


def test_no_other_model_takes_the_place_of_a_default_that_is_unavailable(tmp_path: Path) -> None:
    catalog = Catalog.load(write(tmp_path, '[[models]]\nid = "first"\n' + GOOD))
    with pytest.raises(ModelUnavailable, match="path is missing"):
        _ = catalog.default


def test_the_default_for_embeddings_is_made_for_them_if_any_model_is(tmp_path: Path) -> None:
    entries = [f'[[models]]\nid = "{name}"\npath = "x"\nbackend = "fake"\n' for name in ("text", "one", "two")]
    catalog = Catalog.load(write(tmp_path, "".join([entries[0], *(e + 'task = "embedding"\n' for e in entries[1:])])))
    assert (catalog.default_id_for("generation"), catalog.default_id_for("embedding")) == ("text", "one")
    assert Catalog.load(write(tmp_path, entries[0])).default_id_for("embedding") == "text"


@pytest.mark.parametrize("text", ["", "[models", "models = 3", 'title = "x"'])
def test_a_file_that_names_no_model_is_refused_as_a_whole(tmp_path: Path, text: str) -> None:
    with pytest.raises(ValueError, match=r"models\.toml"):
        Catalog.load(write(tmp_path, text))


def test_a_change_is_followed_and_a_model_taken_out_takes_no_more_jobs(tmp_path: Path) -> None:
    file = write(tmp_path, GOOD)
    views = ModelViews(Catalog.load(file))
    file.write_text(GOOD.replace("good", "better"))
    views.refresh()
    assert views.get("better").spec.id == "better"
    with pytest.raises(ModelNotFound):
        views.get("good")
    assert views.output_format("good") == views.output_format("better"), "its old jobs can still be read"
    assert views.catalog.entry_of("good").queue == "celeriac.good"


@pytest.mark.parametrize("text", ["[[models", "", '[[models]]\nid = "good"\npath = "fake"\nmax_model_len = 1\n'])
def test_a_bad_edit_is_logged_and_the_old_one_stays(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, text: str
) -> None:
    file = write(tmp_path, GOOD)
    views = ModelViews(Catalog.load(file))
    file.write_text(text)
    with caplog.at_level(logging.ERROR):
        views.refresh()
        views.refresh()
    assert views.get("good").max_model_len == 64
    assert [bool(getattr(record, "reason", "")) for record in caplog.records] == [True], "once, with the reason"
    file.write_text(GOOD.replace("64", "128"))
    views.refresh()
    assert views.get("good").max_model_len == 128


def test_an_edit_of_one_model_to_files_that_are_bad_leaves_it_as_it_was(tmp_path: Path) -> None:
    file = write(tmp_path, f'[[models]]\nid = "tiny"\npath = "{write_model(tmp_path / "tiny")}"\nmax_model_len = 64\n')
    views = ModelViews(Catalog.load(file))
    (tmp_path / "empty").mkdir()
    file.write_text(file.read_text().replace("/tiny", "/empty"))
    views.refresh()
    assert views.get("tiny").spec.path.endswith("tiny")


def test_a_model_whose_files_come_later_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "RETRY_SECONDS", 0.0)
    file = write(tmp_path, f'{GOOD}[[models]]\nid = "late"\npath = "{tmp_path / "late"}"\nmax_model_len = 64\n')
    views = ModelViews(Catalog.load(file))
    with pytest.raises(ModelUnavailable):
        views.get("late")
    write_model(tmp_path / "late")
    views.refresh()
    assert views.get("late").spec.id == "late"
    assert not views.catalog.unavailable


def test_a_hub_that_is_away_makes_its_models_unavailable_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def be_away(*_: object, **__: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("huggingface_hub.snapshot_download", be_away)
    views = ModelViews(Catalog.load(write(tmp_path, GOOD + '[[models]]\nid = "far"\npath = "org/far"\n')))
    with pytest.raises(ModelUnavailable, match="could not be fetched from the hub"):
        views.get("far")
    assert views.get("good")


# What the files of a model are


def change_config(folder: Path, name: str = "config.json", **values: object) -> None:
    file = folder / name
    content = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(content | values))


def make_gguf_folder(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()
    (folder / "model.Q4_K_M.gguf").write_bytes(b"GGUF")


def make_adapter(folder: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (folder / name).unlink()
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    (folder / "adapter_model.safetensors").write_bytes(b"weights")


def make_pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def make_slow(folder: Path) -> None:
    (folder / "tokenizer.json").rename(folder / "tokenizer.model")


UNSERVABLE: list[tuple[Callable[[Path], object], str]] = [
    (make_gguf_folder, "GGUF"),
    (make_adapter, "LoRA adapter"),
    (make_pickled, "pickled"),
    (make_slow, "slow tokenizer"),
    (lambda folder: (folder / "model.safetensors").unlink(), r"no \*\.safetensors"),
    (lambda folder: (folder / "config.json").unlink(), r"no config\.json"),
    (lambda folder: change_config(folder, quantization_config={"quant_method": "gptq"}), "quantised with gptq"),
    (lambda folder: change_config(folder, quantization_config={"quant_method": "awq"}), "quantised with awq"),
    (lambda folder: change_config(folder, model_type=None), "model_type is missing"),
    (lambda folder: change_config(folder, auto_map={"AutoModel": "x.Y"}), "trust_remote_code = true"),
    (lambda folder: (folder / "config.json").write_text("{"), r"config\.json is not valid JSON"),
    (lambda folder: (folder / "config.json").write_text("[1]"), r"config\.json contains a list"),
    (lambda folder: (folder / "tokenizer.json").write_text("{}"), r"tokenizer\.json cannot be read"),
    (
        lambda folder: (folder / "generation_config.json").write_text('{"a": '),
        r"generation_config\.json is not valid JSON",
    ),
    (
        lambda folder: (folder / "tokenizer_config.json").write_bytes(b"\xff\xfe{}"),
        r"tokenizer_config\.json is not UTF-8",
    ),
    (lambda folder: change_config(folder, vocab_size="300"), r"config\.json: vocab_size is '300'"),
    (lambda folder: change_config(folder, "tokenizer_config.json", chat_template=3), r"tokenizer_config\.json: chat_t"),
    (lambda folder: change_config(folder, "tokenizer_config.json", added_tokens_decoder=[1]), "an added token"),
    (
        lambda folder: change_config(folder, "tokenizer_config.json", chat_template="{% if %}"),
        "'default' does not comp",
    ),
    (lambda folder: change_config(folder, "generation_config.json", temperature="0.6"), "temperature is '0.6'"),
    (lambda folder: change_config(folder, "generation_config.json", temperature=-1), "temperature is -1"),
    (lambda folder: change_config(folder, "generation_config.json", top_p=1.5), "top_p is 1.5"),
    (lambda folder: change_config(folder, "generation_config.json", top_k=[5]), r"top_k is \[5\]"),
    (lambda folder: change_config(folder, "generation_config.json", top_k=True), "top_k is True"),
    (lambda folder: change_config(folder, "generation_config.json", eos_token_id="2"), "eos_token_id is '2'"),
    (lambda folder: change_config(folder, "generation_config.json", max_new_tokens=0), "max_new_tokens is 0"),
    (lambda folder: change_config(folder, "generation_config.json", temperature=float("nan")), "temperature is nan"),
    (lambda folder: change_config(folder, "generation_config.json", top_k=float("inf")), "top_k is inf"),
]


@pytest.mark.parametrize(("spoil", "says"), UNSERVABLE)
def test_what_cannot_be_served_is_called_by_its_name(
    tmp_path: Path, spoil: Callable[[Path], object], says: str
) -> None:
    folder = write_model(tmp_path / "tiny")
    spoil(folder)
    with pytest.raises(ValueError, match=says) as refused:
        load_model_view(make_spec(folder))
    assert str(refused.value).startswith("model tiny: ")
    assert str(refused.value).count("model tiny") == 1


def test_a_gguf_file_is_called_by_its_name(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    with pytest.raises(ValueError, match="name the folder that holds it"):
        load_model_view(make_spec(file))


@pytest.mark.parametrize("top_k", [-1, 0, None])
def test_a_top_k_of_minus_one_is_off(tmp_path: Path, top_k: object) -> None:
    folder = write_model(tmp_path / "tiny")
    change_config(folder, "generation_config.json", top_k=top_k)
    assert load_model_view(make_spec(folder)).defaults.top_k == 0


# How long a model is


@pytest.mark.parametrize(
    ("config", "tokenizer_config", "length"),
    [
        ({"max_position_embeddings": 8192}, {"model_max_length": 2048}, 8192),
        ({"text_config": {"max_position_embeddings": 32768}}, {"model_max_length": 1e30}, 32768),
        ({"n_positions": 1024}, {}, 1024),
        ({}, {"model_max_length": 2048}, 2048),
        ({"max_position_embeddings": 512}, {"model_max_length": 1000000000000000019884624838656}, 512),
    ],
)
def test_a_models_length_is_its_own_where_none_is_named(
    tmp_path: Path, config: dict[str, Any], tokenizer_config: dict[str, Any], length: int
) -> None:
    folder = write_model(tmp_path / "tiny", **tokenizer_config)
    change_config(folder, **config)
    entry = make_spec(folder, max_model_len=None)
    assert load_model_view(entry).max_model_len == length
    assert complete(entry).max_model_len == length
    assert complete(make_spec(folder, max_model_len=64)).max_model_len == 64


def test_a_sentence_transformers_length_is_the_one_that_it_was_made_for(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "tiny")
    change_config(folder, model_type="bert", max_position_embeddings=512)
    change_config(folder, "sentence_bert_config.json", max_seq_length=256)
    assert load_model_view(make_spec(folder, max_model_len=None, task="embedding")).max_model_len == 256


def test_positions_behind_the_padding_count_less(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "tiny")
    change_config(folder, model_type="roberta", max_position_embeddings=514, pad_token_id=1)
    assert load_model_view(make_spec(folder, max_model_len=None, task="embedding")).max_model_len == 512


def test_a_model_whose_files_say_no_length_wants_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="max_model_len is missing"):
        load_model_view(make_spec(write_model(tmp_path / "tiny"), max_model_len=None))


@pytest.mark.parametrize(
    ("entry", "hidden", "has_gpu", "expected"),
    [
        ("", None, False, (16, 512)),
        ("", None, True, (256, 8192)),
        ("", "", True, (16, 512)),
        ("", "-1", True, (16, 512)),
        ("", "1", True, (256, 8192)),
        ('device = "cpu"', None, True, (16, 512)),
        ('device = "cuda"', None, False, (256, 8192)),
        ("max_num_seqs = 4", None, True, (4, 8192)),
        ("max_num_batched_tokens = 64", None, False, (16, 64)),
    ],
)
def test_the_size_of_a_step_goes_by_the_device(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    entry: str,
    hidden: str | None,
    has_gpu: bool,
    expected: tuple[int, int],
) -> None:
    driver = tmp_path / "nvidiactl"
    if has_gpu:
        driver.touch()
    monkeypatch.setattr(models, "GPU_DEVICES", (driver,))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if hidden is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    folder = write_model(tmp_path / "tiny")
    file = write(tmp_path, f'[[models]]\nid = "tiny"\npath = "{folder}"\nmax_model_len = 64\n{entry}\n')
    spec = complete(Catalog.load(file).default)
    assert (spec.max_num_seqs, spec.max_num_batched_tokens) == expected
