"""All settings: one frozen object, read from CELERIAC_* environment variables."""

import difflib
import fcntl
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from ipaddress import IPv4Network, IPv6Network, ip_network
from pathlib import Path
from typing import IO, Any, Literal

from pydantic import ByteSize, Field, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from domain.addresses import POOL_MODE, TRANSACTION_MODE, RedisUrl
from domain.catalog import Catalog
from domain.errors import ExpectedError

ROOT = Path(__file__).resolve().parent
PREFIX = "CELERIAC_"


class Settings(BaseSettings):
    """Units are in the names. The defaults suit a single machine; in production, set at least the two URLs.

    Fields that may contain a password appear neither in the repr nor in a ValidationError."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="forbid", hide_input_in_errors=True)

    # postgresql://user:password@host:port/name
    database_url: str = Field(default="postgresql://localhost/celeriac", repr=False)
    redis_url: str = Field(default="redis://localhost:6379/0", repr=False)  # also rediss:// and unix:///path/to?db=0
    models_file: Path = ROOT / "models.toml"
    models_dir: Path | None = None  # where `celeriac models pull` stores models; default: the folder models of data_dir
    default_model: str | None = None  # of requests without a model, and of workers; default: the first of models_file
    data_dir: Path = ROOT / ".celeriac"  # the data of the embedded servers and the logs of `celeriac up`

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    api_processes: int = Field(default=1, ge=1, le=64)  # on that port
    flower_port: int = Field(default=5555, ge=0, le=65535)
    maintenance_host: str = "127.0.0.1"  # where a maintenance process serves its /health and /metrics
    maintenance_port: int = Field(default=0, ge=0, le=65535)  # 0: any free port, written to its log
    maintenance_silence_seconds: float = Field(default=15.0, gt=0)  # without a tick before /health reports it
    auth: Literal["none", "api_key"] = "none"  # "none" is allowed only on the loopback interface
    allowed_hosts: str = ""  # host names besides localhost for the API and Flower without keys, comma-separated
    root_path: str = Field(default="", pattern=r"^(/[A-Za-z0-9._~-]+)*$")  # under which a proxy serves the API
    cors_origins: str = ""  # origins of pages that may use the API, such as https://app.example.com, comma-separated
    api_url: str | None = None  # of the API, for CLI commands such as `celeriac submit`; default: this machine
    api_key: str | None = Field(default=None, repr=False)  # the key that these commands send
    bootstrap_api_key: str | None = Field(default=None, repr=False)  # created by migrate for the default tenant
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    log_format: Literal["json", "text"] = "json"

    # The job protocol (docs/job_lifecycle.md)
    lease_seconds: float = Field(default=15.0, gt=0)  # renewed by every chunk commit, and at least every third of this
    lease_grace_seconds: float = Field(default=2.0, ge=0)  # how long after its lease expires a job is rescued
    max_failures: int = Field(default=3, ge=0)  # lost or crashed attempts before a job fails for good
    max_poison_jobs_per_hour: int = Field(default=3, ge=0)  # per tenant; beyond this, all of its jobs run alone
    revision_policy: Literal["restart", "wait", "fail"] = "restart"  # for a job whose revision is no longer served
    revision_seconds: float = Field(default=300.0, gt=0)  # how long such a job waits for its revision before that
    pause_quantum_seconds: float = Field(default=2.0, gt=0)  # a job's turn, before it may be paused for other tenants
    stall_seconds: float = Field(default=60.0, gt=0)  # without a token until an attempt is stalled; 10 x in prefill
    flush_min_seconds: float = Field(default=0.05, gt=0)  # between two chunk commits of the running batch
    flush_max_seconds: float = Field(default=0.5, gt=0)
    dispatch_window_factor: float = Field(default=2.0, gt=0)  # messages per queue: this x the live slots
    dispatch_window_min: int = Field(default=16, ge=1)
    janitor_interval_seconds: float = Field(default=1.0, gt=0)
    result_ttl_seconds: int = Field(default=86_400, ge=60)  # how long a finished job is kept
    archive_url: str | None = None  # where jobs are written to before they are deleted: s3://bucket/prefix

    # The ledger (docs/usage.md)
    usage_days: int = Field(default=400, ge=1, le=36_500)  # how long its records are kept
    currency: str = Field(default="USD", pattern=r"^[A-Z]{3}$")  # of the prices in models.toml

    # Bounds
    max_body_bytes: int = Field(default=1_048_576, ge=1024)
    max_queued_jobs: int = Field(default=10_000, ge=1)  # per tenant, for tenants without their own limit
    max_streams: int = Field(default=4_000, ge=1)  # open SSE streams per API process
    stream_lifetime_seconds: float = Field(default=3_600.0, gt=0)
    stream_heartbeat_seconds: float = Field(default=15.0, gt=0)
    api_drain_seconds: float = Field(default=20.0, ge=0)  # for answers that nobody can resume, after SIGTERM
    no_workers_seconds: float = Field(default=60.0, gt=0)  # without a live worker, before waiting requests are refused
    # Which requests may get an earlier job's answer.
    response_cache: Literal["off", "asked", "greedy", "seeded"] = "asked"
    response_cache_seconds: float = Field(default=86_400.0, gt=0)  # how old such an answer may be
    request_timeout_seconds: float = Field(default=30.0, gt=0)  # of /api/v1/infer
    disconnect_grace_seconds: float = Field(default=10.0, ge=0)  # before a job whose only client left is cancelled

    # Webhooks (docs/webhooks.md)
    webhook_ports: str = Field(default="443,8443", pattern=r"^[0-9]{1,5}(,[0-9]{1,5})*$")  # the allowed ones
    webhook_private_networks: str = ""  # whose addresses webhooks may reach besides public ones, comma-separated
    webhook_private_targets: bool = False  # allow http, any port and any address, for tests on this machine

    # Celery callbacks (docs/celery.md)
    callback_broker_url: str | None = None  # the broker of clients' Celery applications; default: no callbacks
    callback_queues: str = Field(default="celery", pattern=r"^[^,\s]+(,[^,\s]+)*$")  # of theirs; * and ? are wildcards

    # Files, conversations and batches
    max_file_bytes: int = Field(default=209_715_200, ge=1024)
    max_file_bytes_per_tenant: int = Field(default=10_737_418_240, ge=1024)  # total of all its files
    file_ttl_seconds: int = Field(default=2_592_000, ge=3_600)  # how long a file is kept if its upload sets no time
    max_uploads: int = Field(default=8, ge=1)  # at once, per API process
    conversation_ttl_seconds: int = Field(default=2_592_000, ge=3_600)  # how long a conversation is kept after its use
    max_conversation_bytes_per_tenant: int = Field(default=1_073_741_824, ge=65_536)  # total of all its conversations
    batch_jobs_in_flight: int = Field(default=256, ge=1)  # per tenant; also at most a quarter of its queue
    batch_reserve: float = Field(default=0.25, ge=0, lt=1)  # the share of a model's slots that batch lines never take

    # The worker
    worker_model: str | None = None  # the models that a GPU worker serves, comma-separated; default: the first one
    worker_memory: ByteSize | None = Field(default=None, gt=0)  # of all models of a worker, such as 20GiB
    model_residency_seconds: float = Field(default=10.0, ge=0)  # a busy model's, before it makes room for another
    worker_name: str | None = None  # its Celery node name, unique in the installation; default: random
    worker_metrics_host: str = "127.0.0.1"  # where a GPU worker serves its /metrics, without authentication
    worker_metrics_port: int = Field(default=0, ge=0, le=65535)  # or the next free one; 0: any, written to its log
    lookahead: int | None = Field(default=None, ge=0)  # messages held beyond the free slots; default: slots / 4
    engine_heartbeat_seconds: float = Field(default=10.0, gt=0)  # restarted after three without a sign of life
    engine_load_seconds: float = Field(default=1_800.0, gt=0)  # the longest that a model may take to load
    drain_seconds: float = Field(default=30.0, ge=0)  # how long jobs may run on after SIGTERM, until released

    @field_validator("database_url")
    @classmethod
    def _readable_database(cls, url: str) -> str:
        from sqlalchemy import make_url  # takes a quarter of a second, not needed for the defaults
        from sqlalchemy.exc import ArgumentError

        _refuse_other_schemes(url, "postgresql://", "postgres://", "postgresql+psycopg://")
        with _without_quoting(ValueError, ArgumentError):
            if "@" in (make_url(url).host or ""):
                raise ValueError("the host contains part of a password")
            mode = make_url(url).query.get(POOL_MODE, "session")
        if mode not in ("session", TRANSACTION_MODE):
            raise ValueError(f"{POOL_MODE} is {mode!r}; give {TRANSACTION_MODE}, or leave it out")
        return url

    @field_validator("redis_url")
    @classmethod
    def _readable_redis(cls, url: str) -> str:
        """Normalise the URL to redis-py's form, with all TLS options explicit."""
        return RedisUrl.read(url).for_redis

    @field_validator("webhook_private_networks")
    @classmethod
    def _readable_networks(cls, text: str) -> str:
        for item in _items(text):
            try:
                ip_network(item)
            except ValueError:
                raise ValueError(f"{item[:80]!r} is not a network; use a form like 10.1.0.0/16 or fd12::/48") from None
        return text

    @field_validator("allowed_hosts")
    @classmethod
    def _readable_hosts(cls, text: str) -> str:
        for name in _items(text):
            if not re.fullmatch(r"(\*\.)?[A-Za-z0-9_.\-]+|[0-9a-f:]+", name):
                raise ValueError(
                    f"{name[:80]!r} is not a host name; use names without scheme and port, or *.example.com"
                )
        return text

    @field_validator("cors_origins")
    @classmethod
    def _readable_origins(cls, text: str) -> str:
        for origin in _items(text):
            if origin not in ("*", "null") and not re.fullmatch(
                r"[a-z][a-z0-9+.\-]*://[^/\s*?#@]+", origin, re.IGNORECASE
            ):
                raise ValueError(
                    f"{origin[:80]!r} is not an origin; use a form like https://app.example.com, without a path"
                )
        return text

    @property
    def worker_models(self) -> tuple[str, ...]:
        """The ids of the models that a worker serves; empty: the first one of the catalogue."""
        return tuple(dict.fromkeys(_items(self.worker_model or "")))

    @property
    def store_dir(self) -> Path:
        """The folder of the models that were pulled."""
        return self.models_dir or self.data_dir / "models"

    def load_catalog(self) -> Catalog:
        """The models that are served: those of models_file and of the store. Raises as `Catalog.load` does."""
        return Catalog.load(self.models_file, store=self.store_dir, default_id=self.default_model)

    @property
    def allowed_host_names(self) -> tuple[str, ...]:
        return _items(self.allowed_hosts)

    @property
    def webhook_networks(self) -> tuple[IPv4Network | IPv6Network, ...]:
        return tuple(map(ip_network, _items(self.webhook_private_networks)))

    @property
    def cors_origin_list(self) -> tuple[str, ...]:
        return _items(self.cors_origins)

    @property
    def idle_transaction_seconds(self) -> float:
        """After this long PostgreSQL ends an idle transaction. A process that freezes in a transaction holds locks that
        others may need to renew their leases, which they do every third of a lease."""
        return self.lease_seconds / 3

    @property
    def redis_parts(self) -> RedisUrl:
        """`redis_url`, parsed: Celery needs its parts."""
        return RedisUrl.read(self.redis_url)


def _items(text: str) -> tuple[str, ...]:
    """The items of a comma-separated list."""
    return tuple(item.strip() for item in text.split(",") if item.strip())


def _refuse_other_schemes(url: str, *schemes: str) -> None:
    """Raise ValueError without repeating the URL: if the scheme is missing, it may begin with a password."""
    if not url.startswith(schemes):
        raise ValueError(f"it does not begin with one of {', '.join(schemes)}")


@contextmanager
def _without_quoting(*kinds: type[Exception]) -> Iterator[None]:
    """Replace a parser's message, as it quotes part of the malformed URL, often part of the password."""
    try:
        yield
    except kinds:
        raise ValueError(
            "it is not of the form scheme://user:password@host:port/name with a number as port; "
            "write / as %2F, @ as %40, : as %3A, # as %23 and ? as %3F in a password"
        ) from None


class UnknownSetting(ExpectedError):
    """An environment variable with our prefix that no setting reads."""


def refuse_unknown_variables(environment: dict[str, str]) -> None:
    """Raise UnknownSetting for a CELERIAC_* variable that no setting reads, so that typos are noticed."""
    known = {PREFIX + name.upper() for name in Settings.model_fields}
    for name in environment:
        if not name.upper().startswith(PREFIX) or name.upper() in known:
            continue
        close = difflib.get_close_matches(name.upper(), known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"the settings are: {', '.join(sorted(known))}"
        raise UnknownSetting(f"{name} is set but there is no such setting; {hint}")


@lru_cache(maxsize=1)
def get_settings() -> Settings:
    """The process's settings, read once."""
    refuse_unknown_variables(dict(os.environ))
    return Settings()


# For commands without settings of their own: the servers that `celeriac up` runs on this data folder

#: An environment variable with the names of the settings that were found in the note of `celeriac up`, not set by the
#: user.
FOUND = "_CELERIAC_FOUND"


def find_running(data_dir: Path) -> dict[str, Any] | None:
    """The note of the `celeriac up` that is running on this data folder; None if there is none."""
    try:
        file = (data_dir / "up.json").open()
    except OSError:  # there is no note, or we may not read it
        return None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return note_in(file)
    return None


def note_in(file: IO[str]) -> dict[str, Any]:
    """The settings in a note; empty if it cannot be read."""
    try:
        return dict(json.loads(file.read()))
    except (ValueError, OSError):
        return {}


def moved_servers(data_dir: Path) -> dict[str, str]:
    """The URLs, by setting, that `celeriac up` now has in place of those that this command found."""
    found = [name for name in os.environ.get(FOUND, "").split(",") if name]
    running = find_running(data_dir) or {}
    known = {name: os.environ[PREFIX + name.upper()] for name in found}
    return {name: running[name] for name in found if running.get(name, known[name]) != known[name]}
