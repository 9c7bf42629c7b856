"""What every engine back end promises, held against each of them: gpu_worker/engine/backends/__init__.py."""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from domain.catalog import LlamaCppOptions, ModelSpec, RemoteOptions
from domain.errors import CeleriacError, ContextLengthExceeded
from domain.requests import TokenLogprob
from gpu_worker.engine.backends import Backend, StepMember, import_backend
from gpu_worker.engine.backends.remote import RemoteBackend
from gpu_worker.engine_process.frames import AddJob, EmbedJob, SequenceOutput, StepDone
from settings import ROOT
from tests import llama_cpp_model, vllm_model
from tests.remote_server import second_celeriac

pytestmark = pytest.mark.slow

PROMPT = [40, 41, 42]
NUM_SLOTS = 4
MAX_MODEL_LEN = 128

LLAMA_CPP = ModelSpec(
    id="celeriac-mini",
    path="made by the fixture",
    backend="llama_cpp",
    max_model_len=MAX_MODEL_LEN,
    max_num_seqs=NUM_SLOTS,
    llama_cpp=LlamaCppOptions(n_threads=1, cache_type="f32"),
)

REMOTE = ModelSpec(
    id="celeriac-mini",
    path=str(ROOT / "models" / "celeriac-mini"),
    backend="remote",
    max_model_len=MAX_MODEL_LEN,
    max_num_seqs=NUM_SLOTS,
    remote=RemoteOptions(url="http://set.by.the.fixture/v1"),
)

SPECS = {
    "remote": REMOTE,
    "llama_cpp": LLAMA_CPP,
    "vllm": ModelSpec(
        id="celeriac-mini",
        path=str(ROOT / "models" / "celeriac-mini"),
        backend="vllm",
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=NUM_SLOTS,
        vllm={"enforce_eager": True},
    ),
    "fake": ModelSpec(
        id="fake",
        path="none",
        backend="fake",
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=NUM_SLOTS,
        fake={"step_seconds": 0.0, "hold_back_chars": 3, "end_chance": 0.02},
    ),
    "transformers": ModelSpec(
        id="celeriac-mini",
        path=str(ROOT / "models" / "celeriac-mini"),
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=NUM_SLOTS,
        device="cpu",
    ),
}


@pytest.fixture(scope="module")
def gguf_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    llama_cpp_model.make_importable()
    return llama_cpp_model.write_mini(tmp_path_factory.mktemp("gguf"))


@pytest.fixture(scope="module")
def remote_spec() -> Iterator[ModelSpec]:
    with second_celeriac() as url:
        yield REMOTE.model_copy(update={"remote": RemoteOptions(url=url)})


@pytest.fixture(scope="module", params=SPECS)
def loaded_backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    spec = SPECS[request.param]
    if request.param == "vllm":
        with vllm_model.running(spec) as process:
            yield process
        return
    if request.param == "remote":
        spec = request.getfixturevalue("remote_spec")
    if request.param == "llama_cpp":
        spec = spec.model_copy(update={"path": str(request.getfixturevalue("gguf_folder"))})
    backend = import_backend(spec)(spec)
    if request.param == "transformers":
        torch.set_num_threads(1)  # tests run beside each other
    yield backend
    if isinstance(backend, RemoteBackend):
        backend.close()


@pytest.fixture
def backend(loaded_backend: Backend) -> Backend:
    """Loaded once for the module; every test leaves it at rest."""
    while loaded_backend.has_work:  # what a failed test left behind
        step(loaded_backend)
    return loaded_backend


@dataclass(slots=True)
class Spoken:
    """All that one sequence said."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reasons: list[str] = field(default_factory=list)
    logprobs: list[dict[str, object]] = field(default_factory=list)

    def hear(self, output: SequenceOutput) -> None:
        assert not self.finish_reasons, "nothing follows the final output"
        self.text += output.text
        self.token_ids += output.token_ids
        self.logprobs += output.logprobs or []
        if output.finish_reason is not None:
            self.finish_reasons.append(output.finish_reason)


Transcript = dict[tuple[str, int], Spoken]


def step(backend: Backend) -> StepDone:
    return backend.step(lambda members: None)


def make_add(job_id: str = "job", prompt: Sequence[int] = PROMPT, **changes: Any) -> AddJob:
    """Greedy and without an end unless told otherwise; names of AddJob's fields are fields, others are params."""
    fields = {name: changes.pop(name) for name in list(changes) if name in AddJob.__struct_fields__}
    params = {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "ignore_eos": True} | changes
    n = int(params.get("n", 1))
    defaults: dict[str, Any] = {
        "attempt": 1,
        "max_tokens": 12,
        "seed": 5,
        "priority": 0,
        "cache_salt": "",
        "committed_token_ids": [[] for _ in range(n)],
        "num_emitted_chars": [0] * n,
        "finished_indexes": [],
    }
    return AddJob(job_id=job_id, prompt_token_ids=list(prompt), params=params, **defaults | fields)


def hear(transcript: Transcript, done: StepDone) -> None:
    assert done.failures == []
    for output in done.outputs:
        transcript.setdefault((output.job_id, output.index), Spoken()).hear(output)


def run(backend: Backend, commands: Iterable[AddJob]) -> Transcript:
    for command in commands:
        backend.add(command)
    transcript: Transcript = {}
    while backend.has_work:
        hear(transcript, step(backend))
    return transcript


def run_until(backend: Backend, transcript: Transcript, sequence: tuple[str, int], num_tokens: int) -> None:
    while len(transcript.get(sequence, Spoken()).token_ids) < num_tokens:
        hear(transcript, step(backend))


def test_more_jobs_than_slots_all_run_to_their_max_tokens(backend: Backend) -> None:
    lengths = {f"job-{number}": 1 + number * 3 % 17 for number in range(3 * NUM_SLOTS)}
    transcript = run(backend, [make_add(name, max_tokens=length) for name, length in lengths.items()])
    for name, length in lengths.items():
        assert len(transcript[name, 0].token_ids) == length
        assert transcript[name, 0].finish_reasons == ["length"]
    assert backend.stats().num_running == backend.stats().num_waiting == 0


def test_a_job_says_the_same_whoever_runs_beside_it(backend: Backend) -> None:
    sampled: dict[str, Any] = {"temperature": 1.0, "seed": 11}
    alone = run(backend, [make_add(**sampled)])
    neighbours = [make_add(f"other-{seed}", temperature=1.0, seed=seed) for seed in range(2 * NUM_SLOTS)]
    beside = run(backend, [*neighbours[:3], make_add(**sampled), *neighbours[3:]])
    assert beside["job", 0] == alone["job", 0]


def test_the_context_length_ends_a_sequence(backend: Backend) -> None:
    transcript = run(backend, [make_add(max_tokens=10_000)])
    assert transcript["job", 0].finish_reasons == ["length"]
    assert len(transcript["job", 0].token_ids) == MAX_MODEL_LEN - len(PROMPT)


def test_a_stop_string_cuts_the_text_before_itself(backend: Backend) -> None:
    text = run(backend, [make_add(max_tokens=40)])["job", 0].text
    stop = text[len(text) // 2 : len(text) // 2 + 3]
    stopped = run(backend, [make_add(max_tokens=40, stop=[stop])])["job", 0]
    assert stopped.text == text[: text.index(stop)]
    assert stopped.finish_reasons == ["stop"]


def test_a_stop_token_ends_the_sequence(backend: Backend) -> None:
    token_ids = run(backend, [make_add()])["job", 0].token_ids
    end = token_ids[6]
    stopped = run(backend, [make_add(stop_token_ids=[end])])["job", 0]
    assert stopped.token_ids == token_ids[: token_ids.index(end) + 1]
    assert stopped.finish_reasons == ["stop"]


def test_each_of_n_sequences_ends_once_and_draws_its_own_tokens(backend: Backend) -> None:
    transcript = run(backend, [make_add(n=3, temperature=1.5, max_tokens=20)])
    assert [transcript["job", index].finish_reasons for index in range(3)] == [["length"]] * 3
    assert len({transcript["job", index].text for index in range(3)}) == 3


def test_logprobs_come_with_every_token_that_asked_for_them(backend: Backend) -> None:
    spoken = run(backend, [make_add(logprobs=1), make_add("quiet")])
    logprobs = [TokenLogprob.model_validate(logprob) for logprob in spoken["job", 0].logprobs]
    assert [logprob.token_id for logprob in logprobs] == spoken["job", 0].token_ids
    assert all(len(logprob.top) == 1 for logprob in logprobs)
    assert spoken["quiet", 0].logprobs == []


@pytest.mark.parametrize("reason", ["cancelled", "deadline"])
def test_an_abort_gives_each_running_sequence_one_final_output(backend: Backend, reason: str) -> None:
    transcript: Transcript = {}
    backend.add(make_add("aborted", n=2, max_tokens=100))
    backend.add(make_add("neighbour", max_tokens=30))
    run_until(backend, transcript, ("aborted", 1), 5)
    backend.abort("aborted", 1, reason)
    assert backend.has_work
    hear(transcript, step(backend))
    assert [transcript["aborted", index].finish_reasons for index in range(2)] == [[reason]] * 2
    while backend.has_work:
        hear(transcript, step(backend))
    whole = run(backend, [make_add("neighbour", max_tokens=30)])
    assert transcript["neighbour", 0] == whole["neighbour", 0]


def test_an_aborted_sequence_has_said_the_text_of_all_its_tokens(backend: Backend) -> None:
    transcript: Transcript = {}
    backend.add(make_add(max_tokens=100))
    run_until(backend, transcript, ("job", 0), 7)
    backend.abort("job", 1, "cancelled")
    hear(transcript, step(backend))
    spoken = transcript["job", 0]
    assert spoken.text == run(backend, [make_add(max_tokens=len(spoken.token_ids))])["job", 0].text


def test_a_waiting_job_is_aborted_with_one_final_output_too(backend: Backend) -> None:
    transcript: Transcript = {}
    for number in range(NUM_SLOTS):
        backend.add(make_add(f"job-{number}", max_tokens=30))
    hear(transcript, step(backend))
    backend.add(make_add("waiting", priority=-1))
    backend.abort("waiting", 1, "cancelled")
    while backend.has_work:
        hear(transcript, step(backend))
    assert transcript["waiting", 0] == Spoken(finish_reasons=["cancelled"])


def test_a_silent_abort_says_nothing_and_the_job_may_come_back(backend: Backend) -> None:
    backend.add(make_add(max_tokens=100))
    step(backend)
    backend.abort("job", 1, "")
    assert not backend.has_work
    assert run(backend, [make_add(attempt=2)]) == run(backend, [make_add(attempt=3)])


def test_an_abort_of_a_job_that_is_not_here_is_ignored(backend: Backend) -> None:
    backend.abort("nobody", 1, "cancelled")
    backend.add(make_add(attempt=2))
    backend.abort("job", 1, "cancelled")
    assert run(backend, [])["job", 0].finish_reasons == ["length"]


@pytest.mark.parametrize("num_committed", [1, 5, 19])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_resumed_job_goes_on_as_if_never_interrupted(
    backend: Backend, num_committed: int, temperature: float, request: pytest.FixtureRequest
) -> None:
    if is_remote(request) and temperature:
        pytest.skip("a remote server draws other numbers after a resume")
    job: dict[str, Any] = {"max_tokens": 20, "temperature": temperature}
    whole = run(backend, [make_add(**job)])["job", 0]
    transcript: Transcript = {}
    backend.add(make_add(**job))
    run_until(backend, transcript, ("job", 0), num_committed)
    backend.abort("job", 1, "")
    before = transcript["job", 0]
    resumed = make_add(**job, attempt=2, committed_token_ids=[before.token_ids], num_emitted_chars=[len(before.text)])
    after = run(backend, [resumed])["job", 0]
    assert before.token_ids + after.token_ids == whole.token_ids
    assert before.text + after.text == whole.text
    assert after.finish_reasons == whole.finish_reasons


def test_only_unfinished_sequences_of_a_resumed_job_run(backend: Backend) -> None:
    job: dict[str, Any] = {"n": 2, "temperature": 1.0, "max_tokens": 10}
    whole = run(backend, [make_add(**job)])
    committed = [whole["job", 0].token_ids, []]
    resumed = make_add(**job, committed_token_ids=committed, num_emitted_chars=[999, 0], finished_indexes=[0])
    assert run(backend, [resumed]) == {("job", 1): whole["job", 1]}


def test_a_prompt_beyond_the_context_is_refused_and_its_neighbours_run_on(backend: Backend) -> None:
    transcript: Transcript = {}
    backend.add(make_add("good"))
    hear(transcript, step(backend))
    with pytest.raises(ContextLengthExceeded):
        backend.add(make_add("bad", prompt=[7] * MAX_MODEL_LEN))
    while backend.has_work:
        hear(transcript, step(backend))
    assert transcript == run(backend, [make_add("good")])


def test_the_members_of_a_step_are_recorded_before_it_speaks(backend: Backend) -> None:
    records: list[Sequence[StepMember]] = []
    for number in range(NUM_SLOTS + 2):
        backend.add(make_add(f"job-{number}", max_tokens=3 + number))
    phases: dict[str, list[str]] = {}
    while backend.has_work:
        outputs = backend.step(records.append).outputs
        assert {output.job_id for output in outputs} <= {member.job_id for member in records[-1]}
        for member in records[-1]:
            phases.setdefault(member.job_id, []).append(member.phase)
    assert all(seen[0] == "prefill" and seen[-1] == "decode" for seen in phases.values())
    assert len(phases) == NUM_SLOTS + 2


def test_structured_output_is_followed_whatever_the_model_would_say(
    backend: Backend, request: pytest.FixtureRequest
) -> None:
    if is_fake(request) or is_remote(request):
        pytest.skip("this back end follows no grammar")
    output = {"regex": "(red|green) [0-9]{3}"}
    spoken = run(backend, [make_add(structured_output=output, temperature=1.0), make_add("free")])
    assert re.fullmatch("(red|green) [0-9]{3}", spoken["job", 0].text)
    assert spoken["job", 0].finish_reasons == ["stop"]
    assert spoken["free", 0] == run(backend, [make_add("free")])["free", 0]


def test_a_prompt_is_scored_token_by_token(backend: Backend, request: pytest.FixtureRequest) -> None:
    if is_remote(request):
        pytest.skip("prompt logprobs are refused at submit")
    backend.add(make_add(prompt=[40, 41, 42, 43, 44], prompt_logprobs=2))
    scores: list[dict[str, object] | None] = []
    while backend.has_work:
        for output in step(backend).outputs:
            scores += output.prompt_logprobs or []
    assert scores[0] is None
    assert [score["token_id"] for score in scores[1:] if score] == [41, 42, 43, 44]


def test_a_common_beginning_is_not_computed_twice(backend: Backend, request: pytest.FixtureRequest) -> None:
    if is_fake(request) or is_remote(request):
        pytest.skip("this back end has no cache of its own")
    beginning = list(range(100, 200))
    cold = run(backend, [make_add(prompt=[*beginning, 1], cache_salt="tenant")])
    num_hits = backend.stats().num_prefix_cache_hits
    warm = run(backend, [make_add(prompt=[*beginning, 1], cache_salt="tenant", attempt=2)])
    assert warm == cold
    assert backend.stats().num_prefix_cache_hits >= num_hits + 96  # as far as whole blocks go
    num_hits = backend.stats().num_prefix_cache_hits
    run(backend, [make_add(prompt=[*beginning, 1], cache_salt="another tenant")])
    assert backend.stats().num_prefix_cache_hits == num_hits


def test_embeddings_are_made_or_refused_by_name(backend: Backend, request: pytest.FixtureRequest) -> None:
    command = EmbedJob("vectors", 1, [[40, 41]], None, 0)
    backend_name = next(name for name in SPECS if name in request.node.callspec.params.values())
    if backend_name not in ("llama_cpp", "remote", "vllm"):
        backend.embed(command)
        while backend.has_work:
            step(backend)
        return
    with pytest.raises(CeleriacError, match=f"backend {backend_name} does not support embeddings"):
        backend.embed(command)
    assert not backend.has_work


def test_llama_cpp_says_what_transformers_says_with_the_same_weights(gguf_folder: Path) -> None:
    spec = LLAMA_CPP.model_copy(update={"path": str(gguf_folder)})
    texts = [
        run(import_backend(spec)(spec), [make_add(max_tokens=60), make_add("drawn", temperature=0.8, seed=3)])
        for spec in (spec, SPECS["transformers"])
    ]
    assert texts[0]["job", 0] == texts[1]["job", 0]
    assert texts[0]["drawn", 0] == texts[1]["drawn", 0]


def is_fake(request: pytest.FixtureRequest) -> bool:
    return "fake" in request.node.callspec.params.values()


def is_remote(request: pytest.FixtureRequest) -> bool:
    return "remote" in request.node.callspec.params.values()
