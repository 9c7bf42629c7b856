"""`generate` in a client's Celery application: canvas, results, revoking, and kills of everything that takes part."""

import ast
import os
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import Celery, chain, chord, group
from celery.result import AsyncResult

from celeriac.celery import TASK_ID, GenerationError, generate
from celeriac.client import Client, JobSnapshot
from settings import ROOT
from tests.chaos.plant import Part, Plant, start_prepared, start_python
from tests.integration.test_main_job import System
from tests.thorough import IS_THOROUGH
from tests.waiting import slowness, wait_until

pytestmark = pytest.mark.slow

MODEL = "fake"
MODELS = f"""
[[models]]
id = "{MODEL}"
path = "fake"
backend = "fake"
max_model_len = 4096
max_num_seqs = 8

[models.fake]
step_seconds = 0.005
"""
SETTINGS = {"lease_seconds": 3, "lease_grace_seconds": 0.5, "janitor_interval_seconds": 0.5}
FINISH_SECONDS = 240.0  # a message that a killed worker had in hand comes again after up to two minutes
NUM_TOKENS = 12
NUM_CHAINS = 30


class ClientSystem(System):
    """Celeriac, and a worker of a client's application on the same broker."""

    def __init__(self, plant: Plant, *, with_callbacks: bool) -> None:
        super().__init__(plant)
        self.folder = plant.folder / "client"
        self.folder.mkdir()
        self._with_callbacks = with_callbacks

    def __enter__(self) -> "ClientSystem":
        super().__enter__()
        url = self.plant.redis.url
        self.environment = {
            "CLIENT_APP_FOLDER": str(self.folder),
            "CLIENT_APP_BROKER": url,
            "CLIENT_APP_BACKEND": url,
            "CLIENT_APP_API": self.plant.api_urls[0],
            "CLIENT_APP_CALLBACKS": "1" if self._with_callbacks else "0",
        }
        # Not threads: with these, Celery's SIGQUIT raises NotImplementedError wherever the consumer is, and a message
        # that kombu has taken from Redis and not yet noted as unacked is gone.
        arguments = ["celery", "-A", "tests.integration.celery_app", "worker", "--pool", "prefork", "-c", "2"]
        log_path = self.plant.folder / "logs" / "client.log"
        environment = dict(os.environ) | self.environment | {"PYTHONPATH": str(ROOT)}
        self.worker = Part("client", [*arguments, "-n", "client@here"], environment, log_path, ROOT, start_python)
        self.worker.start()
        self.plant.maintenance.append(self.worker)  # watched and closed with the others
        return self

    def lines(self, name: str) -> list[str]:
        path = self.folder / name
        return path.read_text().splitlines() if path.exists() else []


def make_system(*, with_callbacks: bool) -> Iterator[ClientSystem]:
    folder = Path(tempfile.mkdtemp(prefix="celeriac-celery-"))
    plant = Plant(folder, models=MODELS, worker_models={"gpu-1": MODEL}, settings=SETTINGS, start=start_prepared)
    with ClientSystem(plant, with_callbacks=with_callbacks) as system:
        yield system
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module", params=[True, False], ids=["callbacks", "polling"])
def system(request: pytest.FixtureRequest) -> Iterator[ClientSystem]:
    yield from make_system(with_callbacks=request.param)


@pytest.fixture
def app(system: ClientSystem) -> Iterator[Celery]:
    """The client's side of the same application, without its tasks: their names are enough."""
    environment = system.environment
    app = Celery("client", broker=environment["CLIENT_APP_BROKER"], backend=environment["CLIENT_APP_BACKEND"])
    app.conf.update(celeriac_url=environment["CLIENT_APP_API"])
    app.set_current()
    yield app
    app.close()


@pytest.fixture
def client(system: ClientSystem) -> Iterator[Client]:
    with Client(system.plant.api_urls[0]) as client:
        yield client


def task(app: Celery, name_: str, /, *args: Any, **kwargs: Any) -> Any:
    return app.signature(f"tests.integration.celery_app.{name_}", args=args, kwargs=kwargs)


def get(result: AsyncResult) -> Any:
    return result.get(timeout=FINISH_SECONDS * slowness())


def job_of(client: Client, task_id: str) -> JobSnapshot:
    [job] = client.jobs(**{f"metadata[{TASK_ID}]": task_id})
    return client.get(job.id)


def test_a_task_returns_the_text_of_its_job(app: Celery, client: Client) -> None:
    result = generate.delay("Once upon a time", model=MODEL, max_tokens=NUM_TOKENS, ignore_eos=True)
    text = get(result)
    assert result.state == "SUCCESS"
    job = job_of(client, result.id)
    assert (job.text, job.usage["completion_tokens"]) == (text, NUM_TOKENS)
    whole = get(generate.delay("Once", model=MODEL, max_tokens=4, n=2, output="job"))
    assert len(whole["output"]["choices"]) == 2


def test_the_state_tells_the_job_and_its_place(app: Celery, client: Client) -> None:
    result = generate.delay("Once upon a time", model=MODEL, max_tokens=3000, ignore_eos=True)
    wait_until(lambda: result.state in ("QUEUED", "STARTED"), "the job is submitted")
    job_id = result.info["job_id"]
    assert not client.get(job_id).has_ended
    result.revoke(terminate=True)
    wait_until(lambda: client.get(job_id).status == "cancelled", "revoking cancels the job")


def test_a_chain_hands_text_on(app: Celery, system: ClientSystem) -> None:
    steps = chain(
        task(app, "fetch", "a fox"),
        generate.s(model=MODEL, max_tokens=NUM_TOKENS, ignore_eos=True),
        task(app, "store", name="chain"),
    )
    text = get(steps.delay())
    assert [ast.literal_eval(line) for line in system.lines("chain")] == [text]


def test_a_group_and_a_chord_collect_texts(app: Celery) -> None:
    several = [generate.s(f"Tale {n}", model=MODEL, max_tokens=4, ignore_eos=True) for n in range(4)]
    texts = get(group(several).delay())
    assert len(texts) == 4
    joined = get(chord(several)(task(app, "join")))
    assert joined.count("|") == 3


def test_links_are_called_with_the_text_or_the_error(app: Celery, system: ClientSystem) -> None:
    wanted = generate.s("Once", model=MODEL, max_tokens=4).set(link=task(app, "store", name="linked"))
    text = get(wanted.delay())
    wait_until(lambda: system.lines("linked") == [repr(text)], "the link has run")
    refused = generate.s("Once", model="no-such-model", max_tokens=4).set(link_error=task(app, "note_error"))
    with pytest.raises(Exception, match="no-such-model") as outcome:
        get(refused.delay())
    assert isinstance(outcome.value, GenerationError)
    assert outcome.value.code == "model_not_found"
    wait_until(lambda: len(system.lines("errors")) == 1, "the error's link has run")


def test_a_job_that_fails_is_raised(app: Celery, client: Client) -> None:
    result = generate.delay("Once", model=MODEL, max_tokens=3000, ignore_eos=True)
    wait_until(lambda: bool(client.jobs(**{f"metadata[{TASK_ID}]": result.id}).jobs), "the job is submitted")
    client.cancel(job_of(client, result.id).id)
    with pytest.raises(GenerationError, match="cancelled"):
        get(result)


def test_an_expiry_becomes_the_jobs_deadline(app: Celery, client: Client) -> None:
    result = generate.apply_async(("Once",), {"model": MODEL, "max_tokens": 4}, countdown=0.2, expires=600)
    get(result)
    assert job_of(client, result.id).raw["deadline"] is not None


def test_the_job_table_is_a_result_backend(app: Celery, system: ClientSystem, client: Client) -> None:
    result = generate.delay("Once", model=MODEL, max_tokens=4)
    text = get(result)
    url = f"celeriac.celery:CeleriacBackend+{system.plant.api_urls[0]}"
    reading = Celery("reader", broker=system.plant.redis.url, backend=url, set_as_current=False)
    try:
        assert reading.AsyncResult(result.id).get(timeout=300) == text
        assert reading.AsyncResult("unknown").state == "PENDING"
    finally:
        reading.close()


def test_called_as_a_function_it_waits(app: Celery) -> None:
    assert generate("Once upon a time", model=MODEL, max_tokens=4, ignore_eos=True)


def test_chains_survive_kills_of_everything(app: Celery, system: ClientSystem) -> None:
    """Each of many chains runs to its end. The final task may run more than once (Celery's messages are delivered at
    least once), but each time with the same text."""
    steps = [
        chain(
            task(app, "fetch", f"number {n}"),
            generate.s(model=MODEL, max_tokens=NUM_TOKENS, ignore_eos=True, seed=n),
            task(app, "store", name=f"kills-{n}"),
        )
        for n in range(NUM_CHAINS)
    ]
    for each in steps:
        each.apply_async()
    plant, draw = system.plant, random.Random(7)
    victims = [plant.apis[0], plant.workers[0], plant.maintenance[0], system.worker]
    draw.shuffle(victims)
    for victim in victims:
        # What a client's killed worker had in hand, Celery delivers again after its visibility timeout and up to 100 s.
        victim.send(signal.SIGQUIT if victim is system.worker else signal.SIGKILL)
        time.sleep(1.0)

    def num_done() -> int:
        return sum(bool(system.lines(f"kills-{n}")) for n in range(NUM_CHAINS))

    wait_until(lambda: num_done() == NUM_CHAINS, "every chain has ended", seconds=FINISH_SECONDS)
    for n in range(NUM_CHAINS):
        assert len(set(system.lines(f"kills-{n}"))) == 1
    with Client(plant.api_urls[0]) as client:
        assert {job.status for job in client.jobs(limit=NUM_CHAINS)} == {"completed"}


@pytest.mark.skipif(not IS_THOROUGH, reason="takes minutes; THOROUGH=1 tries it")
@pytest.mark.timeout(1800)
def test_a_thousand_chains_under_many_kills(app: Celery, system: ClientSystem) -> None:
    """Redis, too, and the client's worker by SIGKILL: what it had in hand takes up to two minutes to come back."""
    num_chains, draw = 1000, random.Random(11)
    for n in range(num_chains):
        generation = generate.s(model=MODEL, max_tokens=40, ignore_eos=True, seed=n)
        chain(task(app, "fetch", f"many {n}"), generation, task(app, "store", name=f"many-{n}")).apply_async()
    plant = system.plant
    parts = [plant.apis[0], plant.workers[0], plant.maintenance[0], system.worker]
    for number in range(20):
        time.sleep(draw.uniform(1, 3))
        if number % 7 == 6:
            plant.restart_redis(is_emptied=False)
        else:
            draw.choice(parts).send(signal.SIGKILL)

    def num_done() -> int:
        return sum(bool(system.lines(f"many-{n}")) for n in range(num_chains))

    wait_until(lambda: num_done() == num_chains, "every chain has ended", seconds=900, pause_seconds=1.0)
    lines = [system.lines(f"many-{n}") for n in range(num_chains)]
    assert all(len(set(each)) == 1 for each in lines), "each final task saw one text, however often it ran"
    print(f"{num_chains} chains ended; {sum(map(len, lines)) - num_chains} final tasks ran again")
