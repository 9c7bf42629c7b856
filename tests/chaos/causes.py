"""How soon the cause of a trouble is named, by whom.

    python -m tests.chaos.causes                        # all of them: an hour
    python -m tests.chaos.causes --share 2/6            # the second sixth
    python -m tests.chaos.causes --only "redis is full" --only "a table is locked"

The whole system runs with two APIs, two workers of the fake model and a Prometheus, if there is one, which evaluates
the rules of deploy/alerts.yml as they are shipped. One cause after the other is brought about, and undone. Measured is
the time until each of /health, `celeriac doctor` and an alert that fires says what it is, and how long after its
end each still says it; the dashboard shows what /health says. What a tenant has to mend itself is looked for where it
looks, and must alarm nobody else. A client submits jobs all the while: those that were accepted must complete. The
last line is JSON.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psycopg

from local.processes import free_port
from settings import ROOT
from tests.chaos.cause_list import CAUSES
from tests.chaos.cause_scene import MODELS, Cause, Scene
from tests.chaos.plant import Plant, start_prepared, start_python
from tests.waiting import wait_until

LIMIT_SECONDS = 30.0
PATIENCE_SECONDS = 45.0  # after which nobody names it any more
LOOK_SECONDS = 0.25
HEAL_SECONDS = 120.0
ALARM_SECONDS = 20.0  # after which those who should say nothing are looked at
WITNESSES = ("health", "doctor", "alert", "tenant")
ALARMS = ("health", "alert")  # which say nothing at all of what is none of their business
OF_THE_PAST = ("CeleriacApiUnavailable", "CeleriacJobsFail", "CeleriacWorkersLost", "CeleriacEngineEnds")  # of minutes


@dataclass(slots=True)
class Verdict:
    """Seconds until each witness named the cause, and in which words, and after its end until none did any more."""

    cause: str
    seconds: dict[str, float] = field(default_factory=dict)
    words: dict[str, str] = field(default_factory=dict)
    last_said: dict[str, str] = field(default_factory=dict)
    cleared: dict[str, float] = field(default_factory=dict)
    needless: dict[str, str] = field(default_factory=dict)  # what was said by those who should say nothing
    job: str = ""  # what its client reads of a job meanwhile
    silent: list[str] = field(default_factory=list)  # the witnesses that should have named it, and did not in time


class Watch:
    """Asks all witnesses, each in a thread of its own, until each has named the cause or it is over."""

    def __init__(self, scene: Scene, cause: Cause, prometheus_url: str | None) -> None:
        """Made before the strike: an alert of the last cause may fire for minutes."""
        self._scene, self._cause = scene, cause
        self._prometheus_url = prometheus_url
        self._before = set(firing(prometheus_url).splitlines())
        self._began_at = time.monotonic()
        self.verdict = Verdict(cause.name)

    def run(self) -> Verdict:
        self._began_at = time.monotonic()
        in_threads(self._ask, WITNESSES)
        late = [
            witness
            for witness in filter(self.is_asked, WITNESSES)
            if self.verdict.seconds.get(witness, LIMIT_SECONDS) >= LIMIT_SECONDS
        ]
        self.verdict.silent = late
        unasked = [witness for witness in ALARMS if getattr(self._cause, witness) is None]
        if unasked:
            time.sleep(max(0.0, ALARM_SECONDS - (time.monotonic() - self._began_at)))
        for witness in unasked:
            said = {line for line in self.say(witness).splitlines() if not line.startswith(OF_THE_PAST)} - self._before
            if said:
                self.verdict.needless[witness] = "\n".join(sorted(said))
        return self.verdict

    def wait_until_cleared(self) -> None:
        """After its end: until no witness that named it does so any more, but for those that tell of the past."""
        self._began_at = time.monotonic()
        named = [who for who in self.verdict.seconds if who != "tenant" and self._pattern(who) not in OF_THE_PAST]
        in_threads(self._ask_until_cleared, named, meanwhile=self._scene.plant.watch)

    def _ask_until_cleared(self, witness: str) -> None:
        expected = str(self._pattern(witness))
        while time.monotonic() - self._began_at < HEAL_SECONDS:
            if not re.search(expected, self.say(witness)):
                self.verdict.cleared[witness] = round(time.monotonic() - self._began_at, 1)
                return
            time.sleep(LOOK_SECONDS)

    def say(self, witness: str) -> str:
        said: str = getattr(self, f"_{witness}")()
        return said

    def is_asked(self, witness: str) -> bool:
        return self._pattern(witness) is not None

    def _pattern(self, witness: str) -> str | None:
        """None if this witness is not expected to name the cause, or is not there."""
        if witness == "alert" and self._prometheus_url is None:
            return None
        expected: str | None = getattr(self._cause, witness)
        return expected

    def _ask(self, witness: str) -> None:
        expected = self._pattern(witness)
        if expected is None:
            return
        while time.monotonic() - self._began_at < PATIENCE_SECONDS:
            said = self.say(witness)
            self.verdict.last_said[witness] = said
            if found := re.search(expected, said):
                self.verdict.seconds[witness] = round(time.monotonic() - self._began_at, 1)
                line = next((line for line in said.splitlines() if found[0] in line), found[0])
                self.verdict.words[witness] = line[:300]
                return
            time.sleep(LOOK_SECONDS)

    def _tenant(self) -> str:
        try:
            return self._cause.as_tenant(self._scene)
        except httpx.HTTPError as exc:
            return f"no answer: {exc}"

    def _health(self) -> str:
        try:
            answer = httpx.get(f"{self._scene.plant.api_urls[0]}/health", timeout=20)
            return "\n".join(answer.json()["reasons"])
        except (httpx.HTTPError, ValueError, KeyError) as exc:
            return f"no answer: {exc}"

    def _doctor(self) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "celeriac", "doctor", "--url", self._scene.plant.api_urls[self._cause.doctor_api]],
            env=self._scene.doctor_environment(),
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        lines = re.sub(r"\n +->", " ->", done.stdout).splitlines()
        return "\n".join(f"{line} (exit {done.returncode})" for line in lines if not line.startswith("ok"))

    def _alert(self) -> str:
        return firing(self._prometheus_url)


def in_threads(
    ask: Callable[[str], None], witnesses: Iterable[str], *, meanwhile: Callable[[], None] = lambda: None
) -> None:
    threads = [threading.Thread(target=ask, args=(witness,)) for witness in witnesses]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        meanwhile()
        time.sleep(LOOK_SECONDS)


def firing(prometheus_url: str | None) -> str:
    """A line for each alert that fires."""
    alerts = []
    if prometheus_url is not None:
        alerts = httpx.get(f"{prometheus_url}/api/v1/alerts", timeout=10).json()["data"]["alerts"]
    return "\n".join(
        f"{alert['labels']['alertname']} {alert['labels'].get('reason', '')}: {alert['annotations']['summary']}"
        for alert in alerts
        if alert["state"] == "firing"
    )


@contextmanager
def prometheus(plant: Plant, folder: Path) -> Iterator[str | None]:
    """One that scrapes the plant by the intervals that deploy/prometheus.yml has; its URL, or None without one."""
    if shutil.which("prometheus") is None:
        yield None
        return
    shipped = (ROOT / "deploy/prometheus.yml").read_text()
    intervals = re.findall(r"^  (?:scrape|evaluation)_interval: \w+", shipped, re.MULTILINE)
    jobs = {"api": plant.apis, "worker": plant.workers, "maintenance": plant.maintenance}
    targets = {job: [_metrics_of(plant, part.name, part.log()) for part in parts] for job, parts in jobs.items()}
    lines = ["global:", *intervals, f"rule_files: ['{ROOT / 'deploy/alerts.yml'}']", "scrape_configs:"]
    for job, addresses in targets.items():
        lines += [f"  - job_name: celeriac-{job}", f"    static_configs: [{{ targets: {json.dumps(addresses)} }}]"]
    (folder / "prometheus.yml").write_text("\n".join(lines) + "\n")
    port = free_port("127.0.0.1", 0)
    with (folder / "logs/prometheus.log").open("wb") as log:
        process = subprocess.Popen(
            [
                "prometheus",
                f"--config.file={folder / 'prometheus.yml'}",
                f"--storage.tsdb.path={folder / 'tsdb'}",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=log,
            stderr=log,
        )
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until(lambda: _answers(url), "Prometheus answers")
        yield url
    finally:
        process.terminate()
        process.wait()


def _answers(prometheus_url: str) -> bool:
    with suppress(httpx.TransportError):
        return httpx.get(f"{prometheus_url}/-/ready", timeout=10).is_success
    return False


def _metrics_of(plant: Plant, name: str, log: str) -> str:
    urls = re.findall(r"metrics on http://([\w.:]+)", log)
    if name.startswith("api"):
        return plant.api_urls[int(name[-1]) - 1].removeprefix("http://")
    return str(urls[-1])


class Trickle:
    """Submits a job every second, whatever happens; what was accepted is looked at in the end."""

    def __init__(self, plant: Plant) -> None:
        self._plant = plant
        self._is_over = threading.Event()
        self.job_ids: list[str] = []
        self.num_refused = 0
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        body = {"prompt": "A story", "model": "fake", "params": {"max_tokens": 20}}
        with httpx.Client(base_url=self._plant.api_urls[0], timeout=10) as http:
            while not self._is_over.wait(1.0):
                try:
                    self.job_ids.append(http.post("/v1/jobs", json=body).raise_for_status().json()["id"])
                except httpx.HTTPError:
                    self.num_refused += 1

    def newest_says(self) -> str:
        """What its client reads of the newest job: its status, and what it waits for if it is queued."""
        if not self.job_ids:
            return "nothing was accepted yet"
        try:
            answer = httpx.get(f"{self._plant.api_urls[0]}/v1/jobs/{self.job_ids[-1]}", timeout=20)
        except httpx.HTTPError as exc:
            return type(exc).__name__
        if answer.status_code != 200:
            return f"{answer.status_code} {answer.json()['error']['code']}"
        job = answer.json()
        return f"{job['status']} {(job.get('queue') or {}).get('waiting_for') or ''}".strip()

    def close(self) -> dict[str, int]:
        """How many jobs of each status there are once all have ended."""
        self._is_over.set()
        self._thread.join()
        with psycopg.connect(self._plant.postgres.url, autocommit=True) as connection:

            def count() -> dict[str, int]:
                rows = connection.execute("SELECT status, count(*) FROM jobs GROUP BY status").fetchall()
                return {str(status): int(number) for status, number in rows}

            with suppress(AssertionError):
                wait_until(lambda: not {"queued", "in_progress"} & count().keys(), "all jobs have ended", seconds=60)
            return count()


@contextmanager
def small_disk(folder: Path) -> Iterator[bool]:
    """Mounts a file system of its own for PostgreSQL, if we may: only then can its disk be filled."""
    folder.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", "size=256m,mode=0755", "tmpfs", str(folder)]
    is_mounted = os.geteuid() == 0 and subprocess.run(command, capture_output=True, check=False).returncode == 0
    try:
        yield is_mounted
    finally:
        if is_mounted:
            subprocess.run(["umount", "--lazy", str(folder)], check=False)


def chosen(names: list[str], share: str) -> list[Cause]:
    number, _, parts = share.partition("/")
    size = -(-len(CAUSES) // int(parts))
    return [cause for cause in CAUSES if cause.name in names or not names][size * (int(number) - 1) :][:size]


def try_all(causes: list[Cause], *, is_prepared: bool) -> dict[str, Any]:
    folder = Path(tempfile.mkdtemp(prefix="celeriac-causes-"))
    ports = {"worker_metrics_port": free_port("127.0.0.1", 0), "maintenance_port": free_port("127.0.0.1", 0)}
    with small_disk(folder / "postgres") as is_small:
        plant = Plant(
            folder,
            models=MODELS,
            worker_models={"gpu-1": "fake", "gpu-2": "fake"},
            num_apis=2,
            settings={
                **ports,
                "auth": "none",
                "archive_url": f"file://{folder}/archive",
                "webhook_private_targets": "true",
            },
            start=start_prepared if is_prepared else start_python,
        )
        with plant, Scene(plant, has_small_disk=is_small) as scene, prometheus(plant, folder) as url:
            trickle = Trickle(plant)
            verdicts = [verdict for cause in causes if (verdict := _try(scene, cause, url, trickle)) is not None]
            statuses = trickle.close()
            report = {
                "causes": {verdict.cause: verdict.seconds for verdict in verdicts},
                "words": {verdict.cause: verdict.words for verdict in verdicts},
                "job": {verdict.cause: verdict.job for verdict in verdicts},
                "cleared": {verdict.cause: verdict.cleared for verdict in verdicts},
                "needless": {verdict.cause: verdict.needless for verdict in verdicts if verdict.needless},
                "not_named": {verdict.cause: verdict.silent for verdict in verdicts if verdict.silent},
                "jobs": statuses,
                "refused": trickle.num_refused,
                "has_prometheus": url is not None,
                "load": os.getloadavg()[0],
            }
    shutil.rmtree(folder, ignore_errors=True)
    return report


def _try(scene: Scene, cause: Cause, prometheus_url: str | None, trickle: Trickle) -> Verdict | None:
    """None if this cause cannot be brought about here."""
    if cause.needs_small_disk and not scene.has_small_disk:
        print(f"{cause.name}: skipped, since no file system may be mounted here", flush=True)
        return None
    if cause.alert is not None:  # the one before may have had the same
        wait_until(lambda: not re.search(str(cause.alert), firing(prometheus_url)), "the last alert is over")
    watch = Watch(scene, cause, prometheus_url)
    strike = scene.strike(cause)
    try:
        verdict = watch.run()
        verdict.job = trickle.newest_says()
    finally:
        strike()
    watch.wait_until_cleared()
    try:
        scene.wait_until_well(HEAL_SECONDS)
    except AssertionError:
        verdict.needless["health, after its end"] = watch.say("health")
    print(f"{cause.name}: " + ", ".join(f"{who} {verdict.seconds.get(who, '–')}" for who in WITNESSES), flush=True)
    for witness in filter(watch.is_asked, WITNESSES):
        said = verdict.words.get(witness) or f"– (it says {verdict.last_said.get(witness)!r})"
        print(f"    {witness}: {said}", flush=True)
    for witness, said in verdict.needless.items():
        print(f"    {witness} says needlessly: {said!r}", flush=True)
    print(f"    a job: {verdict.job}", flush=True)
    print(f"    no longer named after: {verdict.cleared}", flush=True)
    return verdict


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", default=[], help="the name of a cause; may be repeated")
    parser.add_argument("--share", default="1/1", help="which part of them, of how many")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    report = try_all(chosen(options.only, options.share), is_prepared=True)
    print(json.dumps(report))
    sys.exit(bool(report["not_named"] or report["needless"]))


if __name__ == "__main__":
    main()
