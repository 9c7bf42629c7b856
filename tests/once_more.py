"""Run the few tests that have failed beside others once more, alone: python -m tests.once_more (`make test` does).

A test of whole systems may fail because a busy machine starved it, or because it met a real race. One that passes now
is told about loudly, with its first failure further up: it is a bug of the test or of the product, and to be mended.
More than MAX_FAILED failures are never an accident, so they are not tried again.
"""

import json
import sys
from pathlib import Path

import pytest

MAX_FAILED = 3
LAST_FAILED = Path(".pytest_cache/v/cache/lastfailed")


def run() -> int:
    """The exit code of the second run; 1 without a second run."""
    failed = list(json.loads(LAST_FAILED.read_text()))
    if len(failed) > MAX_FAILED:
        print(f"{len(failed)} tests failed; up to {MAX_FAILED} would have been tried once more, alone.")
        return 1
    print(f"\nOnce more, alone: {', '.join(failed)}", flush=True)
    exit_code = pytest.main(failed.copy())
    if exit_code == pytest.ExitCode.OK:
        print(f"FLAKY, to be mended: {', '.join(failed)}. Passed alone, after it had failed beside others.")
    return int(exit_code)


if __name__ == "__main__":
    sys.exit(run())
