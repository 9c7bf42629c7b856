"""Clients of other makers, versions and languages, unmodified, each a program of its own that asserts for itself.

openai-python 1.x lies in .venv/openai-1 (`make test` puts it there), LangChain and LiteLLM in .venv/clients (`make
conformance`), openai-node is installed here where there is a node. What is not there is skipped, and CI tells that.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.orm import Session, sessionmaker

from domain.catalog import Catalog, ModelSpec
from domain.jobs import JobStatus, external_id
from gpu_worker import intake
from maintenance.batches import BatchWork
from settings import ROOT, Settings
from storage import job_queries, jobs, tenants
from storage.tables import DEFAULT_TENANT_ID, Job
from tests.integration.api_harness import ApiServer, HandWorker, make_chunk
from tests.integration.runner_harness import MODEL, RecordingRunner, Rig
from tests.integration.test_recipes import serving
from tests.recipes import program
from tests.webhook_receiver import sending
from text.models import ModelViews

OPENAI_1 = ROOT / ".venv" / "openai-1"
CLIENTS = ROOT / ".venv" / "clients"
NODE_FOLDER = ROOT / "tests" / "conformance" / "node"
BY_HAND = ModelSpec(id="by-hand", path="fake", backend="fake", max_model_len=4096)
CALL = ('<tool_call>\n{"name": "ad', 'd", "arguments": {"a"', ": 1}}\n</tool_call>")
PROGRAM_SECONDS = 500  # for one that hangs; pytest gives up after 600
PAUSE_SECONDS = 0.05  # between two looks for work, which would take the clients' CPU time

Environment = dict[str, str]


@pytest.fixture
def environment(rig: Rig, hand_worker: HandWorker, monkeypatch: pytest.MonkeyPatch) -> Iterator[Environment]:
    """Where the SDKs find a running system that wants a key: one model's jobs run, the other's call a tool."""
    monkeypatch.setattr(intake, "POLL_SECONDS", 0.01)
    catalog = Catalog([*Catalog.load(rig.settings.models_file), BY_HAND])
    changes: dict[str, Any] = {"auth": "api_key", "disconnect_grace_seconds": 5.0, "webhook_private_targets": True}
    changes["no_workers_seconds"] = 3600.0  # nobody reports for BY_HAND, and some clients take a minute to load
    settings = rig.settings.model_copy(update=changes)
    with rig.sessions.begin() as session:
        key = tenants.create_key(session, DEFAULT_TENANT_ID)
    runner = rig.start()
    with (
        ApiServer(settings, catalog) as server,
        sending(settings),
        again_and_again(lambda: call_tools(hand_worker)),
        running_batches(rig, runner, settings, catalog),
    ):
        yield {
            **{name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ},
            "OPENAI_BASE_URL": f"{server.url}/v1",
            "OPENAI_API_KEY": key,
            "CELERIAC_API_URL": server.url,
            "CELERIAC_API_KEY": key,
        }


@contextmanager
def again_and_again(work: Callable[[], None]) -> Iterator[None]:
    """In a thread, until the block is left."""
    is_over = threading.Event()

    def run() -> None:
        while not is_over.wait(PAUSE_SECONDS):
            work()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


def call_tools(worker: HandWorker) -> None:
    """Works off the jobs of BY_HAND: each says one tool call, in pieces."""
    for one in waiting_jobs(worker.sessions, BY_HAND.id):
        job = worker.claim(external_id(one.id))
        for number, text in enumerate(CALL, start=1):
            last: dict[str, Any] = {"finish_reason": "stop"} if number == len(CALL) else {}
            worker.commit(job, make_chunk(number, text, **last))
        worker.finish(job, *CALL)


@contextmanager
def running_batches(rig: Rig, runner: RecordingRunner, settings: Settings, catalog: Catalog) -> Iterator[None]:
    """What maintenance and the dispatcher do: lines become jobs, and jobs are offered to the worker."""
    views = ModelViews(catalog)
    work = BatchWork(rig.sessions, views, settings)

    def step() -> None:
        work.tick()
        with rig.sessions.begin() as session:
            jobs.let_lines_in(session, MODEL, limit=100)
        runner.offer([job.id for job in waiting_jobs(rig.sessions, MODEL)])

    try:
        with again_and_again(step):
            yield
    finally:
        work.close()


def waiting_jobs(sessions: sessionmaker[Session], model: str) -> list[Job]:
    with sessions() as session:
        return job_queries.list_jobs(session, DEFAULT_TENANT_ID, status=JobStatus.QUEUED, model=model, limit=100)


def report_of(command: list[str], environment: Environment, *, at_least: int) -> dict[str, Any]:
    """Run a client program; all its cases must have gone well."""
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PROGRAM_SECONDS, check=False
        )
    except subprocess.TimeoutExpired as exc:
        pytest.fail(f"it did not end within {PROGRAM_SECONDS} s: {(exc.stderr or b'').decode()[-2000:]}")
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    bad = {name: fate for name, fate in report["cases"].items() if fate != "ok"}
    assert not bad, "\n".join(f"{name}: {fate}" for name, fate in bad.items())
    assert len(report["cases"]) >= at_least
    return report


def skip_or_fail(reason: str) -> None:
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


def test_openai_python_1(environment: Environment) -> None:
    if not OPENAI_1.exists():
        skip_or_fail("openai 1.x is not in .venv/openai-1; `make test` puts it there")
    command = [sys.executable, "-m", "tests.conformance.programs.openai_python"]
    report = report_of(command, environment | {"PYTHONPATH": str(OPENAI_1)}, at_least=18)
    assert report["version"].startswith("1.")


def test_openai_python_as_it_is_today(environment: Environment) -> None:
    report = report_of([sys.executable, "-m", "tests.conformance.programs.openai_python"], environment, at_least=18)
    assert not report["version"].startswith("1.")


@pytest.fixture(scope="module")
def node_folder() -> Path:
    """A folder with the pinned openai-node and the program; installed once for each lock file."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("there is no node or npm on this machine")
    lock = (NODE_FOLDER / "package-lock.json").read_bytes()
    folder = ROOT / ".venv" / f"node-{hashlib.sha256(lock).hexdigest()[:12]}"
    if not (folder / "installed").exists():
        shutil.copytree(NODE_FOLDER, folder, dirs_exist_ok=True)
        command = ["npm", "ci", "--no-audit", "--no-fund", "--silent"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=500, check=False)
        if done.returncode != 0:
            skip_or_fail(f"npm could not install openai-node: {done.stderr[-500:]}")
        (folder / "installed").touch()
    shutil.copy(NODE_FOLDER / "client.mjs", folder)
    return folder


def test_openai_node(environment: Environment, node_folder: Path) -> None:
    report_of(["node", str(node_folder / "client.mjs")], environment, at_least=17)


@pytest.mark.parametrize(
    ("client", "num_cases"),
    [
        ("langchain", 4),
        ("litellm", 9),
        ("agents", 4),
        ("pydantic_ai", 3),
        ("instructor", 1),
        ("langgraph", 2),
        ("llm", 3),
        ("llm_comply", 3),
    ],
)
def test_frameworks(client: str, num_cases: int, environment: Environment) -> None:
    python = CLIENTS / "bin" / "python"
    if not python.exists():
        pytest.skip(f"{client} is not in .venv/clients; `make conformance` puts it there")
    quiet = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LANGSMITH_TRACING": "false"}
    report_of(
        [str(python), "-m", f"tests.conformance.programs.{client}_client"], environment | quiet, at_least=num_cases
    )


@pytest.fixture(scope="module")
def web_folder() -> Path:
    """Where `make conformance` installed the SDKs for TypeScript, with the programs and the recipe that they run."""
    folder = ROOT / ".venv" / "web-clients"
    if not (folder / ".ready").exists():
        pytest.skip("the SDKs for TypeScript are not in .venv/web-clients; `make conformance` puts them there")
    for path in (NODE_FOLDER.parent / "node_web").glob("*.mjs"):
        shutil.copy(path, folder)
    (folder / "recipe.mjs").write_text(program("A page with `EventSource`", "js"))
    return folder


@pytest.mark.parametrize(("name", "num_cases"), [("sdks", 14), ("browser", 6)])
def test_typescript(name: str, num_cases: int, environment: Environment, web_folder: Path) -> None:
    report_of(["node", str(web_folder / f"{name}.mjs")], environment, at_least=num_cases)


def test_use_chat(environment: Environment, web_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CELERIAC_API_URL", environment["OPENAI_BASE_URL"].removesuffix("/v1"))
    monkeypatch.setenv("CELERIAC_API_KEY", environment["OPENAI_API_KEY"])
    names: dict[str, Any] = {"__name__": "recipe"}
    exec(program("Vercel AI SDK: `useChat` with resume", "python"), names)
    with serving(names["app"]) as url:
        report_of(["node", str(web_folder / "use_chat.mjs")], environment | {"CHAT_URL": url}, at_least=4)
