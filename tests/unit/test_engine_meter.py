"""What engines count becomes the metrics of their worker, one engine after the other."""

from gpu_worker.engine_process.frames import EngineStats
from gpu_worker.threads import EngineMeter
from metrics import Process, registries

MODEL = "metered-model"


def value_of(name: str) -> float | None:
    return registries[Process.WORKER].get_sample_value(f"celeriac_engine_{name}", {"model": MODEL})


def figures() -> dict[str, float | None]:
    names = (
        "steps_total",
        "preemptions_total",
        "computed_prompt_tokens_total",
        "prefix_cache_queried_tokens_total",
        "prefix_cache_hit_tokens_total",
        "sequences_running",
        "sequences_waiting",
        "kv_cache_usage_ratio",
        "memory_bytes",
    )
    return {name: value_of(name) for name in names}


def test_counters_go_on_over_an_engines_end_and_gauges_do_not() -> None:
    meter = EngineMeter(MODEL)
    assert set(figures().values()) == {0.0}
    first = EngineStats(
        num_steps=10,
        num_running=3,
        num_waiting=2,
        num_preemptions=1,
        num_prompt_tokens=40,
        num_prefix_cache_queries=64,
        num_prefix_cache_hits=16,
        cache_usage=0.5,
        memory_bytes=1000,
    )
    meter.stats = first
    meter.count()
    meter.count()  # nothing came between
    assert list(figures().values()) == [10, 1, 40, 64, 16, 3, 2, 0.5, 1000]

    meter.stats = EngineStats(
        num_steps=15, num_preemptions=1, num_prompt_tokens=50, num_prefix_cache_queries=64, num_prefix_cache_hits=16
    )
    meter.forget_engine()  # with what it said last
    assert list(figures().values()) == [15, 1, 50, 64, 16, 0, 0, 0, 0]

    meter.stats = EngineStats(num_steps=2, num_running=1, num_prefix_cache_queries=8, num_prefix_cache_hits=8)
    meter.count()
    assert list(figures().values()) == [17, 1, 50, 72, 24, 1, 0, 0, 0]
