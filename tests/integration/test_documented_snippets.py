"""What README.md and docs/*.md tell people to type is typed: shell and Python, against one running system."""

import json
import os
import shutil
import socketserver
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from celery import Celery
from click.testing import CliRunner

from celeriac import cli
from celeriac.client import Client
from settings import ROOT, get_settings
from storage.database import migrate
from tests.chaos.plant import Plant, start_prepared
from tests.documents import Snippet, commands_of, snippets

pytestmark = pytest.mark.slow

URL = "http://127.0.0.1:8000"  # where the documents have the API
FAILING_SEED = 13
MODELS = (
    (ROOT / "models.toml").read_text().replace('"models/', f'"{ROOT}/models/')
    + f"""
[[models]]
id = "failing"
path = "fake"
backend = "fake"
max_model_len = 4096

[models.fake]
fail_at_token = 1
fail_seed = {FAILING_SEED}
"""
)
#: Command lines that begin like this stay untyped, and why.
UNTYPED = {
    "make ": "sets up a checkout; the tests run in one",
    "CELERIAC_WORKER_METRICS_PORT=9101": "the same, with ports",
    "prometheus ": "stays; tests/unit/test_alerts.py reads its configuration",
    "curl -s http://127.0.0.1:9090": "asks the Prometheus of the line before",
    "export PROMETHEUS_URL=": "only sets variables; tests/integration/test_compose.py compares them",
    "grafana server": "needs Grafana",
    ".venv/bin/celeriac up": "tests/integration/test_up.py starts it",
    "celeriac up": "tests/integration/test_up.py starts it",
    ".venv/bin/celeriac worker": "needs as many models as it names; tests/integration/test_several_models.py starts it",
    "celeriac engines install": "compiles or fetches for minutes; make test-engines",
    "celeriac models pull smollm2": "fetches a hundred megabytes; tests/real_models",
    ".venv/bin/celeriac models pull": "the same",
    "pip install": "fetches packages; tests/unit/test_client_package.py builds them",
    "export OTEL_": "only sets a variable; tests/integration/test_traces.py",
    "docker build": "needs Docker",
    "kubectl": "needs a cluster; tests/unit/test_kubernetes.py reads the manifests",
    "pg_": "restores into an empty database; tests/integration/test_backup.py",
    "celeriac migrate": "belongs to the restore",
    "CELERIAC_CALLBACK_": "settings, not commands; tests/integration/test_celery.py",
}
#: What makes an exit code other than 0 an answer.
ANSWERS = {"celeriac doctor": " || test $? -le 2"}
#: Snippets that are not run here: page, how they begin, and where they are tried or why they are not.
ELSEWHERE = {
    ("README.md", "Once upon a time"): "what celeriac up prints; tests/integration/test_up.py",
    ("README.md", "id: 4"): "an event; tests/integration/test_api_events.py",
    ("README.md", "flowchart"): "a drawing",
    ("README.md", "celeriac/ "): "the tree; tests/unit/test_house.py",
    ("architecture.md", "   main "): "a drawing",
    ("architecture.md", "   celeriac "): "the rooms; tests/unit/test_house.py",
    ("celery.md", "from celeriac.celery import generate"): "needs the reader's tasks; tests/integration/test_celery.py",
    ("job_lifecycle.md", "stateDiagram"): "a drawing",
    ("kubernetes.md", "- source_labels"): "a part of a Prometheus that is the reader's",
    ("limits.md", "HTTP/1.1 429"): "an answer; tests/integration/test_limits.py",
    ("limits.md", '{"object": "limits"'): "an answer; tests/integration/test_limits.py",
    ("metrics.md", "triggers:"): "a part of a KEDA that is the reader's",
    ("operations.md", "location /celeriac/"): "needs nginx; python -m tests.chaos.rolling_upgrade --front nginx",
    ("operations.md", "example.com {"): "needs Caddy; python -m tests.chaos.rolling_upgrade --front caddy",
    ("operations.md", "upstream celeriac"): "needs nginx; python -m tests.chaos.rolling_upgrade --front nginx",
    ("operations.md", "ACL SETUSER"): "tests/integration/test_redis_acl.py",
    ("operations.md", "aws s3 cp"): "needs a bucket with objects; tests/integration/test_archive.py has one",
    ("recipes.md", "export function follow"): "tests/conformance/node_web/browser.mjs",
    ("recipes.md", "import json"): "tests/integration/test_recipes.py",
    ("recipes.md", "model_list:"): "tests/conformance/programs/litellm_client.py",
    ("recipes.md", "from typing"): "tests/conformance/programs/langgraph_client.py",
    ("streams.md", '{"object": "stream_token"'): "an answer; tests/integration/test_stream_tokens.py",
    ("streams.md", "new EventSource"): "needs a browser; tests/conformance/node_web/browser.mjs",
    ("streams.md", "import { stream }"): "needs a package of npm; tests/conformance/node_web",
    ("upgrades.md", "from alembic"): "has a test of its own below",
    ("usage.md", '{"object": "usage"'): "an answer; tests/integration/test_api_usage.py",
    ("webhooks.md", "POST /hook"): "a delivery; tests/integration/test_webhooks.py",
    ("webhooks.md", "event = openai"): "tests/unit/test_webhook_snippets.py",
    ("webhooks.md", "import base64"): "tests/unit/test_webhook_snippets.py",
    ("webhooks.md", "const { createHmac"): "tests/unit/test_webhook_snippets.py",
    ("webhooks.md", "key=$(printf"): "tests/unit/test_webhook_snippets.py",
}
#: What is run: shell, sessions and Python here, SQL here, TOML in tests/unit/test_documented_commands.py.
RUN = {"sh", "", "python", "sql", "toml"}


@pytest.fixture(scope="module")
def plant() -> Iterator[Plant]:
    folder = Path(tempfile.mkdtemp(prefix="celeriac-documents-"))
    workers = {"gpu-1": "celeriac-mini", "gpu-2": "failing"}
    settings = {"webhook_private_targets": True}
    with Plant(folder, models=MODELS, worker_models=workers, settings=settings, start=start_prepared) as plant:
        plant.start_servers()
        plant.start_parts()
        plant.wait_until_ready()
        yield plant
    shutil.rmtree(folder, ignore_errors=True)


#: The command of a reader's shell: it has this process run it, which has imported everything.
COMMAND = """#!{python} -IS
import json, socket, sys
with socket.socket(socket.AF_UNIX) as asked:
    asked.connect("{path}")
    stream = asked.makefile("rw")
    print(json.dumps(sys.argv[1:]), file=stream, flush=True)
    code, output, errors = json.loads(stream.readline())
sys.stdout.write(output)
sys.stderr.write(errors)
sys.exit(code)
"""


class CommandServer(socketserver.UnixStreamServer):
    """Runs one command after another; questions whether to go on are answered with yes."""

    def __init__(self, path: Path) -> None:
        super().__init__(str(path), self.Request)

    class Request(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            outcome = CliRunner().invoke(cli.main, json.loads(self.rfile.readline()), input="y\n")
            answer = [outcome.exit_code, outcome.stdout, outcome.stderr]
            self.wfile.write(json.dumps(answer).encode() + b"\n")


@pytest.fixture(scope="module")
def surroundings(plant: Plant) -> Iterator[dict[str, str]]:
    """The environment of a reader's shell, with the command on its path and a curl that fails where the API refuses."""
    folder = plant.folder / "reader"
    command = folder / ".venv" / "bin" / "celeriac"
    command.parent.mkdir(parents=True)
    command.write_text(COMMAND.format(python=sys.executable, path=folder / "commands"))
    command.chmod(0o755)
    (folder / ".curlrc").write_text("fail-with-body\nmax-time = 120\n")
    settings = {
        "CELERIAC_API_URL": plant.api_urls[0],
        "CELERIAC_DATABASE_URL": plant.postgres.url,
        "CELERIAC_REDIS_URL": plant.redis.url,
        "CELERIAC_MODELS_FILE": str(plant.folder / "models.toml"),
        "CELERIAC_DATA_DIR": str(plant.folder / "data"),
    }
    others = {name: value for name, value in os.environ.items() if not name.startswith("CELERIAC_")}
    path = f"{command.parent}:{os.environ['PATH']}"
    with pytest.MonkeyPatch.context() as patch, CommandServer(folder / "commands") as server:
        for name, value in settings.items():
            patch.setenv(name, value)
        patch.chdir(folder)  # where a reader's shell is
        get_settings.cache_clear()
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield others | settings | {"HOME": str(folder), "PATH": path, "URL": plant.api_urls[0]}
        server.shutdown()
        thread.join()
    get_settings.cache_clear()


@pytest.fixture(scope="module")
def ids(plant: Plant, surroundings: dict[str, str]) -> Callable[[str], str]:
    """Puts ids of things that are there, and the API's address, in the place of those in a snippet."""
    with Client(plant.api_urls[0]) as client:
        job_id = client.submit("Once upon a time", max_tokens=20).id
        assert client.wait(job_id).status == "completed"
        failing = client.submit("Once", model="failing", seed=FAILING_SEED)
        assert client.wait(failing.id).status == "failed"
    key = new_key("--admin", surroundings)
    surroundings |= {"ID": job_id, "KEY": key, "ADMIN_KEY": key}

    def put(text: str) -> str:
        for told, options in (("<id>", "--name reader"), ("7fZkQ2", "--tenant research")):
            if told in text:
                text = text.replace(told, new_key(options, surroundings).split("_")[1])
        return text.replace("job_01...", job_id).replace(URL, plant.api_urls[0]).replace("you.example", "localhost")

    return put


def new_key(options: str, surroundings: dict[str, str]) -> str:
    return typed(f"celeriac keys create {options}", surroundings).stdout.strip()


def typed(command: str, surroundings: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-exo", "pipefail", "-c", command],
        env=surroundings,
        cwd=surroundings["HOME"],
        capture_output=True,
        text=True,
        check=False,
    )


def is_at(place: tuple[str, str], snippet: Snippet) -> bool:
    page, beginning = place
    return snippet.page == page and snippet.text.startswith(beginning)


def is_elsewhere(snippet: Snippet) -> bool:
    return any(is_at(place, snippet) for place in ELSEWHERE)


def to_type(snippet: Snippet) -> str:
    """The command lines of a snippet that are typed."""
    commands = [line for line in commands_of(snippet) if not line.startswith(tuple(UNTYPED))]
    return "\n".join(line + ANSWERS.get(line, "") for line in commands)


@pytest.mark.skipif(not all(map(shutil.which, ("curl", "jq"))), reason="there is no curl or no jq")
def test_every_command_line_works(surroundings: dict[str, str], ids: Callable[[str], str]) -> None:
    wrong = []
    for snippet in snippets("sh", ""):
        if not is_elsewhere(snippet):
            outcome = typed(ids(to_type(snippet)), surroundings)
            if outcome.returncode != 0:
                wrong.append(f"{snippet.page}: exit code {outcome.returncode}: {outcome.stdout}{outcome.stderr}")
    assert not wrong, "\n".join(wrong)


def names_around(snippet: Snippet, plant: Plant, client: Client) -> dict[str, Any]:
    """What the text around a snippet of Python, or one before it, has introduced."""
    if snippet.page == "celery.md":
        return {"__name__": "reader", "app": Celery("reader"), "model": str.upper}
    return {"client": client, "prompts": ["Once", "Twice"]}


def test_every_program_runs(plant: Plant, ids: Callable[[str], str], tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    body = {"model": "celeriac-mini", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}
    line = {"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": body}
    (tmp_path / "requests.jsonl").write_text(json.dumps(line))
    with Client(plant.api_urls[0]) as client:
        for snippet in snippets("python"):
            if not is_elsewhere(snippet):
                code = compile(ids(snippet.text), snippet.page, "exec")
                exec(code, names_around(snippet, plant, client))


def test_a_downgrade_is_done_as_documented(empty_database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    [snippet] = [snippet for snippet in snippets("python") if snippet.page == "upgrades.md"]
    migrate(empty_database_url)
    monkeypatch.setenv("CELERIAC_DATABASE_URL", f"{empty_database_url}&pool_mode=transaction")
    with psycopg.connect(empty_database_url) as connection:
        [newest] = connection.execute("SELECT version_num FROM alembic_version").fetchone() or []
        exec(compile(snippet.text, snippet.page, "exec"), {})
        [left] = connection.execute("SELECT version_num FROM alembic_version").fetchone() or []
    assert int(left) == int(newest) - 1


def test_a_role_and_its_database_are_made_as_documented(postgres_administrator: psycopg.Connection[Any]) -> None:
    [snippet] = snippets("sql")
    own = snippet.text.replace("celeriac", "documented")
    for statement in own.strip().splitlines():
        postgres_administrator.execute(statement.encode())
    postgres_administrator.execute("DROP DATABASE documented")
    postgres_administrator.execute("DROP ROLE documented")


def test_what_is_not_run_is_listed_and_still_there() -> None:
    unseen = [snippet for snippet in snippets() if not is_elsewhere(snippet)]
    unseen = [one for one in unseen if one.language not in RUN or not (one.language or commands_of(one))]
    assert unseen == [], "have this file run these snippets, or say in ELSEWHERE where they are tried"
    gone = [place for place in ELSEWHERE if not any(is_at(place, snippet) for snippet in snippets())]
    lines = [line for snippet in snippets("sh", "") for line in commands_of(snippet)]
    unused = [beginning for beginning in UNTYPED if not any(line.startswith(beginning) for line in lines)]
    assert (gone, unused) == ([], [])
