"""Memory that is left: of the host, of every control group around us, and what a CPU's cache takes of it."""

import logging
from functools import partial
from pathlib import Path

import pytest
import torch

from gpu_worker.engine.backends import transformers
from gpu_worker.engine.host_memory import anonymous_bytes, available_bytes
from gpu_worker.engine.probe import LayerShape
from tests.engine_driver import CPU, make_engine, tiny_model

GIB = 2**30
BYTES_PER_TOKEN = 2 * 2 * 2 * 16 * 4  # keys and values, layers, heads, numbers in a head, bytes of one


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def make_host(root: Path, *, available: int, groups: str = "") -> None:
    write(root / "proc/meminfo", f"MemTotal: 99999999 kB\nMemAvailable:   {available // 1024} kB\nHugePages_Total: 0\n")
    write(root / "proc/self/cgroup", groups)


def make_group(root: Path, folder: str, *, limit: str | int, usage: int, inactive_file: int = 0) -> None:
    place = root / "sys/fs/cgroup" / folder
    write(place / "memory.max", f"{limit}\n")
    write(place / "memory.current", f"{usage}\n")
    write(place / "memory.stat", f"anon 5\ninactive_file {inactive_file}\nactive_file 7\n")


def make_old_group(root: Path, folder: str, *, limit: int, usage: int, inactive_file: int = 0) -> None:
    place = root / "sys/fs/cgroup/memory" / folder
    write(place / "memory.limit_in_bytes", f"{limit}\n")
    write(place / "memory.usage_in_bytes", f"{usage}\n")
    write(place / "memory.stat", f"inactive_file 1\ntotal_inactive_file {inactive_file}\n")


def test_a_host_without_groups_has_what_the_kernel_calls_available(tmp_path: Path) -> None:
    make_host(tmp_path, available=6 * GIB)
    assert available_bytes(tmp_path) == 6 * GIB


def test_a_containers_limit_counts_on_a_big_host(tmp_path: Path) -> None:
    make_host(tmp_path, available=60 * GIB, groups="0::/\n")
    make_group(tmp_path, "", limit=4 * GIB, usage=GIB, inactive_file=GIB // 2)
    assert available_bytes(tmp_path) == 3.5 * GIB


def test_the_tightest_of_all_groups_around_us_counts(tmp_path: Path) -> None:
    make_host(tmp_path, available=60 * GIB, groups="0::/user/celeriac/worker\n")
    make_group(tmp_path, "user/celeriac/worker", limit="max", usage=GIB)
    make_group(tmp_path, "user/celeriac", limit=8 * GIB, usage=7 * GIB)
    make_group(tmp_path, "user", limit=50 * GIB, usage=10 * GIB)
    assert available_bytes(tmp_path) == GIB


@pytest.mark.parametrize("folder", ["docker/0a1b", ""])
def test_the_first_version_of_groups_is_read_also_where_the_path_is_the_hosts(tmp_path: Path, folder: str) -> None:
    make_host(tmp_path, available=60 * GIB, groups="5:cpu:/docker/0a1b\n4:memory:/docker/0a1b\n0::/\n")
    make_old_group(tmp_path, folder, limit=2 * GIB, usage=GIB, inactive_file=GIB // 4)
    assert available_bytes(tmp_path) == 1.25 * GIB


def test_a_group_that_is_over_its_limit_has_nothing_left(tmp_path: Path) -> None:
    make_host(tmp_path, available=GIB, groups="0::/\n")
    make_group(tmp_path, "", limit=GIB, usage=2 * GIB)
    assert available_bytes(tmp_path) == 0


def test_this_machine_can_be_read() -> None:
    assert available_bytes() > 0
    assert anonymous_bytes() > 0


@pytest.fixture
def on_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(transformers, "available_bytes", partial(available_bytes, tmp_path))
    return tmp_path


def num_cache_tokens(**changes: int | None) -> int:
    return make_engine(tiny_model(), **changes).scheduler.pool.num_tokens


def test_a_cpus_cache_takes_a_quarter_of_what_is_left_and_says_so(
    on_host: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_host(on_host, available=64 * GIB, groups="0::/\n")
    make_group(on_host, "", limit=4 * BYTES_PER_TOKEN * 1024 + GIB, usage=GIB)
    with caplog.at_level(logging.INFO):
        assert num_cache_tokens(kv_cache_tokens=None, max_num_seqs=1000) == 1024
    [line] = [record.getMessage() for record in caplog.records if "key/value cache" in record.getMessage()]
    assert line == "key/value cache of tiny: 1024 tokens, 0 MiB, limited by memory"


def test_a_cache_is_no_larger_than_its_sequences_can_use(on_host: Path) -> None:
    make_host(on_host, available=64 * GIB)
    assert num_cache_tokens(kv_cache_tokens=None, max_num_seqs=3) == 3 * 256


def test_one_text_of_full_length_may_take_half_of_a_tight_machine(on_host: Path) -> None:
    make_host(on_host, available=2 * BYTES_PER_TOKEN * 256)
    assert num_cache_tokens(kv_cache_tokens=None) == 256


def test_a_machine_without_room_for_one_text_is_refused_with_the_figures(on_host: Path) -> None:
    make_host(on_host, available=BYTES_PER_TOKEN * 256)
    with pytest.raises(ValueError, match="room for 64 tokens, at 512 bytes each"):
        num_cache_tokens(kv_cache_tokens=None)


def test_a_caches_pages_are_taken_as_they_are_used() -> None:
    shape = LayerShape(
        key_shape=(4, 64),
        value_shape=(4, 64),
        dtype=torch.bfloat16,
        window=None,
        num_heads=4,
        scale=1.0,
        softcap=None,
        has_sinks=False,
    )
    before = anonymous_bytes()
    cache = shape.allocate_blocks(2**15, 16, CPU)
    assert cache.keys.shape == cache.values.shape == (2**15, 4, 16, 64)
    assert cache.keys.nbytes == 2**28
    assert anonymous_bytes() - before < 2**25
    assert not cache.keys[-1].any()
    cache.keys[:8] = 1.0
    assert cache.keys[:9].sum() == 8 * 4 * 16 * 64
    assert anonymous_bytes() - before < 2**25
