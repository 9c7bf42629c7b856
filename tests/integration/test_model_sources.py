"""Models are pulled from servers: one that speaks the Hub's URLs to its own client, and moto's S3."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest

from celeriac.store.files import ModelRefused
from celeriac.store.sources import BucketSource, FolderSource
from celeriac.store.store import Manifest, ModelStore, Wanted
from settings import ROOT
from tests.integration.conftest import BUCKET
from tests.unit.test_model_store import Heard, write_published
from tests.waiting import SECONDS

pytestmark = pytest.mark.slow

COMMIT = "12fd25f77366fa6b3b4b768ec3050bf629380bac"


class Hub(ThreadingHTTPServer):
    """As much of the Hub as its client asks for: what a revision holds, and its files by commit."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), HubRequest)
        self.content = {file.name: file.read_bytes() for file in folder.iterdir()}
        self.requests: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class HubRequest(BaseHTTPRequestHandler):
    """One connection."""

    server: Hub

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, format: str, *arguments: object) -> None:
        pass

    def _answer(self) -> None:
        self.server.requests.append(f"{self.command} {self.path}")
        path = self.path.partition("?")[0]
        if path in ("/api/models/org/tiny/revision/main", f"/api/models/org/tiny/revision/{COMMIT}"):
            self._send(json.dumps(self._information()).encode())
        elif path.startswith(f"/org/tiny/resolve/{COMMIT}/"):
            name = path.rpartition("/")[2]
            self._send(self.server.content[name])
        else:
            code = "RevisionNotFound" if path.startswith("/api/models/org/tiny/") else "RepoNotFound"
            self.send_response(404)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

    def _information(self) -> dict[str, object]:
        files: list[dict[str, object]] = []
        for name, data in self.server.content.items():
            files.append({"rfilename": name, "size": len(data)})
            if name.endswith(".safetensors"):
                files[-1]["lfs"] = {"size": len(data), "sha256": sha256(data).hexdigest(), "pointerSize": 134}
        return {"_id": "1", "id": "org/tiny", "modelId": "org/tiny", "sha": COMMIT, "siblings": files, "tags": []}

    def _send(self, data: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", f'"{sha256(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    with Hub(write_published(tmp_path / "published")) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def pull(source: str, folder: Path, hub: Hub) -> "subprocess.CompletedProcess[str]":
    """The command as a process, since the Hub's client reads its variables once."""
    variables = {"HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "hf"), "CELERIAC_DATA_DIR": str(folder / "data")}
    command = [sys.executable, "-m", "celeriac", "models", "pull", source]
    return subprocess.run(
        command, cwd=ROOT, env=os.environ | variables, capture_output=True, text=True, check=False, timeout=300
    )


def test_a_repository_is_pulled_at_the_commit_that_its_revision_names(hub: Hub, tmp_path: Path) -> None:
    done = pull("hf:org/tiny@main", tmp_path, hub)
    assert done.returncode == 0, done.stderr
    manifest = Manifest.model_validate_json((tmp_path / "data/models/tiny/manifest.json").read_bytes())
    assert manifest.source == f"hf:org/tiny@{COMMIT}"
    hash_by_path = {file.path: file.sha256 for file in manifest.files}
    assert hash_by_path == {name: sha256(data).hexdigest() for name, data in hub.content.items()}
    assert {path.name for path in (tmp_path / "data/models/tiny").iterdir()} == {
        *hub.content,
        "manifest.json",
        "models.toml",
    }
    fetched = [request for request in hub.requests if "/resolve/" in request]
    assert all(f"/resolve/{COMMIT}/" in request for request in fetched)
    assert "MB/s" in done.stderr


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("hf:org/other", "the hub has no such model: hf:org/other"),
        ("hf:org/tiny@nowhere", "the hub has no such revision: hf:org/tiny@nowhere"),
    ],
)
def test_what_the_hub_does_not_have_is_said_in_one_line(hub: Hub, tmp_path: Path, source: str, says: str) -> None:
    done = pull(source, tmp_path, hub)
    assert done.returncode == 1
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_other_weights_than_the_hub_announces_are_refused(hub: Hub, tmp_path: Path) -> None:
    """As from a mirror that holds something else under the same name and of the same size."""
    information = HubRequest._information

    def announced(self: HubRequest) -> dict[str, object]:
        told = json.dumps(information(self))
        return json.loads(told.replace(sha256(self.server.content["model.safetensors"]).hexdigest(), "0" * 64))  # type: ignore[no-any-return]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HubRequest, "_information", announced)
        done = pull("hf:org/tiny@main", tmp_path, hub)
    assert done.returncode == 1
    assert "is not what was published" in done.stderr
    assert not (tmp_path / "data/models/tiny").exists()


def test_a_prefix_of_a_bucket_is_pulled(bucket: str, tmp_path: Path) -> None:
    published = write_published(tmp_path / "published")
    for file in published.iterdir():
        httpx.put(
            f"{bucket}/{BUCKET}/some/tiny/{file.name}", content=file.read_bytes(), timeout=SECONDS
        ).raise_for_status()
    httpx.put(f"{bucket}/{BUCKET}/some/tinyother/config.json", content=b"{}", timeout=SECONDS).raise_for_status()
    store, heard = ModelStore(tmp_path / "store"), Heard()
    store.pull(Wanted("tiny", BucketSource(f"s3://{BUCKET}/some/tiny/")), heard)
    manifest = store.manifest("tiny")
    assert {file.path: file.sha256 for file in manifest.files} == {
        file.name: sha256(file.read_bytes()).hexdigest() for file in published.iterdir()
    }
    assert heard.num_bytes == manifest.num_bytes
    assert store.problems("tiny", heard) == []


def test_a_bucket_or_a_prefix_that_is_not_there_is_named(bucket: str, tmp_path: Path) -> None:
    store = ModelStore(tmp_path / "store")
    for url in ("s3://nosuchbucket/x", f"s3://{BUCKET}/nothing"):
        with pytest.raises(ModelRefused, match=f"{url} could not be fetched"):
            store.pull(Wanted("tiny", BucketSource(url)), Heard())
    assert store.manifests() == []


def test_a_gguf_file_that_cannot_be_read_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "q4.gguf").write_bytes(b"GGUF" + bytes(100))
    store = ModelStore(tmp_path / "store")
    with pytest.raises(ModelRefused, match=r"q4.gguf: it could not be converted to safetensors: \w+Error: "):
        store.pull(Wanted("q4", FolderSource(str(tmp_path / "q4.gguf"))), Heard())
    assert store.manifests() == []
