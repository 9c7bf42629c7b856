"""What a GGUF file says of its tokenizer and its model, read without PyTorch and transformers."""

import json
import random
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from celeriac.store import gguf
from celeriac.store.files import ModelRefused
from celeriac.store.gguf_description import write_description
from celeriac.store.gguf_header import read_header
from celeriac.store.gguf_tokenizer import UnknownVocabulary, build_tokenizer
from settings import ROOT

MINI = ROOT / "models" / "celeriac-mini"
SCRIPTS = ((32, 127), (160, 600), (0x370, 0x530), (0x600, 0x6FF), (0x900, 0x97F), (0x4E00, 0x9FFF), (0x1F300, 0x1F6FF))
BETWEEN = ("", " ", "  ", "\n", "\n\n", "\t", " 12", "\n\n7", "'s", "don't", "<|end|>", "\u0663\u0664")


def write_gguf(file: Path, header: Mapping[str, Any]) -> Path:
    pairs = b"".join(_text(key) + _value(value) for key, value in header.items())
    file.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, len(header)) + pairs)
    return file


def _text(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def _value(value: Any) -> bytes:
    match value:
        case bool():
            return struct.pack("<I?", 7, value)
        case int():
            return struct.pack("<IQ", 10, value)
        case float():
            return struct.pack("<If", 6, value)
        case str():
            return struct.pack("<I", 8) + _text(value)
        case _:
            kind, length = struct.unpack("<I", _value(value[0])[:4])[0], len(value)
            return struct.pack("<IIQ", 9, kind, length) + b"".join(_value(one)[4:] for one in value)


def header_of_mini() -> dict[str, Any]:
    described = json.loads((MINI / "tokenizer.json").read_text())
    whole = {token["id"] for token in described["added_tokens"]}
    tokens = sorted(described["model"]["vocab"], key=described["model"]["vocab"].get)
    return {
        "general.architecture": "llama",
        "llama.context_length": 1024,
        "llama.attention.head_count": 4,
        "llama.rope.freq_base": 10000.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token_id in whole else 1 for token_id in range(len(tokens))],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in described["model"]["merges"]],
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.eot_token_id": 4,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.chat_template": "{{ messages }}",
        "tokenizer.chat_template.tool_use": "{{ tools }}",
        "tokenizer.chat_template.../evil": "{{ tools }}",
    }


def header_of_words(words: Mapping[str, float], **changes: Any) -> dict[str, Any]:
    """A vocabulary as SentencePiece makes it: three control tokens, all bytes, and these."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    return {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * (len(tokens) - len(words)) + list(words.values()),
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(words),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    } | {key.replace("__", "."): value for key, value in changes.items()}


def random_texts(number: int) -> list[str]:
    rng = random.Random(7)
    return ["".join(_random_part(rng) for _ in range(rng.randrange(1, 10))) for _ in range(number)]


def _random_part(rng: random.Random) -> str:
    first, last = rng.choice(SCRIPTS)
    return "".join(chr(rng.randrange(first, last)) for _ in range(rng.randrange(8))) + rng.choice(BETWEEN)


def test_the_header_has_every_pair_and_a_file_that_is_cut_off_is_refused(tmp_path: Path) -> None:
    pairs: dict[str, Any] = {"text": "añ", "yes": True, "number": 7, "half": 0.5, "words": ["a", ""], "numbers": [1, 2]}
    file = write_gguf(tmp_path / "x.gguf", pairs)
    assert read_header(file) == pairs
    whole = file.read_bytes()
    for length in range(4, len(whole)):
        file.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="fetch it again"):
            read_header(file)
    file.write_bytes(b"GGUF" + struct.pack(">IQQ", 3, 0, 0))
    with pytest.raises(ValueError, match="little-endian"):
        read_header(file)


def test_a_byte_level_vocabulary_gives_the_tokens_of_the_models_own_tokenizer() -> None:
    ours, theirs = build_tokenizer(header_of_mini()), Tokenizer.from_file(str(MINI / "tokenizer.json"))
    for text in random_texts(2000):
        ids = ours.encode(text).ids
        assert ids == theirs.encode(text).ids, text
        assert ours.decode(ids, skip_special_tokens=False) == text


def test_a_vocabulary_with_scores_is_merged_by_them_and_falls_back_to_bytes() -> None:
    words = {"\u2581": -1.0, "a": -2.0, "b": -3.0, "ab": -4.0, "ba": -0.5, "\u2581ab": -5.0}
    tokenizer = build_tokenizer(header_of_words(words))
    assert tokenizer.encode("ab aba").tokens == ["<s>", "\u2581ab", "\u2581", "a", "ba"]
    assert tokenizer.encode("a\u00f1").tokens == ["<s>", "\u2581", "a", "<0xC3>", "<0xB1>"]
    for text in random_texts(200):
        text = text.lstrip().replace("<|end|>", "")
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


@pytest.mark.parametrize(
    ("changes", "tokens"),
    [
        ({}, ["<s>", "\u2581", "b"]),
        ({"tokenizer__ggml__add_bos_token": False}, ["\u2581", "b"]),
        ({"tokenizer__ggml__add_eos_token": True}, ["<s>", "\u2581", "b", "</s>"]),
        ({"tokenizer__ggml__add_space_prefix": False}, ["<s>", "b"]),
        ({"general__architecture": "gemma3"}, ["<s>", "b"]),
    ],
)
def test_what_is_put_around_a_text_is_what_the_file_says(changes: dict[str, Any], tokens: Sequence[str]) -> None:
    tokenizer = build_tokenizer(header_of_words({"\u2581": -1.0, "b": -2.0}, **changes))
    assert tokenizer.encode("b").tokens == tokens


def test_files_for_the_api_are_written_and_no_template_leads_out_of_the_folder(tmp_path: Path) -> None:
    write_description(write_gguf(tmp_path / "mini.gguf", header_of_mini()), tmp_path)
    config, generation, tokenizer = (
        json.loads((tmp_path / f"{name}.json").read_text())
        for name in ("config", "generation_config", "tokenizer_config")
    )
    assert (config["model_type"], config["max_position_embeddings"], config["vocab_size"]) == ("llama", 1024, 2048)
    assert config["eos_token_id"] == generation["eos_token_id"] == [1, 4]
    assert tokenizer["eos_token"] == "<|end|>"
    assert (tmp_path / "chat_template.jinja").read_text() == "{{ messages }}"
    assert [path.name for path in (tmp_path / "additional_chat_templates").iterdir()] == ["tool_use.jinja"]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"tokenizer.ggml.model": "rwkv"}, "of the kind 'rwkv'"),
        ({"tokenizer.ggml.pre": "brand-new"}, "cut in the way 'brand-new'"),
        ({"tokenizer.ggml.tokens": []}, "no vocabulary"),
    ],
)
def test_an_unknown_vocabulary_is_left_to_transformers_or_refused_with_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], says: str
) -> None:
    header = {key: value for key, value in (header_of_mini() | changes).items() if value != []}
    file = write_gguf(tmp_path / "x.gguf", header)
    with pytest.raises(UnknownVocabulary, match=says):
        build_tokenizer(header)
    monkeypatch.setattr(gguf, "PROGRAM", "json.tool")  # fails at once
    monkeypatch.setattr(gguf, "PACKAGES", ())
    with pytest.raises(ModelRefused, match="its description could not be read"):
        gguf.describe(file, tmp_path)
    monkeypatch.setattr(gguf, "PACKAGES", ("no_such_package",))
    with pytest.raises(ModelRefused, match=f"{says}.*needs no_such_package: install the extra `worker`"):
        gguf.describe(file, tmp_path)
    assert not (tmp_path / "tokenizer.json").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"tokenizer.ggml.merges": ["no such"]},
        {"tokenizer.ggml.merges": None},
        {"tokenizer.ggml.eos_token_id": 10**6, "tokenizer.ggml.add_eos_token": True},
    ],
    ids=["merge", "no merges", "end"],
)
def test_a_vocabulary_that_contradicts_itself_is_refused_in_one_line(tmp_path: Path, changes: dict[str, Any]) -> None:
    header = {key: value for key, value in (header_of_mini() | changes).items() if value is not None}
    with pytest.raises(ModelRefused, match=r"x\.gguf: its description could not be read: its vocabulary is not consis"):
        gguf.describe(write_gguf(tmp_path / "x.gguf", header), tmp_path)
