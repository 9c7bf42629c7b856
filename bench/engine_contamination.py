"""A long run of the contamination oracle: random concurrent traces against the solo run of every request.

    python bench/engine_contamination.py --traces 2000 --seed 1

Cancelled, preempted, resumed, prefix-sharing and failing requests in any mix of sampling parameters, on a tiny random
Llama in float32 (the embedded model's layout). The last line is one JSON object; the exit status is 1 if any request
was contaminated. A difference counts as a tie if the solo run's scores of the two tokens are within 1e-4.
"""

import argparse
import json
import logging
import sys
import time
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.engine_traces import Report, run_traces

TRACES_PER_ORACLE = 250  # then come new jobs, a new model and cold caches


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    logging.disable(logging.CRITICAL)  # the engine's failures are intended
    started = time.monotonic()
    reports: list[Report] = []
    for number, start in enumerate(range(0, arguments.traces, TRACES_PER_ORACLE)):
        *_, report = run_traces(arguments.seed + number, min(TRACES_PER_ORACLE, arguments.traces - start))
        reports.append(report)
        print(f"{start + report.num_traces} traces, {time.monotonic() - started:.0f} s: {report}", flush=True)
    totals = {
        name: sum(asdict(report)[name] for report in reports) for name in asdict(reports[0]) if name.startswith("num_")
    }
    contaminated = [line for report in reports for line in report.contaminated]
    print("\n".join(contaminated[:20]))
    print(json.dumps({"bench": "engine_contamination", **totals, "num_contaminated": len(contaminated)}))
    sys.exit(bool(contaminated))


if __name__ == "__main__":
    main()
