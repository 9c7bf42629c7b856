"""What every client program prints: one JSON object with the fate of each of its cases. Runs on any Python's clients,
so it knows nothing of ours."""

import json
import sys
import time
import traceback
from collections.abc import Callable, Sequence


def run(cases: Sequence[Callable[[], None]], **figures: object) -> None:
    """Run all of them, whatever some of them raise."""
    fates = {}
    for case in cases:
        # The last one is where a program hangs, or what it is slow at.
        print(f"{time.process_time():.0f} s of CPU: {case.__name__}", file=sys.stderr, flush=True)
        try:
            case()
            fates[case.__name__] = "ok"
        except Exception:  # whatever it is, the other cases run, and the test shows it
            fates[case.__name__] = traceback.format_exc(limit=-4)
    json.dump({"cases": fates, **figures}, sys.stdout)
