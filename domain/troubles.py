"""What a process may find wrong with itself, and tells with its heartbeat, since nobody else can see it."""

from enum import StrEnum


class Trouble(StrEnum):
    REDIS = "process_redis"
    DATABASE = "process_database"
    ENGINE_STUCK = "engine_stuck"
    ENGINE_ENDED = "engine_ended"
    MODEL = "model_failed"
    CLAIMS = "claims_fail"
    CLOCK = "clock"
    LOG = "log_failed"
    ARCHIVE = "archive_failed"


#: What such a process does, and what to do about it. Anyone may read this.
WORDS = {
    Trouble.REDIS: (
        "cannot reach Redis",
        "see the network between them and its CELERIAC_REDIS_URL; jobs go on through PostgreSQL, more slowly",
    ),
    Trouble.DATABASE: (
        "waits long for the database",
        "see the network between them; what it writes, and so what clients read, is late",
    ),
    Trouble.ENGINE_STUCK: (
        "has an engine that makes no progress",
        "one that hangs is replaced by itself; see its device and its log",
    ),
    Trouble.ENGINE_ENDED: ("has lost its engine", "another one is started; its log has the last words"),
    Trouble.MODEL: ("cannot serve its model", "mend its files, its memory or models.toml, then start it again"),
    Trouble.CLAIMS: (
        "cannot claim jobs",
        "its log has the database's error; it tries again less and less often, and its jobs wait or run elsewhere",
    ),
    Trouble.CLOCK: ("has a clock that differs from the database's", "run NTP on its machine"),
    Trouble.LOG: ("cannot write its log", "make room on the disk of its log"),
    Trouble.ARCHIVE: (
        "cannot write the archive",
        "see its log, CELERIAC_ARCHIVE_URL and the AWS_* variables; jobs that are due are kept",
    ),
}
