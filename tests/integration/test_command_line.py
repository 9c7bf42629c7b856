"""The commands on a running system: tables for people, JSON for programs, and exit codes for both."""

import json
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from celeriac.cli import main
from settings import ROOT, get_settings
from tests.chaos.plant import Plant, start_prepared
from tests.waiting import wait_until

pytestmark = pytest.mark.slow

MODEL = "fake"
FAILING_SEED = 13
MODELS = f"""
[[models]]
id = "{MODEL}"
path = "fake"
backend = "fake"
max_model_len = 4096
max_num_seqs = 4

[models.fake]
step_seconds = 0.01
fail_at_token = 2
fail_seed = {FAILING_SEED}
"""


@pytest.fixture(scope="module")
def plant() -> Iterator[Plant]:
    folder = Path(tempfile.mkdtemp(prefix="celeriac-commands-"))
    with Plant(folder, models=MODELS, worker_models={"gpu-1": MODEL}, start=start_prepared) as plant:
        plant.start_servers()
        plant.start_parts()
        plant.wait_until_ready()
        yield plant
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def run(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    settings = {
        "API_URL": plant.api_urls[0],
        "DATABASE_URL": plant.postgres.url,
        "REDIS_URL": plant.redis.url,
        "MODELS_FILE": str(plant.folder / "models.toml"),
        "DATA_DIR": str(plant.folder / "data"),
    }
    for name, value in settings.items():
        monkeypatch.setenv(f"CELERIAC_{name}", value)
    get_settings.cache_clear()
    yield lambda *arguments: CliRunner().invoke(main, list(arguments))
    get_settings.cache_clear()


def lines_of(outcome: Result) -> list[Any]:
    return [json.loads(line) for line in outcome.stdout.splitlines()]


def failed_job(run: Any, prompt: str) -> str:
    outcome = run("submit", "--json", "--wait", "--seed", str(FAILING_SEED), "--max-tokens", "9", prompt)
    [job] = lines_of(outcome)
    assert (job["status"], outcome.exit_code) == ("failed", 1), job
    return str(job["id"])


def test_a_job_is_followed_by_programs(run: Any) -> None:
    outcome = run("submit", "--json", "--max-tokens", "5", "Hello!")
    events = lines_of(outcome)
    assert (events[-1]["event"], outcome.exit_code) == ("job.completed", 0)
    job_id = events[-1]["data"]["id"]
    assert lines_of(run("watch", "--json", job_id))[-1] == events[-1]
    [detached] = lines_of(run("submit", "--json", "--detach", "--max-tokens", "5", "Hello!"))
    [cancelled] = lines_of(run("cancel", "--json", detached["id"]))
    assert cancelled["id"] == detached["id"]
    [listed] = lines_of(run("jobs", "--json"))
    assert {job_id, detached["id"]} <= {job["id"] for job in listed}


def test_dead_letters_are_listed_shown_retried_and_deleted(run: Any) -> None:
    job_id = failed_job(run, "a prompt that is shown to programs only")
    listed = run("dead-letters", "list")
    assert job_id in listed.stdout
    assert MODEL in listed.stdout
    [jobs] = lines_of(run("dead-letters", "list", "--json"))
    assert job_id in {job["id"] for job in jobs}

    shown = run("dead-letters", "show", job_id)
    assert "gpu-1" in shown.stdout
    assert "shown to programs" not in shown.stdout
    [whole] = lines_of(run("dead-letters", "show", "--json", job_id))
    assert "shown to programs" in json.dumps(whole["input"])
    assert len(whole["attempts"]) >= 1

    [again] = lines_of(run("dead-letters", "retry", "--json", job_id))
    assert again["id"] != job_id
    assert again["id"] in run("dead-letters", "retry", job_id).stdout, "a repeated retry names the same job"
    assert run("watch", again["id"]).exit_code == 1, "with the same seed it fails again"

    assert run("dead-letters", "delete", job_id, again["id"]).exit_code == 0
    [left] = lines_of(run("dead-letters", "list", "--json"))
    assert not {job_id, again["id"]} & {job["id"] for job in left}


def test_a_job_that_has_not_failed_is_no_dead_letter(run: Any) -> None:
    [job] = lines_of(run("submit", "--json", "--wait", "--max-tokens", "2", "Hello!"))
    for command in ("retry", "delete"):
        refused = run("dead-letters", command, job["id"])
        assert refused.exit_code == 1
        assert "completed" in refused.stderr


def test_top_shows_queues_workers_and_what_is_wrong(run: Any) -> None:
    [look] = lines_of(run("top", "--once", "--json"))
    assert look["queues"][0]["model"] == MODEL
    assert look["workers"][0]["hostname"].startswith("gpu-1@")
    shown = run("top", "--once").stdout
    assert look["workers"][0]["hostname"] in shown
    assert look["url"] in shown
    assert MODEL in run("queue").stdout
    assert lines_of(run("queue", "--json"))[0][0]["slots"] == 4
    assert lines_of(run("workers", "--json"))[0][0]["workers"]


def test_a_batch_that_was_left_is_fetched_by_its_id(run: Any, tmp_path: Path) -> None:
    requests, first, second = (tmp_path / name for name in ("in.jsonl", "one.jsonl", "two.jsonl"))
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3}
    lines = [
        {"custom_id": str(n), "method": "POST", "url": "/v1/chat/completions", "body": body | {"seed": n}}
        for n in range(3)
    ]
    requests.write_text("".join(json.dumps(line) + "\n" for line in lines))
    outcome = run("batch", "run", str(requests), "-o", str(first), "--json")
    [batch] = lines_of(outcome)
    assert (batch["status"], outcome.exit_code) == ("completed", 0)
    assert batch["id"] in outcome.stderr
    assert run("batch", "get", batch["id"], "-o", str(second)).exit_code == 0
    assert first.read_bytes() == second.read_bytes()


def figures_of(outcome: Result) -> Any:
    [figures] = lines_of(outcome)
    return figures


@pytest.mark.parametrize("options", [("--stream",), ("--poll",), ("--openai", "--model", MODEL)])
def test_a_load_test_tells_how_long_everything_took(run: Any, options: tuple[str, ...]) -> None:
    sizes = ("--jobs", "6", "--concurrency", "3", "--max-tokens", "5", "--ignore-eos", "--prompt-words", "4")
    outcome = run("bench", *sizes, *options, "--json")
    assert outcome.exit_code == 0, outcome.stderr
    figures = figures_of(outcome)
    assert figures["jobs"] == {"completed": 6}
    assert figures["completion_tokens"] == 6 * 5
    whole, first = figures["end_to_end_seconds"], figures["time_to_first_token_seconds"]
    assert (whole["number"], first["number"]) == (6, 6)
    assert 0 < first["p50"] <= whole["max"] <= figures["seconds"]
    is_streaming, are_jobs = options != ("--poll",), "--openai" not in options
    assert (figures["inter_token_seconds"] is not None) == is_streaming
    assert (figures["queue_wait_seconds"] is not None) == are_jobs


def test_a_load_test_counts_failures_by_their_codes(run: Any, tmp_path: Path) -> None:
    good = {"messages": [{"role": "user", "content": "Hi"}]}
    bodies = [good, {"body": good}, {"prompt": "x", "max_tokens": 9_999}, {"prompt": "x", "seed": FAILING_SEED}]
    (tmp_path / "in.jsonl").write_text('"Hello!"\n' + "".join(json.dumps(body) + "\n" for body in bodies))
    options = ("--prompts", str(tmp_path / "in.jsonl"), "--jobs", "5", "--concurrency", "1", "--max-tokens", "9")
    outcome = run("bench", *options, "--json")
    figures = figures_of(outcome)
    assert (figures["jobs"], outcome.exit_code) == ({"completed": 3, "failed": 2}, 1)
    assert (figures["refusals"], len(figures["errors"])) == ({}, 2)
    assert "failed" in run("bench", *options).stdout
    unknown = run("bench", "--model", "fak")
    assert (unknown.exit_code, unknown.stdout) == (1, "")
    assert "fak" in unknown.stderr


def test_a_load_test_cancels_its_jobs_when_it_is_interrupted(run: Any) -> None:
    def unfinished() -> list[Any]:
        running, waiting = (lines_of(run("jobs", "--json", "--status", one))[0] for one in ("in_progress", "queued"))
        return [*running, *waiting]

    command = [sys.executable, "-m", "celeriac", "bench", "--json", "--max-tokens", "4000", "--ignore-eos", "-c", "5"]
    command += ["--prompts", "-"]
    process = subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdin is not None
    with process:
        process.stdin.write('{"prompt": "x", "max_tokens": 2}\n' + '{"prompt": "y"}\n' * 50)
        process.stdin.close()
        wait_until(lambda: len(unfinished()) == 5, "its jobs run and wait")
        process.send_signal(signal.SIGINT)
        assert process.stdout is not None
        assert process.stderr is not None
        told, said = json.loads(process.stdout.read()), process.stderr.read()
    assert (process.returncode, told["interrupted"]) == (130, True)
    assert "5 of 5 jobs were cancelled" in said
    wait_until(lambda: not unfinished(), "they have ended")


def test_doctor_finds_a_running_system_well(run: Any) -> None:
    def checks() -> dict[str, Any]:
        return {check["name"]: check for check in lines_of(run("doctor", "--json"))[0]["checks"]}

    wait_until(lambda: checks()["maintenance"]["level"] == "ok", "maintenance has ticked", pause_seconds=0.3)
    found = checks()
    for name in ("API", "schema", "workers", "Redis", "permissions", "database"):
        assert found[name]["level"] == "ok", found[name]
    assert "-> " not in run("doctor").stdout.partition("API:")[2]


def leaves(command: click.Command, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every command that does something."""
    if not isinstance(command, click.Group) or command.invoke_without_command:
        yield path
    if isinstance(command, click.Group):
        for name, below in command.commands.items():
            yield from leaves(below, (*path, name))


#: They run until they are stopped and log, or what they print is for a shell or another program's.
WITHOUT_JSON = {"up", "api", "worker", "maintenance", "flower", "completion", "engines install"}
#: What is run, in this order; {} was printed before.
JSON_COMMANDS = """
env | migrate | doctor | queue | workers | top --once | usage | jobs | models | models list | models pulls
models check | models remove nope | models pull nope | engines
submit --max-tokens 2 Hello! | watch {id} | cancel {id} | bench --jobs 1 --max-tokens 2
dead-letters list | dead-letters show {id} | dead-letters retry nope | dead-letters delete nope
batch run {file} -o {file}.out | batch get nope -o {file}.out
tenants create told | tenants list | tenants show told | tenants limit told --streams 5 | tenants disable told
tenants enable told | tenants erase told --metadata user=x --yes | tenants audit
keys create --tenant told | keys list | keys show {key} | keys limit {key} --streams 3 | keys disable {key}
keys enable {key} | keys rename {key} nightly | keys rotate {key} | keys delete {key} | tenants rename told tolled
tenants delete tolled
"""
REFUSED = ("models remove", "models pull", "dead-letters retry", "dead-letters delete", "batch get")


def test_every_command_prints_nothing_but_json_for_programs(run: Any, tmp_path: Path) -> None:
    file = tmp_path / "in.jsonl"
    body = {"model": MODEL, "prompt": "Hi", "max_tokens": 2}
    file.write_text(json.dumps({"custom_id": "1", "method": "POST", "url": "/v1/completions", "body": body}) + "\n")
    seen, tried = {"file": str(file)}, set()
    for line in JSON_COMMANDS.replace("\n", " | ").split(" | "):
        if not (words := line.format(**seen).split()):
            continue
        outcome = run(*words, "--json")
        told = lines_of(outcome)
        command = next(" ".join(words[:number]) for number in (2, 1) if tuple(words[:number]) in set(leaves(main)))
        tried.add(command)
        assert told or command in REFUSED, (line, outcome.output)
        assert outcome.exit_code == (1 if command in REFUSED else 0) or command == "doctor", (line, outcome.output)
        if command == "submit":
            seen["id"] = told[-1]["data"]["id"]
        if command == "keys create":
            seen["key"] = told[0]["id"]
    assert tried | WITHOUT_JSON == {" ".join(path) for path in leaves(main)}


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_printed_for_each_shell(run: Any, shell: str) -> None:
    outcome = run("completion", shell)
    assert outcome.exit_code == 0
    assert "_CELERIAC_COMPLETE" in outcome.stdout
