"""How many files and connections this process may have open at once.

Most systems allow a process 1,024 unless it asks for more. A server that has run out accepts no connection any more,
not even that of a health check, so ours ask for all that they may have.
"""

import resource

RESERVED = 256  # for the database, Redis, short requests, uploads and files


def raise_limit() -> int:
    """Allow this process as many as it may have, and return the number."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return highest_limit()


def highest_limit() -> int:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    return 2**31 if hard == resource.RLIM_INFINITY else hard
