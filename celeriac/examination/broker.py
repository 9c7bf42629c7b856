"""Checks of Redis: whether it answers, is safe, keeps what it is given, and lets us do what we need."""

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.exceptions import NoPermissionError, OutOfMemoryError, ResponseError
from redis.retry import Retry

from celeriac.examination.results import CheckResult, clock_result, fail, ok, warn
from domain.addresses import RedisUrl, is_loopback
from settings import Settings
from storage import certificates

MIN_REDIS = (6, 2)
ANSWER_SECONDS = 5.0
FULL = 0.8  # of maxmemory
UNVERIFIED = "none"  # of ssl_cert_reqs

#: A key that does not exist for each pattern of the ACL in docs/operations.md.
KEY_BY_PATTERN = {
    "celeriac.*": "celeriac.doctor",
    "celeriac-maintenance*": "celeriac-maintenance.doctor",
    "unacked*": "unacked.doctor",
    "_kombu.*": "_kombu.binding.doctor",
    "*.pidbox*": "doctor.reply.celery.pidbox",
    "celeryev.*": "celeryev.doctor",
}
PROBE = "celeriac.doctor"
CHANNEL = "celeriac:stream:doctor"
PATTERN = "/0.doctor*"


def broker_results(settings: Settings) -> Iterator[CheckResult]:
    try:
        with redis.Redis.from_url(
            settings.redis_url,
            decode_responses=True,
            socket_timeout=ANSWER_SECONDS,
            socket_connect_timeout=ANSWER_SECONDS,
            retry=Retry(NoBackoff(), 0),
        ) as client:
            client.ping()
            yield from _server_results(client, settings.redis_parts)
            yield _permission_result(client)
            yield _write_result(client)
        server = certificates.redis_server(settings.redis_parts)
        if server is not None and (seen := server.expires_soon()) is not None:
            yield warn("certificates", seen, certificates.RENEW)
    except ResponseError as exc:
        yield fail("Redis", f"it refuses us: {exc}", "see its log and its ACL; its disk may be full")
    except (redis.RedisError, OSError) as exc:
        remedy = "start it with celeriac up, or check CELERIAC_REDIS_URL: host, password, and rediss:// for TLS"
        yield fail("Redis", f"it refuses us: {exc}", remedy)


def _server_results(client: "redis.Redis", url: RedisUrl) -> Iterator[CheckResult]:
    info: dict[str, Any] = client.info()
    release = str(info.get("redis_version", "0"))
    seen = f"{'Valkey' if 'valkey_version' in info else 'Redis'} {info.get('valkey_version', release)}, {_tls(url)}"
    if tuple(map(int, release.split(".")[:2])) < MIN_REDIS:
        yield fail("Redis", seen, "upgrade it to Redis 6.2 or newer, or Valkey")
    elif info.get("redis_mode") == "cluster":
        yield fail("Redis", f"{seen}, a cluster", "use one server; clusters are not supported")
    elif info.get("role") == "slave":
        yield fail("Redis", f"{seen}, a replica, which takes no writes", "name the primary in CELERIAC_REDIS_URL")
    elif url.tls.get("ssl_cert_reqs") == UNVERIFIED:
        yield warn("Redis", f"{seen}, whose certificate is not verified", "set ssl_cert_reqs=required in the URL")
    elif not url.credentials and not _is_local(url):
        yield warn("Redis", f"{seen}, without a password", "give it a password; docs/operations.md has the ACL")
    else:
        yield ok("Redis", seen)
    yield _memory_result(info)
    asked_at = time.time()
    seconds, microseconds = client.time()
    server_time = int(seconds) + int(microseconds) / 1e6
    yield clock_result("clock of Redis", server_time, asked_at, time.time(), "run NTP on both machines")


def _tls(url: RedisUrl) -> str:
    return "with TLS" if url.scheme == "rediss" else "without TLS"


def _is_local(url: RedisUrl) -> bool:
    return url.scheme == "unix" or is_loopback(url.where.rpartition(":")[0])


def _memory_result(info: dict[str, Any]) -> CheckResult:
    used, allowed = int(info.get("used_memory", 0)), int(info.get("maxmemory", 0))
    policy = info.get("maxmemory_policy", "noeviction")
    seen = f"{used / 2**20:,.0f} MiB used" + (f" of {allowed / 2**20:,.0f} MiB" if allowed else "") + f", {policy}"
    if policy != "noeviction":  # also without a limit, which may be set while it runs
        return warn("memory of Redis", seen, "CONFIG SET maxmemory-policy noeviction, or it may silently drop queues")
    if allowed and used > FULL * allowed:
        return warn("memory of Redis", seen, "raise maxmemory, or see in celeriac top why so much waits")
    return ok("memory of Redis", seen)


def _permission_result(client: "redis.Redis") -> CheckResult:
    """Tries what we need on names of every kind, without changing anything."""
    attempts: dict[str, Callable[[], object]] = {
        f"the keys {pattern}": partial(client.llen, key) for pattern, key in KEY_BY_PATTERN.items()
    }
    attempts["publishing"] = partial(client.publish, CHANNEL, "")
    attempts["scripts"] = partial(client.eval, "return 1", 0)
    attempts["patterns of channels"] = partial(_subscribe, client)
    refused = []
    for what, attempt in attempts.items():
        try:
            attempt()
        except NoPermissionError:
            refused.append(what)
        except ResponseError:  # such as for want of memory, which `_write_result` names
            continue
    if refused:
        return fail("permissions", f"Redis refuses us {', '.join(refused)}", "see the ACL in docs/operations.md#redis")
    return ok("permissions", "Redis lets us use all that we need")


def _write_result(client: "redis.Redis") -> CheckResult:
    """A key that is gone at once."""
    try:
        client.set(PROBE, "", px=1)
    except OutOfMemoryError:
        return fail("writes to Redis", "it has no memory left", "raise its maxmemory; nothing is lost meanwhile")
    except ResponseError as exc:
        return fail("writes to Redis", f"it refuses them: {exc}", "see its log: its disk may be full")
    return ok("writes to Redis", "it takes them")


def _subscribe(client: "redis.Redis") -> None:
    subscription: Any = client.pubsub()  # type: ignore[no-untyped-call]
    with subscription:
        subscription.psubscribe(PATTERN)
        subscription.get_message(timeout=ANSWER_SECONDS)
