"""Checks of this machine: packages, settings, the data folder, models.toml and the models' files, and ports."""

import os
import platform
import re
import shutil
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Any

import click
import httpx

from celeriac.checks import read_catalog, refuse_taken_port
from celeriac.examination.results import CheckResult, fail, ok, warn
from local.descriptors import RESERVED, highest_limit
from local.processes import short_path
from settings import ROOT, Settings, find_running
from text.models import files_at_fault

WARN_FREE_BYTES = 5 * 2**30
FAIL_FREE_BYTES = 2**28
PROBE_SECONDS = 2.0
MAX_NAMED = 5  # packages in one line


def version_results() -> Iterator[CheckResult]:
    """Whether the server's packages are installed, at the versions that were tested."""
    tested = _tested_versions((ROOT / "constraints.txt").read_text().splitlines())
    missing, others = [], []
    for name in _server_packages():
        try:
            found = version(name)
        except PackageNotFoundError:
            missing.append(name)
            continue
        if name in tested and found.partition("+")[0] != tested[name]:
            others.append(f"{name} {found} ({tested[name]})")
    about = f"celeriac {version('celeriac')} on Python {platform.python_version()}"
    install = "pip install --constraint constraints.txt --editable '.[server]'"
    if missing:
        yield fail("packages", f"{about}; not installed: {', '.join(missing[:MAX_NAMED])}", install)
    elif others:
        named = ", ".join(others[:MAX_NAMED])
        yield warn("packages", f"{about}; {len(others)} not at the tested version: {named}", install)
    else:
        yield ok("packages", f"{about}, with the tested versions")


def _tested_versions(lines: Iterable[str]) -> dict[str, str]:
    pins = (line.partition("#")[0].partition(";")[0].strip().partition("==") for line in lines)
    return {_canonical(name): pin for name, equals, pin in pins if equals}


def _server_packages() -> list[str]:
    """The packages that the server needs itself, by the metadata of its installation."""
    needed = [line for line in requires("celeriac") or () if "extra" not in line or 'extra == "server"' in line]
    names = (re.match(r"[A-Za-z0-9._-]+", line) for line in needed)
    return sorted({_canonical(name[0]) for name in names if name})


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def setting_results(settings: Settings) -> Iterator[CheckResult]:
    """Settings that suit development but not production."""
    doubts = [
        (
            settings.auth == "none" and bool(settings.allowed_hosts),
            "CELERIAC_AUTH=none, but CELERIAC_ALLOWED_HOSTS lets others in: they may do everything",
            "set CELERIAC_AUTH=api_key, and create keys with celeriac keys create",
        ),
        (
            settings.webhook_private_targets,
            "CELERIAC_WEBHOOK_PRIVATE_TARGETS=true: a tenant's webhooks reach services in your network",
            "unset it, or name their networks instead in CELERIAC_WEBHOOK_PRIVATE_NETWORKS",
        ),
        (settings.log_level == "DEBUG", "CELERIAC_LOG_LEVEL=DEBUG: logs grow fast", "set it to INFO"),
        (
            settings.max_streams + RESERVED > highest_limit(),
            f"CELERIAC_MAX_STREAMS is {settings.max_streams}, and a process may open {highest_limit()} files and "
            f"connections: an API process started like this allows {max(1, highest_limit() - RESERVED)} streams",
            "raise the limit: ulimit -Hn as root, LimitNOFILE of systemd, ulimits of Docker; or lower the setting",
        ),
        ("*" in settings.cors_origin_list, "CELERIAC_CORS_ORIGINS has *: any page may use the API", "name the origins"),
    ]
    found = [warn("settings", seen, remedy) for is_found, seen, remedy in doubts if is_found]
    yield from found
    if not found:
        who = "every request needs a key" if settings.auth == "api_key" else "no keys are needed, on this machine only"
        yield ok("settings", who)


def data_folder_results(settings: Settings) -> Iterator[CheckResult]:
    folder = settings.data_dir
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        yield fail(
            "data folder", f"{short_path(place)} cannot be written to", "set CELERIAC_DATA_DIR to a folder that can"
        )
        return
    free = shutil.disk_usage(place).free
    seen = f"{free / 2**30:,.1f} GiB free for {short_path(folder)}"
    remedy = "free some space, or set CELERIAC_DATA_DIR to a folder on another disk"
    if free < FAIL_FREE_BYTES:
        yield fail("data folder", seen, remedy)
    elif free < WARN_FREE_BYTES:
        yield warn("data folder", seen, remedy)
    else:
        yield ok("data folder", seen)


def model_results(settings: Settings) -> Iterator[CheckResult]:
    """models.toml, and whether the files that its entries name are there."""
    try:
        catalog = read_catalog(settings)
    except click.ClickException as exc:
        yield fail("models", str(exc), "mend models.toml; docs/models.md explains each field")
        return
    catalog.set_failures(files_at_fault(catalog))
    for model_id, reason in catalog.unavailable.items():
        seen, remedy = f"{model_id} is unavailable: {reason}", f"mend its entry in {short_path(settings.models_file)}"
        yield (fail if model_id == catalog.default_id else warn)("models", seen, remedy)
    if catalog.ids:
        yield ok("models", f"available: {', '.join(catalog.ids)}; by default {catalog.default_id}")
    else:
        yield fail("models", "no model is available", "pull one: celeriac models pull smollm2-135m")


def port_results(settings: Settings) -> Iterator[CheckResult]:
    """Whether the API's and Flower's ports can be listened on, or are ours already."""
    if find_running(settings.data_dir) is not None:
        yield ok("ports", "`celeriac up` runs here and has chosen its ports")
        return
    ports = [
        ("CELERIAC_PORT", settings.host, settings.port, "/health/live", '"ok"'),
        ("CELERIAC_FLOWER_PORT", "127.0.0.1", settings.flower_port, "/healthcheck", "OK"),
    ]
    for setting, host, port, path, expected in ports:
        try:
            refuse_taken_port(setting, host, port)
        except click.ClickException as exc:
            if _answers(f"http://{host}:{port}{path}", expected):
                yield ok("ports", f"{host}:{port} is in use by this installation ({setting})")
            else:
                yield warn("ports", exc.message, f"see who listens there: ss -ltnp 'sport = :{port}'")
            continue
        yield ok("ports", f"{host}:{port} is free ({setting})")


def _answers(url: str, expected: str) -> bool:
    try:
        return expected in httpx.get(url, timeout=PROBE_SECONDS).text
    except (httpx.HTTPError, httpx.InvalidURL):
        return False


def api_results(settings: Settings, url: str | None) -> Iterator[CheckResult]:
    """The API, as it sees itself; `url` is None if it is not known where it listens."""
    if url is None:
        yield ok("API", "not looked at, since none is named; set CELERIAC_API_URL")
        return
    from celeriac.client import Client, ClientError

    with Client(url, settings.api_key) as client:
        try:
            health = client.health()
        except ClientError as exc:
            yield fail("API", str(exc), "start it: celeriac up, or celeriac api")
            return
    yield from _health_results(url, health)
    yield from _release_results(url)


def _health_results(url: str, health: dict[str, Any]) -> Iterator[CheckResult]:
    status = health.get("status")
    if status is None:
        yield fail("API", f"what answers at {url} is not this API", "name it with --url or CELERIAC_API_URL")
    elif status == "unhealthy":
        yield fail("API", f"{url} answers, but accepts no jobs", "see what it says below, and its log")
    else:
        yield ok("API", f"{url} answers: {status}, {health['queue_size']} queued, {health['running']} running")
    for finding in health.get("findings", ()):
        seen = f"{finding['jobs']} jobs of {finding['model']} wait for {finding['waiting_for']}"
        yield warn("queue", f"{seen}, since {finding['seconds']:.0f} s", finding["message"])
    for reason in health.get("reasons", ()):
        seen, _, remedy = reason.partition(": ")
        yield (fail if status == "unhealthy" else warn)("API", f"it sees that {seen}", remedy)


def _release_results(url: str) -> Iterator[CheckResult]:
    own = version("celeriac")
    try:
        other = httpx.get(f"{url}/version", timeout=PROBE_SECONDS).json()["version"]
    except (httpx.HTTPError, ValueError, KeyError, TypeError):
        return
    if other != own:
        yield warn("API", f"it runs release {other}, and this is {own}", "restart it after an upgrade")
