"""The remote back end against a server whose every answer the test decides."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from starlette.responses import JSONResponse, Response

from domain.catalog import ModelSpec, RemoteOptions
from gpu_worker.engine.backends import remote
from gpu_worker.engine.backends.remote import MAX_BROKEN, RemoteBackend
from gpu_worker.engine.remote import connection, gate
from gpu_worker.engine_process.frames import JobFailed, JobReturned
from settings import ROOT
from tests.integration.test_engine_contract import Spoken, Transcript, make_add, run, run_until, step
from tests.remote_server import RemoteServer, choice, remote_server
from tests.waiting import wait_until

KEY = "sk-very-secret"
WORDS = [50, 51, 52, 53, 54, 55, 56, 57, 58, 59]  # what the server says after a prompt of three tokens

Start = Callable[..., RemoteBackend]


def say(server: RemoteServer, body: dict[str, Any], num_tokens: int | None = None, **options: bool) -> Response:
    """The words from where the prompt ends; all that were asked for, or so many without an end."""
    place = len(body["prompt"]) - 3
    words = WORDS[place : place + (body["max_tokens"] if num_tokens is None else num_tokens)]
    events = [choice(token_ids=[word]) for word in words]
    if num_tokens is None:
        events[-1] = choice(token_ids=words[-1:], finish_reason="length")
    return server.stream(*events, **options)


@pytest.fixture
def server() -> Iterator[RemoteServer]:
    with remote_server() as server:
        server.answer = lambda body: say(server, body)
        yield server


@pytest.fixture
def start(server: RemoteServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    started: list[RemoteBackend] = []
    monkeypatch.setenv("THEIR_KEY", KEY)
    for module in (gate, remote):
        monkeypatch.setattr(module, "FIRST_WAIT_SECONDS", 0.02)

    def start(**options: Any) -> RemoteBackend:
        common = {"url": server.url, "model": "theirs", "api_key_env": "THEIR_KEY"}
        their = RemoteOptions.model_validate(common | options)
        path = str(ROOT / "models" / "celeriac-mini")
        spec = ModelSpec(id="m", path=path, backend="remote", max_model_len=128, max_num_seqs=4, remote=their)
        backend = RemoteBackend(spec)
        started.append(backend)
        wait_until(
            lambda: not backend._is_probing or (step(backend) and not backend._is_probing), "the server was asked"
        )
        return backend

    yield start
    for backend in started:
        backend.close()


def failures_of(backend: RemoteBackend) -> list[JobFailed]:
    failures: list[JobFailed] = []
    while backend.has_work:
        failures += step(backend).failures
    return failures


def test_a_request_has_the_prompt_as_ids_the_parameters_and_the_key(server: RemoteServer, start: Start) -> None:
    spoken = run(start(), [make_add(max_tokens=4, stop_token_ids=[99], logit_bias={7: 1.5}, min_tokens=2)])
    assert spoken["job", 0].token_ids == WORDS[:4]
    [body] = server.bodies
    assert server.keys == [f"Bearer {KEY}"]
    assert body["model"] == "theirs"
    assert body["prompt"] == [40, 41, 42]
    assert (body["max_tokens"], body["min_tokens"], body["top_k"]) == (4, 2, -1)
    assert (body["stop_token_ids"], body["logit_bias"]) == ([99], {"7": 1.5})
    assert "stop" not in body


def test_a_stream_that_breaks_off_is_continued_after_the_tokens_that_came(server: RemoteServer, start: Start) -> None:
    answers = [lambda body: say(server, body, 3, is_cut=True), lambda body: say(server, body)]
    server.answer = lambda body: answers.pop(0)(body)
    spoken = run(start(), [make_add(max_tokens=8)])
    assert spoken["job", 0].token_ids == WORDS[:8]
    first, second = server.bodies
    assert second["prompt"] == [40, 41, 42, *WORDS[:3]]
    assert second["max_tokens"] == 5
    assert first["seed"] != second["seed"]


@pytest.mark.parametrize("status", [429, 503, 502, 401])
def test_a_refused_request_waits_and_costs_nothing(server: RemoteServer, start: Start, status: int) -> None:
    backend = start()
    server.refusals += [Response(status_code=status)] * 2
    assert run(backend, [make_add(max_tokens=4)])["job", 0] == Spoken("NOPQ", WORDS[:4], ["length"])
    assert len(server.bodies) == 3


def test_retry_after_is_honoured_and_a_cancel_does_not_wait_for_it(server: RemoteServer, start: Start) -> None:
    backend = start()
    server.refusals.append(Response(status_code=429, headers={"retry-after": "250"}))
    backend.add(make_add())
    wait_until(lambda: step(backend).stats.is_full, "the server's answer is known")
    for _ in range(20):
        assert step(backend).outputs == []
    assert len(server.bodies) == 1
    backend.abort("job", 1, "cancelled")
    transcript: Transcript = {}
    for output in step(backend).outputs:
        transcript.setdefault((output.job_id, output.index), Spoken()).hear(output)
    assert transcript == {("job", 0): Spoken(finish_reasons=["cancelled"])}
    assert not backend.has_work


def test_a_server_that_is_away_is_told_and_asked_until_it_is_back(server: RemoteServer, start: Start) -> None:
    server.models = ["another"]
    backend = start()
    stats = step(backend).stats
    assert stats.is_full
    assert stats.waiting_for.endswith("it has no model 'theirs', but another")
    assert backend.has_work
    backend.add(make_add(max_tokens=4))
    for _ in range(5):
        step(backend)
    assert server.bodies == []
    server.models = ["theirs"]
    wait_until(lambda: not step(backend).stats.waiting_for, "the back end has noticed")
    assert run(backend, [])["job", 0].token_ids == WORDS[:4]
    assert not backend.stats().is_full


@pytest.mark.parametrize("status", [429, 502])
def test_a_job_that_waits_for_long_goes_back_to_the_queue_without_a_failure(
    server: RemoteServer, start: Start, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    monkeypatch.setattr(remote, "RETURN_SECONDS", 0.2)
    backend = start()
    run(backend, [make_add("first", max_tokens=1)])  # so that both requests are sent at once
    away = Response(status_code=status)
    server.answer = lambda body: say(server, body, 2, is_cut=True) if len(body["prompt"]) == 3 else away
    transcript: Transcript = {}
    backend.add(make_add(max_tokens=4, n=2))
    run_until(backend, transcript, ("job", 0), 2)
    run_until(backend, transcript, ("job", 1), 2)
    server.models_status = status
    returned = wait_until(lambda: step(backend).returned, "it is returned")
    assert returned == [JobReturned("job", 1)]
    assert not step(backend).outputs
    assert backend.stats().num_waiting == 0
    server.models_status = 200
    server.answer = lambda body: say(server, body)
    wait_until(lambda: not step(backend).stats.waiting_for, "the server is back")
    committed = [transcript["job", index].token_ids for index in range(2)]
    again = make_add(max_tokens=4, n=2, attempt=2, committed_token_ids=committed, num_emitted_chars=[2, 2])
    assert run(backend, [again])["job", 1].token_ids == WORDS[2:4]


def test_a_400_fails_its_job_with_the_servers_words_and_no_other(
    server: RemoteServer, start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    backend = start()
    words = f"the prompt 'Once upon' is bad, {KEY}"
    server.refusals.append(JSONResponse({"error": {"message": words}}, 400))
    backend.add(make_add("bad", n=2))
    [failure] = failures_of(backend)
    assert failure.code == "invalid_value"
    assert failure.message.endswith("it answered 400: the prompt 'Once upon' is bad, [key]")
    assert run(backend, [make_add(max_tokens=4)])["job", 0].token_ids == WORDS[:4]
    assert "Once upon" not in caplog.text
    assert KEY not in caplog.text


def test_a_request_that_is_always_broken_off_fails_its_job_alone(server: RemoteServer, start: Start) -> None:
    backend = start()
    good = [make_add("good", max_tokens=4)]
    server.answer = lambda body: server.stream(is_cut=True) if body["prompt"] == [1, 2, 3] else say(server, body)
    backend.add(make_add("bad", prompt=[1, 2, 3]))
    [failure] = failures_of(backend)
    assert (failure.job_id, failure.code) == ("bad", "engine_error")
    assert len(server.bodies) == MAX_BROKEN
    assert run(backend, good)["good", 0].token_ids == WORDS[:4]


@pytest.mark.parametrize("reason", ["cancelled", ""])
def test_an_abort_closes_the_request(server: RemoteServer, start: Start, reason: str) -> None:
    backend = start()
    server.answer = lambda body: say(server, body, 2, is_endless=True)
    backend.add(make_add(max_tokens=50))
    run_until(backend, {}, ("job", 0), 2)
    backend.abort("job", 1, reason)
    wait_until(lambda: server.num_closed == 1, "the server saw the end of the connection")


def test_a_stop_string_closes_the_request(server: RemoteServer, start: Start) -> None:
    server.answer = lambda body: say(server, body, 8, is_endless=True)
    spoken = run(start(), [make_add(max_tokens=50, stop=["PQ"])])
    assert (spoken["job", 0].text, spoken["job", 0].finish_reasons) == ("NO", ["stop"])
    wait_until(lambda: server.num_closed == 1, "the server saw the end of the connection")


@pytest.mark.parametrize(
    "event",
    [
        choice(text="Hello"),
        choice(token_ids=[1_000_000]),
        choice(token_ids=[-1]),
    ],
)
def test_tokens_that_cannot_be_committed_fail_the_job(
    server: RemoteServer, start: Start, event: dict[str, object]
) -> None:
    backend = start()
    server.answer = lambda body: server.stream(event, choice(finish_reason="stop"))
    backend.add(make_add())
    [failure] = failures_of(backend)
    assert failure.code == "engine_error"


def test_text_is_exchanged_with_a_server_that_has_no_ids(server: RemoteServer, start: Start) -> None:
    said = ["Hé", "llo 🙂", " there"]

    def answer(body: dict[str, Any]) -> Response:
        assert isinstance(body["prompt"], str)
        assert "top_k" not in body
        place = 2 if body["prompt"].endswith("Héllo 🙂") else 0
        if place:
            return server.stream(choice(text=said[2]), choice(finish_reason="stop"))
        return server.stream(choice(text=said[0]), choice(text=said[1]), is_cut=True)

    server.answer = answer
    spoken = run(start(mode="text"), [make_add(max_tokens=50)])["job", 0]
    assert (spoken.text, spoken.finish_reasons) == ("Héllo 🙂 there", ["stop"])


def test_no_more_is_sent_while_requests_wait_at_the_server(
    server: RemoteServer, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "METRICS_SECONDS", 0.01)
    server.metrics = '# HELP x\nvllm:num_requests_waiting{model_name="theirs"} 2.0\n'
    backend = start(metrics_url=server.http.url + "/metrics")
    server.answer = lambda body: say(server, body, 1, is_endless=True)
    wait_until(lambda: backend.stats().is_full, "the metrics are read")
    backend.add(make_add("first"))
    run_until(backend, {}, ("first", 0), 1)
    backend.add(make_add("second"))
    for _ in range(10):
        step(backend)
    assert len(server.bodies) == 1
    server.metrics = "vllm:num_requests_waiting 0.0\n"
    wait_until(lambda: len(server.bodies) == 2 or not step(backend), "the second is sent")


def test_a_key_that_is_not_there_is_told_at_load(start: Start) -> None:
    with pytest.raises(ValueError, match="api_key_env is 'NO_SUCH_KEY'"):
        start(api_key_env="NO_SUCH_KEY")
