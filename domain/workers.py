"""What a GPU worker is at."""

from enum import StrEnum


class WorkerState(StrEnum):
    """Only a `ready` worker takes jobs."""

    LOADING = "loading"  # its engine is being started, or started again
    READY = "ready"
    DRAINING = "draining"  # it takes no more; what runs may end
    UNLOADED = "unloaded"  # it has no engine process, and waits for its model to be loaded
