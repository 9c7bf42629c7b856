"""What a process says of its own times: the histograms of /metrics between two moments."""

from collections.abc import Mapping

import httpx
from prometheus_client.parser import text_string_to_metric_families

Buckets = Mapping[float, float]  # how many were at most so many seconds


async def histogram(client: httpx.AsyncClient, name: str, **labels: str) -> Buckets:
    """The client's key must have the scope `metrics`."""
    text = (await client.get("/metrics")).raise_for_status().text
    buckets: dict[float, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == f"{name}_bucket" and labels.items() <= sample.labels.items():
                bound = float(sample.labels["le"])
                buckets[bound] = buckets.get(bound, 0.0) + sample.value
    return buckets


def quantile(before: Buckets, after: Buckets, share: float) -> float:
    """Of what was observed in between, by a straight line within its bucket; 0 if nothing was."""
    counts = {bound: after[bound] - before.get(bound, 0.0) for bound in sorted(after)}
    wanted = share * max(counts.values(), default=0.0)
    last_bound = last_count = 0.0
    for bound, count in counts.items():
        if count >= wanted and count > last_count:
            if bound == float("inf"):
                return last_bound
            return last_bound + (bound - last_bound) * (wanted - last_count) / (count - last_count)
        last_bound, last_count = bound, count
    return last_bound
