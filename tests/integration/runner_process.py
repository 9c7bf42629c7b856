"""A JobRunner in a process of its own, to be stopped and killed: `python -m tests.integration.runner_process ID ...`.

It offers itself the ids, writes one line per event to stdout, and runs until it is killed.
"""

import os
import signal
import sys
import threading
from uuid import UUID, uuid4

from gpu_worker.serving import JobRunner
from gpu_worker.threads import RunnerEvent, RunnerEventKind
from tests.integration.runner_harness import MODEL


def write(event: RunnerEvent) -> None:
    if event.kind is not RunnerEventKind.SPENT:  # what happens to jobs, not to tickets
        print(event.kind, event.job_id, flush=True)


def main() -> None:
    runner = JobRunner(
        model=MODEL,
        owner=uuid4(),
        hostname="process@test",
        on_event=write,
        on_unhealthy=lambda failure: os.kill(os.getpid(), signal.SIGKILL),
    )
    runner.start()
    for job_id in sys.argv[1:]:
        runner.offer(UUID(job_id))
    threading.Event().wait()


if __name__ == "__main__":
    main()
