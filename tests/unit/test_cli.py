"""The `celeriac` command: what it says, how fast, and how it explains what is not its fault."""

import io
import json
import os
import socket
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any
from unittest.mock import patch

import click
import pytest
from click.testing import CliRunner
from pydantic import ValidationError
from rich.console import Console

from celeriac import cli, jobs, tables, terminal
from celeriac.access_options import LimitType
from celeriac.client import Client, JobPage, JobSnapshot
from celeriac.client.protocol import parse_events
from celeriac.consoles import VisibleConsole
from celeriac.live import _drawn
from celeriac.terminal import explain
from celeriac.up import Up
from domain.errors import ModelNotFound
from local.lock import AlreadyUp, UpLock
from settings import Settings, get_settings
from tests.webhook_receiver import receiving

ROOT = Path(cli.__file__).parents[1]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Invoke `celeriac ...` on an empty data folder: run("jobs", CELERIAC_PORT="1")."""

    def invoke(*arguments: str, **environment: str) -> Any:
        monkeypatch.setenv("CELERIAC_DATA_DIR", str(tmp_path))
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        get_settings.cache_clear()
        with patch.dict(os.environ):  # options become variables, for the process that a command turns into
            return CliRunner().invoke(cli.main, list(arguments))

    before = dict(os.environ)
    yield invoke
    for name in os.environ.keys() - before.keys():
        del os.environ[name]  # an option is a setting by another name, for the process that the command becomes
    get_settings.cache_clear()


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['celeriac', '--help']\n"
        "import atexit, json; atexit.register(lambda: print(json.dumps(sorted(sys.modules)), file=sys.stderr))\n"
        "from celeriac import cli; cli.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = set(json.loads(done.stderr))
    assert not loaded & {"torch", "transformers", "celery", "fastapi", "sqlalchemy", "pydantic", "rich", "httpx"}


@pytest.mark.parametrize("name", list(cli.main.commands))
def test_every_command_says_what_it_does(run: Any, name: str) -> None:
    result = run(name, "--help")
    assert result.exit_code == 0, result.output
    assert cli.main.commands[name].help


@pytest.mark.parametrize("command", [["submit", "Hello!"], ["jobs"], ["watch", "job_1"], ["cancel", "job_1"]])
def test_an_api_that_is_not_there_is_named_with_the_remedy(run: Any, command: list[str]) -> None:
    result = run(*command, "--url", "http://127.0.0.1:9")
    assert result.exit_code == 1
    assert "no answer from the API at http://127.0.0.1:9: Connection refused" in result.output
    assert "celeriac up" in result.output


def test_a_password_in_the_url_is_not_shown(run: Any) -> None:
    result = run("jobs", "--url", "http://me:secret:%2F%2F@127.0.0.1:9")
    assert "no answer from the API at http://127.0.0.1:9: " in result.output
    assert "secret" not in result.output


def test_a_mistyped_setting_is_named_with_the_likely_one(run: Any) -> None:
    result = run("models", CELERIAC_REDIS_ULR="redis://localhost")
    assert result.exit_code == 1
    assert "did you mean CELERIAC_REDIS_URL?" in result.output


def test_a_wrong_setting_is_named_with_its_value(run: Any) -> None:
    result = run("models", CELERIAC_PORT="x")
    assert result.exit_code == 1
    assert "CELERIAC_PORT is 'x'" in result.output


MALFORMED_URLS = [
    ("CELERIAC_REDIS_URL", "reddis://:s3cret@host"),
    ("CELERIAC_REDIS_URL", "s3cret@host"),
    ("CELERIAC_REDIS_URL", "redis://:s3cret"),
    ("CELERIAC_REDIS_URL", "redis://:s3cret/s3cret@host"),
    ("CELERIAC_REDIS_URL", "redis://:s3cret#s3cret@host"),
    ("CELERIAC_REDIS_URL", "redis://:s3cret@[host"),
    ("CELERIAC_REDIS_URL", "redis://:s3cret\u2100@host"),
    ("CELERIAC_DATABASE_URL", "s3cret@host"),
    ("CELERIAC_DATABASE_URL", "mysql://user:s3cret@host/name"),
    ("CELERIAC_DATABASE_URL", "postgresql:/user:s3cret@host/name"),
    ("CELERIAC_DATABASE_URL", "postgresql://user:s3cret"),
    ("CELERIAC_DATABASE_URL", "postgresql://user:s3cret@host:port/name"),
    ("CELERIAC_DATABASE_URL", "postgresql://user:a@s3cret@host/name"),
]


@pytest.mark.parametrize(("name", "url"), MALFORMED_URLS)
@pytest.mark.parametrize("command", ["models", "migrate", "maintenance", "up"])
def test_a_malformed_url_is_named_and_not_repeated(run: Any, command: str, name: str, url: str) -> None:
    result = run(command, **{name: url})
    assert result.exit_code == 1
    assert f"{name} is wrong: it " in result.output
    assert "s3cret" not in result.output


@pytest.mark.parametrize(("name", "url"), MALFORMED_URLS)
def test_a_malformed_url_is_in_no_traceback(name: str, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, url)
    with pytest.raises(ValidationError) as caught:
        Settings()
    assert "s3cret" not in "".join(traceback.format_exception(caught.value))


def test_a_process_with_a_malformed_url_dies_without_repeating_it() -> None:
    environment = os.environ | {"CELERIAC_REDIS_URL": "redis://:s3cret/s3cret@host"}
    command = [sys.executable, "-m", "celery", "-A", "tasks.app", "report"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "redis_url" in done.stdout + done.stderr
    assert "s3cret" not in done.stdout + done.stderr


def test_the_settings_show_no_secret_of_theirs() -> None:
    settings = Settings(
        database_url="postgresql://user:s3cret@host/name",
        redis_url="redis://:s3cret@host",
        api_key="sk_1_s3cret",
        bootstrap_api_key="sk_1_s3cret",
    )
    assert "s3cret" not in repr(settings)


@pytest.mark.parametrize(
    "url", ["postgresql://u:pa/ss@host/name", "postgres://u:p%40@[::1]:5432/name?sslmode=require", "postgresql:///name"]
)
def test_a_database_url_that_can_be_read_is_taken_as_it_is(url: str) -> None:
    assert Settings(database_url=url).database_url == url


def test_a_models_file_that_makes_no_sense_stops_up_before_it_starts(run: Any, tmp_path: Path) -> None:
    (tmp_path / "models.toml").write_text('[[models]]\nid = "m"\n')
    result = run("up", CELERIAC_MODELS_FILE=str(tmp_path / "models.toml"))
    assert result.exit_code == 1
    assert "path is missing" in result.output
    assert not (tmp_path / "postgres").exists()


@pytest.mark.parametrize("command", [["submit", "Hello!"], ["jobs"], ["watch", "job_1"], ["cancel", "job_1"]])
def test_nothing_is_asked_that_merely_listens_on_the_usual_port(run: Any, command: list[str]) -> None:
    result = run(*command)
    assert result.exit_code == 1
    assert "`celeriac up` is not running in this folder" in result.output
    assert "CELERIAC_API_URL" in result.output


def test_a_port_that_was_named_is_asked(run: Any) -> None:
    assert "no answer from the API at http://127.0.0.1:9" in run("jobs", CELERIAC_PORT="9").output


def test_a_data_folder_that_cannot_be_used_is_named_with_the_remedy(run: Any, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = run("up", CELERIAC_DATA_DIR=str(tmp_path / "file" / "data"))
    assert result.exit_code == 1
    assert "CELERIAC_DATA_DIR is" in result.output
    assert "give a folder that can be written to" in result.output


def test_a_worker_for_an_unknown_model_does_not_start(run: Any) -> None:
    result = run("worker", "--model", "nope")
    assert result.exit_code == 1
    assert "model 'nope' is not served here; choose one of: celeriac-mini" in result.output


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("smollm2-135m", "there is no model 'smollm2-135m' here; pull it: celeriac models pull smollm2-135m"),
        ("nope", "there is no model 'nope' here; see celeriac models list"),
    ],
)
def test_a_model_that_is_not_here_stops_up_before_it_starts(run: Any, tmp_path: Path, model: str, says: str) -> None:
    result = run("up", "--model", model)
    assert result.exit_code == 1
    assert says in result.output
    assert not (tmp_path / "postgres").exists()


def test_commands_beside_an_up_take_its_model_for_the_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CELERIAC_DATA_DIR", str(tmp_path))
    lock = UpLock(tmp_path).take()
    lock.write({"pid": os.getpid(), "default_model": "smollm2-135m"})
    code = "from local.lock import settings_here; print(settings_here().default_model)"

    def default_model(**variables: str) -> str:
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, cwd=ROOT, env=os.environ | variables, capture_output=True, text=True)
        return done.stdout.strip()

    assert default_model() == "smollm2-135m"
    assert default_model(CELERIAC_DEFAULT_MODEL="mine") == "mine"
    lock.release()
    assert default_model() == "None"


@pytest.mark.parametrize("command", ["api", "worker", "maintenance", "up", "models"])
def test_a_missing_models_file_is_named_with_the_remedy(run: Any, tmp_path: Path, command: str) -> None:
    result = run(command, CELERIAC_MODELS_FILE=str(tmp_path / "none.toml"))
    assert result.exit_code == 1
    assert "none.toml: No such file or directory; give the path of a models.toml" in result.output


@pytest.mark.parametrize(("command", "setting"), [("api", "CELERIAC_PORT"), ("flower", "CELERIAC_FLOWER_PORT")])
def test_a_taken_port_is_named_with_the_remedy(run: Any, command: str, setting: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = run(command, CELERIAC_DATABASE_URL="postgresql://127.0.0.1:1/none", **{setting: str(port)})
    assert result.exit_code == 1
    assert f"127.0.0.1:{port} (Address already in use); choose another {setting}" in result.output


def test_ids_and_paths_are_whole_in_a_pipe_and_on_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = {"id": "job_" + "0" * 26, "status": "queued", "model": "m" * 70, "created_at": "2026-01-01T00:00:00+00:00"}
    job = JobSnapshot.of(raw | {"started_at": None, "finished_at": None})
    for width, is_terminal in ((72, True), (60, True), (40, True), (40, False)):
        monkeypatch.setenv("COLUMNS", str(width))
        written = io.StringIO()
        console = VisibleConsole(highlight=False, file=written, force_terminal=is_terminal)
        monkeypatch.setattr(tables, "VisibleConsole", lambda console=console, **_: console)
        tables.show(tables.jobs_table([job]))
        assert job.id in written.getvalue()
        num_shown = written.getvalue().replace("\x1b[2m", "").replace("\x1b[0m", "").count("m" * 10)
        assert width == 72 or num_shown >= 6  # on a narrow one each row is a block, in which all is shown


def test_top_says_all_that_health_finds_wrong() -> None:
    health = {"status": "degraded", "queue_size": 0, "running": 0, "streams": 0, "reasons": ["the disk is full: x"]}
    console = VisibleConsole(file=io.StringIO())
    console.print(
        _drawn({"url": "http://x", "at": "2026-01-01T00:00:00", "health": health, "queues": [], "workers": []}, 80)
    )
    assert "! the disk is full: x" in console.file.getvalue()  # type: ignore[attr-defined]


def test_the_first_steps_show_the_key_where_one_is_asked_for() -> None:
    steps = terminal.first_steps("http://127.0.0.1:8000", "m", "job_1", "celeriac", needs_key=True)
    assert "celeriac keys create" in steps
    assert steps.count("curl") == steps.count("authorization: Bearer $CELERIAC_API_KEY") == 3
    assert "key" not in terminal.first_steps("http://127.0.0.1:8000", "m", "job_1", "celeriac", needs_key=False).lower()


def test_a_bug_keeps_its_traceback() -> None:
    assert explain(KeyError("x")) is None


def test_an_error_that_tells_users_what_to_do_needs_no_traceback() -> None:
    assert explain(AlreadyUp("stop it first")) == "stop it first"
    assert explain(ModelNotFound("there is no such model")) == "there is no such model"


def test_up_tells_where_flower_is_behind_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    up = Up(Settings(flower_port=5555), with_first_job=False)
    assert up._flower_url == "http://127.0.0.1:5555"
    monkeypatch.setenv("FLOWER_URL_PREFIX", "/flower/")
    assert up._flower_url == "http://127.0.0.1:5555/flower/"


@pytest.mark.parametrize("command", ["api", "up"])
def test_nothing_is_started_for_the_network_without_keys(run: Any, command: str, tmp_path: Path) -> None:
    data = tmp_path / "data"
    result = run(command, CELERIAC_HOST="0.0.0.0", CELERIAC_DATA_DIR=str(data))
    assert result.exit_code == 1
    assert "anyone on the network could use the API; set CELERIAC_AUTH=api_key" in result.output
    assert not data.exists()


def test_flower_stays_on_this_machine_unless_it_asks_for_a_password(run: Any) -> None:
    result = run("flower", "--address", "0.0.0.0")
    assert result.exit_code == 2
    assert "FLOWER_BASIC_AUTH" in result.output


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["submit", "a\udcff"], "the prompt is not UTF-8 (invalid start byte at byte 1)"),
        (["submit", "--model", "a\udcff", "Hello!"], "an argument is not UTF-8"),
        (["jobs", "--key", "s3cret\nx"], "the API key has characters that no key has"),
        (["jobs", "--key", "s3cretä"], "the API key has characters that no key has"),
        (["jobs", "--url", "s3cret@host"], "must begin with http:// or https://"),
        (["jobs", "--url", "http://[::1"], "names no host and port"),
        (["jobs", "--url", "http://:s3cret@"], "names no host and port"),
        (["watch", ""], "the id is empty"),
        (["batch", "run", __file__, "-o", "/none/out"], "there is no folder '/none'; create it"),
        (["bench", "--jobs", "1", "--duration", "1"], "both say when to end"),
        (["bench", "--prompts", __file__], "line 1 of --prompts is no JSON"),
    ],
)
def test_arguments_that_cannot_be_are_named_before_anything_is_sent(run: Any, arguments: list[str], says: str) -> None:
    given = [] if "--url" in arguments else ["--url", "http://127.0.0.1:9"]
    result = run(*arguments, *given)
    assert result.exit_code in (1, 2)
    assert says in result.output
    assert "s3cret" not in result.output


def test_another_server_at_the_url_is_told_from_the_api(run: Any) -> None:
    with receiving() as other:
        other.answer = lambda received: 404
        result = run("submit", "Hello!", "--url", f"http://127.0.0.1:{other.port}")
    assert result.exit_code == 1
    assert "404, but not in the way of this API" in result.output


def test_what_a_locale_lacks_does_not_end_a_command(tmp_path: Path) -> None:
    for encoding in ("ascii", "latin-1"):
        environment = os.environ | {"PYTHONIOENCODING": encoding, "CELERIAC_DATA_DIR": str(tmp_path)}
        code = "from celeriac.options import print_json; from celeriac import cli; cli._never_fail_to_print(); "
        code += "print_json({'text': 'Größe 日本'}); print('日本')"
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, check=True)
        told, printed = done.stdout.decode(encoding).splitlines()
        assert (json.loads(told), printed) == ({"text": "Größe 日本"}, "??")


def test_standard_input_that_is_not_utf_8_is_explained() -> None:
    result = CliRunner().invoke(cli.main, ["submit", "-", "--url", "http://127.0.0.1:9"], input=b"Gr\xf6\xdfe")
    assert result.exit_code == 1
    assert "the prompt is not UTF-8 (invalid start byte at byte 2)" in result.output


def test_an_empty_prompt_is_refused_before_it_travels(run: Any) -> None:
    result = run("submit", "  ")
    assert result.exit_code == 1
    assert "the prompt is empty" in result.output


def test_a_prompt_becomes_a_chat() -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert jobs.as_prompt("Hi", system="Be brief.", complete=False) == messages


def test_complete_sends_the_prompt_as_it_stands() -> None:
    assert jobs.as_prompt("Once", system=None, complete=True) == "Once"
    with pytest.raises(click.ClickException, match="--complete and --system cannot be combined"):
        jobs.as_prompt("Once", system="x", complete=True)


def test_events_are_read_whatever_their_lines_look_like() -> None:
    lines = [
        ": heartbeat",
        "",
        "retry: 1000",
        "id: 7",
        "event: output.delta",
        'data: {"text":',
        'data: "a: b"}',
        "",
        'data:{"x": 1}',
        "",
        "event: cut.short",
        'data: {"never": "finished"}',
    ]
    events = list(parse_events(lines))
    assert [(event.name, event.data, event.id) for event in events] == [
        ("output.delta", {"text": "a: b"}, "7"),
        ("message", {"x": 1}, None),
    ]


@pytest.mark.parametrize("is_terminal", [True, False])
@pytest.mark.parametrize("is_live", [True, False])
def test_a_terminal_does_not_obey_a_model_and_a_pipe_gets_its_text_as_it_is(is_terminal: bool, is_live: bool) -> None:
    said = "a\x1b[31m\tb\r\nc\x07\x9b2J"
    lines = ["event: output.delta", f"data: {json.dumps({'index': 0, 'text': said})}", "", "event: job.completed"]
    printed = io.StringIO()
    out = Console(file=printed, force_terminal=is_terminal, soft_wrap=True)
    printer = terminal.JobPrinter(out, Console(file=io.StringIO()), is_live=is_live)
    printer.print_all(parse_events([*lines, "data: {}", ""]))
    shown = "a\ufffd[31m\tb\ufffd\nc\ufffd\ufffd2J"
    assert printed.getvalue() == (shown if is_terminal else said) + "\n"


@pytest.mark.parametrize("is_live", [True, False])
@pytest.mark.parametrize(("ending", "shown"), [("expired", ""), ("completed", "\n")])
def test_a_job_that_never_began_prints_nothing(is_live: bool, ending: str, shown: str) -> None:
    printed = io.StringIO()
    printer = terminal.JobPrinter(Console(file=printed), Console(file=io.StringIO()), is_live=is_live)
    printer.print_all(parse_events([f"event: job.{ending}", "data: {}", ""]))
    assert printed.getvalue() == shown


EMPTY_USAGE = {"data": [], "total": {"num_jobs": 0, "cost": None}, "currency": "USD"}


def test_csv_of_usage_has_its_columns_without_rows(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Client, "usage", lambda self, **options: EMPTY_USAGE)
    result = run("usage", "--by", "tenant,day", "--csv", "--url", "http://127.0.0.1:9")
    assert result.stdout.splitlines() == ["day,tenant,num_jobs,cost,currency"]


def test_that_there_is_nothing_is_no_result(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Client, "usage", lambda self, **options: EMPTY_USAGE)
    monkeypatch.setattr(Client, "jobs", lambda self, **options: JobPage((), None))
    monkeypatch.setattr(Client, "dead_letters", lambda self, **options: JobPage((), None))
    monkeypatch.setattr(Client, "model_statuses", lambda self: [])
    for command in (["usage"], ["jobs"], ["jobs", "--status", "failed"], ["dead-letters", "list"], ["workers"]):
        result = run(*command, "--url", "http://127.0.0.1:9")
        assert (result.exit_code, result.stdout) == (0, ""), command
        assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("text", ["0", "-1", "1.5", str(2**53 + 1), "9" * 17, "0" * 17 + "1", "9" * 5_000, "٣"])
def test_a_limit_that_cannot_be_one_is_refused(text: str) -> None:
    with pytest.raises(click.BadParameter, match="give a whole number from 1"):
        LimitType().convert(text, None, None)


def test_the_largest_limit_is_one() -> None:
    assert LimitType().convert(str(2**53), None, None) == 2**53
