"""A Redis user with exactly the rights that docs/operations.md names is enough, and is not asked for more."""

import re
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from celeriac.client import Client
from settings import ROOT, Settings
from tasks.app import make_app
from tests.chaos.plant import Plant, start_prepared
from tests.waiting import SECONDS

pytestmark = pytest.mark.slow

MODEL = "celeriac-mini"
MODELS = f'[[models]]\nid = "{MODEL}"\npath = "{ROOT / "models" / MODEL}"\nmax_model_len = 256\nmax_num_seqs = 4\n'
PASSWORD = "of-the-table"


def names_of_the_table() -> set[str]:
    """As ACL SETUSER takes them."""
    section = (ROOT / "docs/operations.md").read_text().split("| names | kind | what |")[1].split("\n\n")[0]
    rows = [row.strip("|").split("|") for row in section.splitlines() if row.startswith("| `")]
    sign = {"keys": "~", "channels": "&"}
    return {sign[row[1].strip()] + name for row in rows for name in re.findall(r"`([^`]+)`", row[0])}


def commands_to_paste() -> list[str]:
    [line] = re.findall(r"^ACL SETUSER celeriac (.+)$", (ROOT / "docs/operations.md").read_text(), re.MULTILINE)
    return [word for word in line.split() if word[0] not in "~&"]


def test_the_line_to_paste_has_the_names_of_the_table() -> None:
    text = (ROOT / "docs/operations.md").read_text()
    assert set(re.findall(r"(?<= )[~&]\S+", text)) == names_of_the_table()


@pytest.fixture
def plant() -> Iterator[Plant]:
    folder = Path(tempfile.mkdtemp(prefix="celeriac-acl-"))
    with Plant(folder, models=MODELS, worker_models={"gpu-1": MODEL}, start=start_prepared) as plant:
        plant.start_servers()
        yield plant


def test_a_user_of_the_table_runs_everything(plant: Plant) -> None:
    rules = [word.replace("PASSWORD", PASSWORD) for word in commands_to_paste()] + sorted(names_of_the_table())
    with plant.redis_client() as admin:
        admin.execute_command("ACL", "SETUSER", "celeriac", *rules)
        url = f"redis://celeriac:{PASSWORD}@127.0.0.1:{plant.redis.port}/3"
        plant.start_parts(redis_url=lambda name: url)
        plant.wait_until_ready()
        use_everything(plant, url)
        refused = {entry[b"object"] for entry in admin.execute_command("ACL", "LOG")}
        assert refused == set()
        assert admin.info("keyspace").keys() == {"db3"}


def use_everything(plant: Plant, url: str) -> None:
    """Jobs and their streams, remote control, events, and what Flower reads."""
    app = make_app(Settings(redis_url=url, models_file=plant.folder / "models.toml"))
    begun, ended = threading.Event(), threading.Event()
    watching = threading.Thread(target=_watch, args=(app, begun, ended))
    watching.start()
    assert begun.wait(300)
    with Client(plant.api_urls[0]) as client:
        for _ in range(3):
            *_, last = client.stream(client.submit("Once upon a time", model=MODEL, max_tokens=40, ignore_eos=True).id)
            assert last.name == "job.completed"
    assert app.control.inspect(timeout=SECONDS, limit=1).stats()
    app.control.revoke("job_" + "0" * 26, terminate=True)
    ended.set()
    watching.join()
    with redis.Redis.from_url(url) as client:
        assert client.llen(f"celeriac.{MODEL}") == 0
    app.close()


def _watch(app: "object", begun: threading.Event, ended: threading.Event) -> None:
    """As Flower listens to events."""
    with app.connection_for_read() as connection:  # type: ignore[attr-defined]
        receiver = app.events.Receiver(connection, handlers={"*": lambda event: None})  # type: ignore[attr-defined]
        consumer = receiver.itercapture(limit=None, timeout=None, wakeup=True)
        next(consumer)
        begun.set()
        while not ended.is_set():
            ended.wait(0.2)
        consumer.close()
