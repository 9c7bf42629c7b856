"""What the back ends that use our sampler promise about what is drawn, where a text ends, and a cache that is full."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from transformers import AutoModelForCausalLM

from domain.catalog import ModelSpec
from domain.errors import CeleriacError
from gpu_worker.engine.backends import Backend, import_backend
from gpu_worker.engine_process.frames import AddJob
from tests import llama_cpp_model, vllm_model
from tests.integration.test_engine_contract import NUM_SLOTS, PROMPT, SPECS, Transcript, hear, make_add, run, step
from tests.llama_cpp_model import MINI
from tests.lora_files import merged, write_adapter


@pytest.fixture(scope="module")
def mini() -> Any:
    return AutoModelForCausalLM.from_pretrained(MINI, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def adapters(mini: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    some = {"targets": ("q_proj", "down_proj"), "r": 8, "use_rslora": True}
    return {
        "warm": write_adapter(folder / "warm", mini, seed=1),
        "cold": write_adapter(folder / "cold", mini, seed=2, **some),  # type: ignore[arg-type]
    }


@pytest.fixture(scope="module", params=["transformers", "llama_cpp", "vllm"])
def spec(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, adapters: dict[str, Path]
) -> ModelSpec:
    if request.param in ("transformers", "vllm"):
        return SPECS[request.param].model_copy(
            update={"adapters": {name: str(folder) for name, folder in adapters.items()}}
        )
    llama_cpp_model.make_importable()
    folder: Path = llama_cpp_model.write_mini(tmp_path_factory.mktemp("gguf"))
    return SPECS[request.param].model_copy(update={"path": str(folder)})


@pytest.fixture(scope="module")
def backend(spec: ModelSpec) -> Iterator[Backend]:
    with running(spec) as backend:
        yield backend


@contextmanager
def running(spec: ModelSpec) -> Iterator[Backend]:
    if spec.backend == "vllm":
        with vllm_model.running(spec) as process:
            yield process
        return
    backend = import_backend(spec)(spec)
    torch.set_num_threads(1)  # tests run beside each other
    yield backend


def texts_by_token(backend: Backend, command: AddJob) -> list[str]:
    """What each token adds to the text. Text is held back now and then, so each length is run by itself."""
    lengths = range(1, command.max_tokens + 1)
    texts = [run(backend, [msgspec.structs.replace(command, max_tokens=n)])[command.job_id, 0].text for n in lengths]
    return [texts[0], *(later.removeprefix(earlier) for earlier, later in pairwise(texts))]


def test_a_stop_string_is_said_on_request_and_so_is_a_stop_token(backend: Backend) -> None:
    texts = texts_by_token(backend, make_add(max_tokens=20))
    token_ids = run(backend, [make_add(max_tokens=20)])["job", 0].token_ids
    border = next(number for number in range(8, 20) if (texts[number - 1] + texts[number]).isascii())
    stop = texts[border - 1][-1] + texts[border][:1]
    before = "".join(texts).partition(stop)[0]
    asked: dict[str, Any] = {"max_tokens": 20, "include_stop_str_in_output": True}
    stopped = run(backend, [make_add(**asked, stop=[stop])])["job", 0]
    assert (stopped.text, stopped.finish_reasons) == (before + stop, ["stop"])
    last = token_ids[border]
    stopped = run(backend, [make_add(**asked, stop_token_ids=[last])])["job", 0]
    assert (stopped.text, stopped.finish_reasons) == ("".join(texts[: token_ids.index(last) + 1]), ["stop"])


def test_a_bad_word_is_not_completed_and_only_allowed_tokens_are_drawn(backend: Backend) -> None:
    """Also after a resume, when the word was begun before it."""
    free = run(backend, [make_add(max_tokens=12)])["job", 0]
    [first, second, third] = texts_by_token(backend, make_add(max_tokens=12))[4:7]
    word = first + second + third
    plain = run(backend, [make_add(max_tokens=12, bad_words=[word])])["job", 0]
    assert plain.token_ids != free.token_ids
    assert plain.token_ids[:4] == free.token_ids[:4]
    assert word not in plain.text
    resumed = make_add(max_tokens=12, bad_words=[word], committed_token_ids=[plain.token_ids[:6]])
    resumed = msgspec.structs.replace(resumed, num_emitted_chars=[0])
    assert run(backend, [resumed])["job", 0].token_ids == plain.token_ids[6:]
    allowed = sorted({*free.token_ids[2:], 70, 71})
    kept = run(backend, [make_add(max_tokens=12, temperature=1.5, allowed_token_ids=allowed)])["job", 0]
    assert set(kept.token_ids) <= set(allowed)


def test_a_stop_string_across_tokens_is_found_and_no_part_of_it_is_said(backend: Backend) -> None:
    texts = texts_by_token(backend, make_add(max_tokens=30))
    border = next(number for number in range(8, 30) if (texts[number - 1] + texts[number]).isascii())
    stop = texts[border - 1][-1] + texts[border]
    before = "".join(texts).partition(stop)[0]
    stopped = run(backend, [make_add(max_tokens=30, stop=[stop])])["job", 0]
    assert (stopped.text, stopped.finish_reasons) == (before, ["stop"])


def test_a_seed_repeats_its_draws_and_another_draws_otherwise(backend: Backend) -> None:
    drawn: dict[str, Any] = {"temperature": 1.5, "max_tokens": 20}
    said = run(backend, [make_add(f"{seed}-{number}", seed=seed, **drawn) for seed in (1, 2) for number in range(2)])
    assert said["1-0", 0] == said["1-1", 0]
    assert said["2-0", 0] == said["2-1", 0]
    assert said["1-0", 0] != said["2-0", 0]


@pytest.mark.parametrize("params", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}], ids=str)
def test_a_filter_that_leaves_one_token_makes_draws_greedy(backend: Backend, params: dict[str, Any]) -> None:
    greedy = run(backend, [make_add()])["job", 0]
    assert run(backend, [make_add(temperature=1.5, **params)])["job", 0] == greedy


def test_penalties_and_biases_change_what_is_drawn(backend: Backend) -> None:
    greedy = run(backend, [make_add(max_tokens=40)])["job", 0].token_ids
    wanted = greedy[0] + 1
    commands = [
        make_add("banned", bad_token_ids=[greedy[0]]),
        make_add("less likely", logit_bias={str(greedy[0]): -100.0}),
        make_add("likelier", logit_bias={str(wanted): 100.0}),
        make_add("penalised", max_tokens=40, repetition_penalty=5.0),
        make_add("once each", max_tokens=40, frequency_penalty=2.0, presence_penalty=2.0),
    ]
    said = {job_id: spoken.token_ids for (job_id, _), spoken in run(backend, commands).items()}
    assert greedy[0] not in said["banned"] + said["less likely"]
    assert set(said["likelier"]) == {wanted}
    assert len(set(said["penalised"])) > len(set(greedy))
    assert len(set(said["once each"])) > len(set(greedy))


def test_min_tokens_puts_an_end_off(backend: Backend) -> None:
    greedy = run(backend, [make_add(max_tokens=20)])["job", 0].token_ids
    ended = run(backend, [make_add(max_tokens=20, stop_token_ids=[greedy[2]], min_tokens=10)])["job", 0]
    assert len(ended.token_ids) >= 10


@pytest.mark.parametrize(
    "changes", [{"structured_output": {"regex": "("}}, {"prompt": [10**7]}], ids=["grammar", "token"]
)
def test_a_faulty_job_is_refused_and_its_neighbour_runs_on(backend: Backend, changes: dict[str, Any]) -> None:
    transcript: Transcript = {}
    backend.add(make_add("good"))
    hear(transcript, step(backend))
    with pytest.raises(CeleriacError):
        backend.add(make_add("bad", **changes))
    while backend.has_work:
        hear(transcript, step(backend))
    assert transcript == run(backend, [make_add("good")])


def test_where_the_cache_is_too_small_for_all_some_wait_and_all_say_the_same(backend: Backend, spec: ModelSpec) -> None:
    """Four times 103 tokens do not fit into 256."""
    commands = [make_add(f"job-{number}", prompt=[40, 41, 42 + number], max_tokens=100) for number in range(NUM_SLOTS)]
    with running(spec.model_copy(update={"kv_cache_tokens": 256})) as small:
        crowded = run(small, commands)
        assert small.stats().num_preemptions > 0
    assert crowded == run(backend, commands)


def test_adapters_share_a_batch_and_each_text_is_that_of_a_merged_model(
    backend: Backend, spec: ModelSpec, mini: Any, adapters: dict[str, Path]
) -> None:
    if not spec.adapters:
        pytest.skip("this back end has no adapters")
    greedy = {name: make_add(f"greedy {name}", adapter=name) for name in (None, *adapters)}
    drawn = {name: make_add(f"drawn {name}", adapter=name, temperature=1.0) for name in (None, *adapters)}
    together = run(backend, [*greedy.values(), *drawn.values()])
    for name in (None, *adapters):
        model = mini if name is None else merged(mini, adapters[name])
        assert together[f"greedy {name}", 0].token_ids == most_likely(model, greedy[name].max_tokens)
        for command in (greedy[name], drawn[name]):
            assert run(backend, [command])[command.job_id, 0] == together[command.job_id, 0]
    assert len({spoken.text for spoken in together.values()}) == len(together)


@torch.inference_mode()
def most_likely(model: Any, num_tokens: int) -> list[int]:
    token_ids = list(PROMPT)
    for _ in range(num_tokens):
        token_ids.append(int(model(torch.tensor([token_ids])).logits[0, -1].argmax()))
    return token_ids[len(PROMPT) :]
