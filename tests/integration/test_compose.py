"""docker-compose.yml without containers: every service's own command runs as a process, with the environment that the
file gives it, and its own health check judges it. Only host names and ports are replaced by those of this machine.
"""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest
import yaml

from local.processes import free_port
from local.servers import EmbeddedPostgres, postgres_programs
from storage.database import migrate
from storage.row_security import GAP
from tests.waiting import wait_until

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
COMPOSE = ROOT / "docker-compose.yml"
KEY = "sk_admin_" + "k" * 32
SECRETS = {
    "POSTGRES_PASSWORD": "postgres-secret",
    "REDIS_PASSWORD": "redis-secret",
    "CELERIAC_BOOTSTRAP_API_KEY": KEY,
    "FLOWER_BASIC_AUTH": "admin:flower-secret",
}

PORTS = ("8000", "5555", "8001", "9101")  # of the containers


class MissingVariable(Exception):
    """A variable that the compose file demands (`${NAME:?why}`) is not set."""


def interpolated(text: str, environment: dict[str, str]) -> str:
    """The text as Compose reads it: ${NAME}, ${NAME:-default}, ${NAME:?message}; $$ is a dollar sign."""

    def value_of(match: re.Match[str]) -> str:
        if match[0] == "$$":
            return "$"
        name, operator, argument = match["name"], match["operator"], match["argument"]
        if environment.get(name):
            return environment[name]
        if operator == ":?":
            raise MissingVariable(name)
        return argument or ""

    return re.sub(r"\$\$|\$\{(?P<name>\w+)(?:(?P<operator>:[-?])(?P<argument>[^}]*))?\}", value_of, text)


def load_services(environment: dict[str, str]) -> dict[str, Any]:
    def resolved(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: resolved(item) for name, item in value.items()}
        if isinstance(value, list):
            return [resolved(item) for item in value]
        return interpolated(value, environment) if isinstance(value, str) else value

    services: dict[str, Any] = resolved(yaml.safe_load(COMPOSE.read_text())["services"])
    return services


#: Variables without a value in the file are those of whoever runs it.
PASSED_ON = {"flower": {"FLOWER_URL_PREFIX": "flower"}, "api": {"CELERIAC_ROOT_PATH": "/celeriac"}}


@dataclass
class Stack:
    """The services as processes."""

    folder: Path
    database_url: str
    services: dict[str, Any] = field(default_factory=lambda: load_services(SECRETS))
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.redis_port = free_port("127.0.0.1", 0)
        self.port_by_port = {port: free_port("127.0.0.1", 0) for port in PORTS}

    @property
    def api_port(self) -> int:
        return self.port_by_port["8000"]

    @property
    def flower_port(self) -> int:
        return self.port_by_port["5555"]

    def here(self, text: str) -> str:
        """Hosts and ports of the containers, put in the place of this machine's."""
        text = text.replace("postgresql://celeriac:postgres-secret@postgres:5432/celeriac", self.database_url)
        text = text.replace("@redis:6379", f"@127.0.0.1:{self.redis_port}")
        text = text.replace("redis-cli ", f"redis-cli -p {self.redis_port} ")
        return re.sub(rf"\b({'|'.join(PORTS)})\b", lambda match: str(self.port_by_port[match[0]]), text)

    def environment(self, name: str) -> dict[str, str]:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("CELERIAC_")}
        named = self.services[name].get("environment", {}) | PASSED_ON.get(name, {})
        given = {name: self.here(str(value)) for name, value in named.items() if value is not None}
        path = os.pathsep.join([str(Path(sys.executable).parent), inherited["PATH"]])
        return inherited | {"PATH": path, "CELERIAC_DATA_DIR": str(self.folder)} | given

    def command(self, name: str) -> list[str]:
        command = self.services[name]["command"]
        return [self.here(word) for word in (shlex.split(command) if isinstance(command, str) else command)]

    def start(self, name: str, *extra: str) -> subprocess.Popen[bytes]:
        with (self.folder / f"{name}.log").open("wb") as log:
            self.processes[name] = subprocess.Popen(
                [*self.command(name), *extra],
                cwd=ROOT,
                env=self.environment(name),
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        return self.processes[name]

    def is_healthy(self, name: str) -> bool:
        """What the service's own health check says."""
        kind, *words = self.services[name]["healthcheck"]["test"]
        command = ["sh", "-c", self.here(words[0])] if kind == "CMD-SHELL" else [self.here(word) for word in words]
        environment = self.environment(name)
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=False).returncode == 0

    def wait_until_healthy(self, name: str) -> None:
        def is_healthy() -> bool:
            process = self.processes[name]
            log = (self.folder / f"{name}.log").read_text()[-3000:]
            assert process.poll() is None, f"{name} ended with {process.returncode}:\n{log}"
            return self.is_healthy(name)

        wait_until(is_healthy, f"{name} is healthy", pause_seconds=0.2)

    def stop(self, name: str) -> int:
        """As `docker stop`: SIGTERM, and the service's grace period. Returns the exit code."""
        process = self.processes[name]
        process.send_signal(signal.SIGTERM)
        grace_period = self.services[name].get("stop_grace_period", "10s")
        return process.wait(float(grace_period.removesuffix("s")))

    def kill_all(self) -> None:
        for process in self.processes.values():
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


@pytest.fixture
def stack(tmp_path: Path, empty_database_url: str) -> Iterator[Stack]:
    stack = Stack(tmp_path, empty_database_url)
    yield stack
    stack.kill_all()


def test_celeriacs_role_is_no_superuser_and_may_make_grafanas(stack: Stack, server_folder: Path) -> None:
    environment = stack.environment("postgres") | {"PGPASSWORD": SECRETS["POSTGRES_PASSWORD"]}
    [script] = [volume.split(":")[0] for volume in stack.services["postgres"]["volumes"] if "initdb.d" in volume]
    with EmbeddedPostgres(server_folder / "of-compose") as server:
        with psycopg.connect(server.url_of("postgres"), autocommit=True) as connection:
            connection.execute("DROP DATABASE celeriac")
            connection.execute("DROP ROLE celeriac")
        environment["PGHOST"] = server.url.partition("host=")[2]
        environment["PATH"] = os.pathsep.join([str(postgres_programs()), environment["PATH"]])
        subprocess.run([ROOT / script], env=environment, check=True)
        migrate(server.url)
        reader = [
            "--username=celeriac",
            "--set=ON_ERROR_STOP=1",
            "--set=password=p",
            "--file=deploy/grafana/reader.sql",
        ]
        for _ in range(2):  # it is safe to repeat
            subprocess.run(["psql", "--quiet", *reader], env=environment, cwd=ROOT, check=True)
        with psycopg.connect(server.url) as connection:
            assert connection.execute(GAP).fetchone() == (None,)
            assert connection.execute("SELECT pg_has_role('pg_monitor', 'USAGE')").fetchone() == (True,)
            reader_url = server.url.replace("celeriac@", "celeriac_grafana@")
            with psycopg.connect(reader_url) as other:  # as health and doctor advise where it holds a lock
                ended = connection.execute("SELECT pg_terminate_backend(%s)", [other.info.backend_pid]).fetchone()
                assert ended == (True,)


def test_every_service_runs_by_its_own_command_and_health_check(stack: Stack) -> None:
    stack.start("redis", "--port", str(stack.redis_port), "--dir", str(stack.folder))
    stack.wait_until_healthy("redis")
    assert stack.start("migrate").wait() == 0, (stack.folder / "migrate.log").read_text()

    names = ("cpu-worker", "api", "maintenance", "flower")
    for name in names:
        stack.start(name)
    for name in names:
        stack.wait_until_healthy(name)

    url = f"http://127.0.0.1:{stack.api_port}/v1/jobs"
    body = {"model": "celeriac-mini", "prompt": "Once upon a time", "params": {"max_tokens": 8}}
    assert httpx.post(url, json=body, timeout=30).status_code == 401
    headers = {"authorization": f"Bearer {KEY}", "prefer": "wait=60"}
    job = httpx.post(url, json=body, headers=headers, timeout=70).json()
    assert job["status"] == "completed", job
    assert job["usage"]["completion_tokens"] > 0

    flower = f"http://127.0.0.1:{stack.flower_port}/flower/workers"
    assert httpx.get(flower, timeout=30).status_code == 401
    assert httpx.get(flower, auth=("admin", "flower-secret"), timeout=30).status_code == 200

    for name in reversed(names):
        # uvicorn ends in good order and then by the signal that asked for it.
        assert stack.stop(name) in (0, -signal.SIGTERM), (stack.folder / f"{name}.log").read_text()[-2000:]


def test_a_secret_that_is_not_set_is_asked_for_by_name() -> None:
    for name in SECRETS:
        with pytest.raises(MissingVariable, match=name):
            load_services({other: value for other, value in SECRETS.items() if other != name})


def test_no_secret_has_a_default_or_stands_in_the_file() -> None:
    text = COMPOSE.read_text()
    for name in SECRETS:
        assert re.search(rf"\${{{name}(?!:\?|\w)", text) is None, f"{name} is used without being demanded"
    assert load_services(SECRETS)["api"]["environment"]["CELERIAC_AUTH"] == "api_key"


def test_flower_is_published_on_this_machine_only() -> None:
    assert load_services(SECRETS)["flower"]["ports"] == ["127.0.0.1:5555:5555"]


def test_a_worker_gets_more_time_to_stop_than_its_drain_takes() -> None:
    from api.server import GRACE_SECONDS
    from settings import Settings

    grace = load_services(SECRETS)["cpu-worker"]["stop_grace_period"]
    assert float(grace.removesuffix("s")) > Settings.model_fields["drain_seconds"].default + 15
    grace = load_services(SECRETS)["api"]["stop_grace_period"]
    assert float(grace.removesuffix("s")) > Settings.model_fields["api_drain_seconds"].default + GRACE_SECONDS


def test_each_gpu_has_one_worker_that_differs_from_the_others_by_its_device_and_model_alone() -> None:
    services = load_services(SECRETS)
    devices, names = [], set()
    for name in ("gpu-worker", "gpu-worker-1"):
        service = {**services[name]}
        assert service.pop("profiles") == [name.replace("gpu-worker", "gpu")]
        names.add(service.pop("container_name"))  # with which Compose refuses to scale it
        [device] = service.pop("deploy")["resources"]["reservations"]["devices"]
        devices += device["device_ids"]
        del service["shm_size"]
        cpu = {**services["cpu-worker"]}
        assert cpu.pop("profiles") == ["cpu"]
        assert service == cpu
    assert len(set(devices)) == len(names) == 2


def test_models_are_mounted_and_what_is_downloaded_is_kept() -> None:
    services = load_services(SECRETS)
    dockerfile = (ROOT / "deploy/Dockerfile").read_text()
    for name in ("api", "cpu-worker", "gpu-worker", "maintenance"):
        mounted = {volume.split(":")[1] for volume in services[name]["volumes"]}
        assert mounted == {"/app/models.toml", "/app/models", "/app/.celeriac"}
    base = dockerfile.partition("AS api")[0]
    assert "ENV HF_HOME=/app/.celeriac/huggingface" in base, "the API reads the tokenizers of models from the Hub"


def test_monitoring_is_asked_for_and_reads_files_that_there_are() -> None:
    services = load_services(SECRETS)
    for name in ("prometheus", "grafana", "grafana-reader"):
        service = services[name]
        assert service["profiles"] == ["monitoring"]
        for volume in service.get("volumes", ()):
            source = volume.split(":")[0]
            assert not source.startswith("./") or (ROOT / source).exists(), volume
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ()))
    config = yaml.safe_load((ROOT / "deploy/prometheus.yml").read_text())
    hosts = {name for job in config["scrape_configs"] for dns in job["dns_sd_configs"] for name in dns["names"]}
    aliases = {alias for name in services for alias in _aliases(services[name])}
    assert hosts <= services.keys() | aliases
    provisioning = "".join(file.read_text() for file in (ROOT / "deploy/grafana/provisioning").rglob("*.yml"))
    told = re.search(r"^export (PROMETHEUS_URL=.*)$", (ROOT / "docs/metrics.md").read_text(), re.MULTILINE)
    assert told
    named = set(re.findall(r"\$(\w+)", provisioning))
    assert named <= services["grafana"]["environment"].keys()
    assert named == {*re.findall(r"(\w+)=", told[1]), "GRAFANA_READER_PASSWORD"}


def _aliases(service: dict[str, Any]) -> list[str]:
    networks = service.get("networks", {})
    return [alias for network in networks.values() for alias in network.get("aliases", ())]


def test_every_service_of_ours_bounds_its_logs_and_its_memory() -> None:
    for name, service in load_services(SECRETS).items():
        if service.get("restart") != "no":
            assert service["logging"]["options"]["max-size"], name
            assert service["mem_limit"], name
            is_worker = name.endswith("worker") or name == "gpu-worker-1"
            assert (service["mem_limit"] == "0") is is_worker, "only a user knows how large the models are"


def copied_files(target: str) -> list[str]:
    """What the Dockerfile copies into one target, its base included."""
    sources: dict[str, list[str]] = {}
    stage, parents = "", dict[str, str]()
    for line in (ROOT / "deploy" / "Dockerfile").read_text().splitlines():
        words = line.split()
        if line.startswith("FROM"):
            stage = words[3]
            parents[stage], sources[stage] = words[1], []
        elif line.startswith("COPY"):
            sources[stage] += words[1:-1]
    return sources.get(parents[target], []) + sources[target]


def test_the_packages_that_pip_looks_for_are_there_before_the_code_is() -> None:
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    before, _, _ = (ROOT / "deploy" / "Dockerfile").read_text().partition("pip install --constraint")
    for package in packages:
        assert f"{package.replace('.', '/')}/__init__.py" in before, f"pip finds no {package} and ends"


@pytest.mark.parametrize(
    ("target", "modules"), [("api", "celeriac.cli, api.app, tasks.app"), ("worker", "celeriac.cli, gpu_worker.app")]
)
def test_an_image_holds_all_that_its_commands_import(tmp_path: Path, target: str, modules: str) -> None:
    allowed = {line.removeprefix("!") for line in (ROOT / ".dockerignore").read_text().splitlines() if line[:1] == "!"}
    for source in copied_files(target):
        assert source in allowed, f".dockerignore keeps {source} out"
        for path in ROOT.glob(source):
            copy = shutil.copytree if path.is_dir() else shutil.copy
            (tmp_path / source).parent.mkdir(parents=True, exist_ok=True)
            copy(path, tmp_path / path.relative_to(ROOT))
    # The checkout is on the path by the editable installation; in the image it is not.
    code = f"import sys; sys.path.remove({str(ROOT)!r}); sys.path.insert(0, ''); import {modules}; print('ok')"
    code += "; assert 'torch' not in sys.modules; from celeriac.options import HAS_SERVER; assert HAS_SERVER"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout == "ok\n", done.stderr
