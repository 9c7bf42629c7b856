"""The causes that `causes` brings about, and by which words each witness names it."""

import signal

from tests.chaos.cause_acts import (
    ask_for_unserved,
    break_archive,
    break_model,
    change_password,
    configure_redis,
    cut,
    drain_all,
    fill_disk,
    fill_disk_to_the_log,
    fill_log,
    freeze,
    freeze_server,
    kill,
    kill_engines,
    lock_table,
    make_replica,
    refuse_us,
    restart_with,
    set_schema_back,
    sit_on_a_row,
    slow_down,
    stop_server,
    strike_engine,
    take_no_writes,
    use_up_connections,
)
from tests.chaos.cause_scene import Cause

AWAY = r"PostgreSQL gives no connection: (nothing listens|it is st|it recovers)|the database does not answer"
HANGS = r"the database does not answer within"
DOCTOR_AWAY = r"fail  database: it does not answer"
DOCTOR_DATABASE = r"it sees that (the database does not answer|PostgreSQL gives no connection)"
SILENT = r"a worker is silent \(of fake"

CAUSES = [
    Cause("PostgreSQL is stopped", stop_server("postgres"), AWAY, DOCTOR_AWAY, "database_unavailable"),
    Cause("PostgreSQL is frozen", freeze_server("postgres"), HANGS, DOCTOR_AWAY, "database_unavailable"),
    Cause(
        "PostgreSQL's disk is full",
        fill_disk,
        r"disk is full",
        r"fail  disk of the database: it is full",
        "database_full",
        needs_small_disk=True,
    ),
    Cause(
        "PostgreSQL's disk is full to its log",
        fill_disk_to_the_log,
        f"{AWAY}|disk is full",
        f"{DOCTOR_AWAY}|it is full",
        "database_unavailable|database_full",
        needs_small_disk=True,
    ),
    Cause("a table is locked", lock_table("jobs"), r"somebody\): end", r"fail  locks: .*somebody", "database_locked"),
    Cause(
        "another table is locked", lock_table("workers"), r"somebody\): end", r"fail  locks: .*some", "database_locked"
    ),
    Cause(
        "no connection is left",
        use_up_connections,
        r"connections of PostgreSQL are in use|no connection: raise",
        r"fail  connections: none is left|connections are in use",
        "database_connections",
    ),
    Cause(
        "a transaction is left open", sit_on_a_row, r"somebody\): end", r"fail  locks: .*somebody", "database_locked"
    ),
    Cause(
        "PostgreSQL takes no writes",
        take_no_writes,
        "PostgreSQL takes no writes",
        "fail  disk of the database: it takes no writes",
        "database_read_only",
    ),
    Cause("PostgreSQL refuses our user", refuse_us, "refuses our user", r"fail  database: .*pg_hba", "database_unavai"),
    Cause(
        "PostgreSQL answers slowly",
        slow_down("api-1 to postgres"),
        "for the simplest query",
        "for the simplest query",
        "database_slow",
    ),
    Cause(
        "the schema is too old", set_schema_back, "run celeriac migrate", "fail  schema: it is at", "database_schema"
    ),
    Cause("Redis is stopped", stop_server("redis"), "Redis does not answer", "fail  Redis", "redis_unavailable"),
    Cause("Redis is frozen", freeze_server("redis"), "Redis does not answer", "fail  Redis", "redis_unavailable"),
    Cause(
        "Redis is full",
        configure_redis("maxmemory", "1", "0"),
        "Redis has no memory",
        "fail  writes to Redis: it has no memory left",
        "redis_full",
    ),
    Cause(
        "Redis takes no writes",
        configure_redis("min-replicas-to-write", "1", "0"),
        "Redis refuses to write",
        "fail  writes to Redis",
        "redis_refuses",
    ),
    Cause("Redis is a replica", make_replica, "Redis refuses to write", "fail  Redis: .*replica", "redis_refuses"),
    Cause("Redis has another password", change_password, "Redis refuses", "fail  Redis", "redis_refuses"),
    Cause(
        "an API is cut off from PostgreSQL", cut("api-1 to postgres"), HANGS, DOCTOR_DATABASE, "database_unavailable"
    ),
    Cause(
        "an API is cut off from Redis",
        cut("api-1 to redis"),
        "Redis does not answer",
        "it sees that Redis does not answer",
        "redis_unavailable",
    ),
    Cause(
        "a worker is cut off from PostgreSQL",
        cut("gpu-1 to postgres"),
        SILENT,
        r"gpu-1\S* \(fake\) has been silent",
        "worker_silent",
    ),
    Cause(
        "a worker is cut off from Redis",
        cut("gpu-1 to redis"),
        "a worker of fake cannot reach Redis",
        r"gpu-1\S* \(fake\): Redis has not answered",
        "process_redis",
    ),
    Cause(
        "a worker is killed",
        kill("gpu-1"),
        SILENT,
        r"gpu-1\S* \(fake\) has been silent",
        "worker_silent",
    ),
    Cause(
        "a worker is frozen",
        freeze("gpu-2"),
        SILENT,
        r"gpu-2\S* \(fake\) has been silent",
        "worker_silent",
    ),
    Cause("all workers are killed", kill("gpu-1", "gpu-2"), "no worker is ready", "fail  workers", "no_worker"),
    Cause(
        "an engine is killed",
        strike_engine("gpu-1", signal.SIGKILL),
        "a worker of fake has lost its engine",
        r"gpu-1\S* \(fake\): its engine has ended",
        "engine_ended",
    ),
    Cause(
        "an engine hangs",
        strike_engine("gpu-2", signal.SIGSTOP),
        "a worker of fake has an engine that makes no progress",
        r"gpu-2\S* \(fake\): its engine: it neither",
        "engine_stuck",
    ),
    Cause("an engine is killed again and again", kill_engines, "lost its engine", "has ended", "CeleriacEngineEnds"),
    Cause(
        "a worker is started again without its model's files",
        break_model,
        "a worker of fake cannot serve its model",
        r"gpu-1\S* \(fake\): .*nowhere",
        "model_failed",
    ),
    Cause(
        "no worker serves a model",
        ask_for_unserved,
        "jobs of unserved have been waiting for worker",
        r"unserved: none is alive; 1 jobs wait",
        "jobs_wait",
    ),
    Cause(
        "all workers are drained",
        drain_all,
        "jobs of fake have been waiting for pause",
        "2 drained",
        "jobs_wait",
    ),
    Cause(
        "the archive cannot be written", break_archive, "cannot write the archive", "the archive at", "archive_failed"
    ),
    Cause("an API's log is full", fill_log, "an API cannot write its log", "its log takes no lines", "log_failed"),
    Cause(
        "maintenance is killed",
        kill("maintenance"),
        "maintenance is silent",
        "fail  maintenance: it is silent",
        "maintenance_silent",
    ),
    Cause(
        "maintenance is frozen",
        freeze("maintenance"),
        "maintenance is silent",
        "fail  maintenance: it is silent",
        "maintenance_silent",
    ),
    Cause("an API is killed", kill("api-2"), "an API is silent", r"api \d+ on \S+ has been silent", "process_silent"),
    Cause("an API is frozen", freeze("api-2"), "an API is silent", r"api \d+ on \S+ has been silent", "process_silent"),
    Cause(
        "an API's clock is off",
        restart_with("api-1", LD_PRELOAD="CLOCK"),
        "clock is 90.* ahead",
        "clock is 90.* ahead",
        "clock",
    ),
]
