"""GGUF files as they are, in llama.cpp: pulled without a conversion, with its own greedy text, whatever is killed.

Only the first test runs where llama.cpp is not installed; `make test-engines` installs it and runs them all.
"""

import json
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from celeriac.client import Client
from celeriac.store.gguf_header import read_header
from celeriac.store.gguf_tokenizer import build_tokenizer
from celeriac.store.sources import FolderSource
from celeriac.store.store import ModelStore, Wanted
from domain.catalog import Catalog
from tests import llama_cpp_model
from tests.chaos.plant import Plant, start_prepared
from tests.integration.test_main_job import System
from tests.real_models.conftest import CHAT, SETTINGS, Quiet
from tests.real_models.kills import FREE, PROMPT, UNDER_A_SCHEMA, WORDS, submit, text_of, text_through_kills
from tests.unit.test_gguf_description import random_texts

pytestmark = pytest.mark.slow

MODEL = f"{CHAT}-gguf"
#: Runs where its terms were accepted: `celeriac models pull gemma3-270m --backend llama_cpp --accept-licence`.
GEMMA = "gemma3-270m"
NUM_TOKENS = 32

#: llama.cpp by its own high-level interface: FILE, prompt's token ids, number of tokens.
REFERENCE = """
import json, sys
import llama_cpp
file, prompt, num_tokens = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
llama = llama_cpp.Llama(file, n_ctx=512, n_threads=1, n_threads_batch=1, verbose=False)
tokens = llama.generate(prompt, top_k=1, temp=0.0, repeat_penalty=1.0)
print(json.dumps([next(tokens) for _ in range(num_tokens)]))
"""


#: What it makes of texts: FILE, a file with a list of them.
TOKENS = """
import json, sys
from pathlib import Path
import llama_cpp
llama = llama_cpp.Llama(sys.argv[1], vocab_only=True, verbose=False)
texts = json.loads(Path(sys.argv[2]).read_text())
print(json.dumps([llama.tokenize(text.encode(), add_bos=False, special=False) for text in texts]))
"""


@pytest.fixture(scope="module")
def folder(store: ModelStore) -> Path:
    """SmolLM2 as it was published, in four bits."""
    [file] = store.path(CHAT).glob("*.gguf")
    store.pull(Wanted(MODEL, FolderSource(str(file)), gguf_backend="llama_cpp"), Quiet())
    return store.path(MODEL)


def entry(model_id: str, folder: Path) -> str:
    return f"""
[[models]]
id = "{model_id}"
path = "{folder}"
backend = "llama_cpp"
python = "{llama_cpp_model.python()}"
max_model_len = 512
max_num_seqs = 4
llama_cpp = {{ n_threads = 1 }}
"""


def running(model_id: str, model_folder: Path) -> Iterator[System]:
    folder = Path(tempfile.mkdtemp(prefix="celeriac-llama-"))
    settings = SETTINGS | {"models_dir": folder / "none"}
    models = entry(model_id, model_folder)
    plant = Plant(folder, models=models, worker_models={"cpu": model_id}, settings=settings, start=start_prepared)
    with System(plant) as system:
        yield system
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def llama_system(folder: Path) -> Iterator[System]:
    yield from running(MODEL, folder)


@pytest.fixture
def llama(llama_system: System) -> Iterator[Client]:
    with Client(llama_system.plant.api_urls[0]) as client:
        yield client


def reference_text(folder: Path, num_tokens: int) -> str:
    """By the file's own program and the tokenizer that was read from it."""
    [file] = folder.glob("*.gguf")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    prompt = json.dumps(tokenizer.encode(PROMPT).ids)
    command = [llama_cpp_model.python(), "-c", REFERENCE, str(file), prompt, str(num_tokens)]
    said = subprocess.run(command, capture_output=True, text=True, check=False)
    assert said.returncode == 0, said.stderr[-1000:]
    return str(tokenizer.decode(json.loads(said.stdout)))


def test_a_gguf_file_for_llama_cpp_is_described_but_not_converted(store: ModelStore, folder: Path) -> None:
    manifest = store.manifest(MODEL)
    assert manifest.converted_from == ""
    assert [Path(file.path).suffix for file in manifest.files if file.size > 10**7] == [".gguf"]
    [stored] = Catalog.load(folder / "models.toml").entries
    assert (stored.id, stored.backend, stored.path) == (MODEL, "llama_cpp", str(folder))
    converted = store.path(CHAT)
    assert (folder / "chat_template.jinja").read_text() == (converted / "chat_template.jinja").read_text()
    ours, theirs = (Tokenizer.from_file(str(each / "tokenizer.json")) for each in (folder, converted))
    assert ours.get_vocab() == theirs.get_vocab()


@pytest.mark.parametrize("name", [CHAT, GEMMA])
def test_a_files_tokens_are_those_of_transformers_but_for_how_it_keeps_digits_apart(
    store: ModelStore, name: str, tmp_path: Path
) -> None:
    """transformers knows no other way to cut SmolLM2's texts than GPT-2's."""
    if not any(store.path(name).glob("*.gguf")):
        pytest.skip(f"{name} was not pulled into {store.folder}")
    [file] = store.path(name).glob("*.gguf")
    (tmp_path / file.name).symlink_to(file)  # where our tokenizer.json does not lie beside it
    theirs: Any = AutoTokenizer.from_pretrained(tmp_path, gguf_file=file.name)
    header = read_header(file)
    ours = build_tokenizer(header)
    as_in_gpt2 = build_tokenizer(header | {"tokenizer.ggml.pre": "gpt-2"})
    assert ours.get_vocab() == theirs.get_vocab()
    assert ours.get_added_tokens_decoder() == theirs.backend_tokenizer.get_added_tokens_decoder()
    for text in random_texts(2000):
        ids = theirs.encode(text)
        assert as_in_gpt2.encode(text).ids == ids, text
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
        if not any(character.isnumeric() for character in text):
            assert ours.encode(text).ids == ids, text


@pytest.mark.parametrize("name", [CHAT, GEMMA])
def test_a_files_tokens_are_those_of_llama_cpp(store: ModelStore, tmp_path: Path, name: str) -> None:
    python = llama_cpp_model.python()
    if not any(store.path(name).glob("*.gguf")):
        pytest.skip(f"{name} was not pulled into {store.folder}")
    [file] = store.path(name).glob("*.gguf")
    texts = list(filter(None, random_texts(2000)))
    (tmp_path / "texts.json").write_text(json.dumps(texts))
    said = subprocess.run(
        [python, "-c", TOKENS, str(file), str(tmp_path / "texts.json")], capture_output=True, check=True
    )
    tokenizer = build_tokenizer(read_header(file))
    for text, token_ids in zip(texts, json.loads(said.stdout), strict=True):
        assert tokenizer.encode(text, add_special_tokens=False).ids == token_ids, text


def test_greedy_text_is_llama_cpps_own(llama: Client, folder: Path) -> None:
    expected = reference_text(folder, NUM_TOKENS)
    assert text_of(llama, submit(llama, MODEL, FREE, NUM_TOKENS)) == expected


@pytest.mark.parametrize("params", [FREE, UNDER_A_SCHEMA], ids=["free", "under a schema"])
def test_an_engine_killed_three_times_in_mid_stream_changes_nothing(
    llama: Client, llama_system: System, params: dict[str, Any]
) -> None:
    text = text_through_kills(llama, llama_system, MODEL, params)
    if params is UNDER_A_SCHEMA:
        assert len(json.loads(text)) == WORDS["minItems"]


def test_gemma_says_what_it_says_in_llama_cpp(store: ModelStore) -> None:
    folder = store.path(GEMMA)
    if not any(folder.glob("*.gguf")) or any(folder.glob("*.safetensors")):
        pytest.skip(f"{GEMMA} was not pulled for llama.cpp into {store.folder}")
    expected = reference_text(folder, NUM_TOKENS)
    for system in running(GEMMA, folder):
        with Client(system.plant.api_urls[0]) as client:
            assert text_of(client, submit(client, GEMMA, FREE, NUM_TOKENS)) == expected
