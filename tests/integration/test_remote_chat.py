"""The remote back end in mode chat: messages out, and an answer that the server has taken apart put together again."""

import json
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from domain.catalog import ModelSpec, RemoteOptions
from domain.errors import UnsupportedParameter
from domain.requests import ChatMessage, GenerationRequest, SamplingParams
from domain.structured_output import CallableTool, StructuredOutput, ToolCall, ToolCalls, ToolDefinition
from gpu_worker.engine.backends import remote
from gpu_worker.engine.backends.remote import MAX_BROKEN, RemoteBackend
from gpu_worker.engine.remote import gate
from gpu_worker.engine_process.frames import AddJob, JobFailed, JobReturned
from settings import ROOT
from tasks.prepare import prepare_generation
from tests.integration.test_engine_contract import make_add, run, step
from tests.remote_server import RemoteServer, remote_server
from tests.waiting import wait_until
from text.models import ModelView, load_model_view
from text.outputs import CallArguments, CallName, ContentPiece, Piece, ReasoningPiece, joined
from text.parsers import parser_of

TOOLS = (ToolDefinition(name="go", parameters={"type": "object", "properties": {"at": {"type": "integer"}}}),)
ASKED = (ChatMessage(role="user", content="Go."),)


def delta(finish_reason: str | None = None, **fields: Any) -> dict[str, object]:
    return {"choices": [{"index": 0, "delta": fields, "finish_reason": finish_reason}]}


def called(number: int, arguments: str, name: str | None = None) -> dict[str, object]:
    function = {"arguments": arguments} | ({} if name is None else {"name": name})
    return delta(tool_calls=[{"index": number, "id": f"c{number}", "type": "function", "function": function}])


@pytest.fixture
def server() -> Iterator[RemoteServer]:
    with remote_server() as server:
        yield server


def spec_of(url: str, **options: Any) -> ModelSpec:
    their = RemoteOptions.model_validate({"url": url, "model": "theirs", "mode": "chat"} | options)
    path = str(ROOT / "models" / "celeriac-mini")
    return ModelSpec(id="m", path=path, backend="remote", max_model_len=512, max_num_seqs=4, remote=their)


@pytest.fixture
def backend(server: RemoteServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[RemoteBackend]:
    for module in (gate, remote):
        monkeypatch.setattr(module, "FIRST_WAIT_SECONDS", 0.02)
    backend = RemoteBackend(spec_of(server.url))
    try:
        wait_until(lambda: not backend._is_probing or bool(step(backend)), "the server was asked")
        yield backend
    finally:
        backend.close()


def asked(messages: Sequence[ChatMessage] = ASKED, **fields: Any) -> GenerationRequest:
    return GenerationRequest(model="m", messages=tuple(messages), **fields)


def add(request: GenerationRequest, **changes: Any) -> AddJob:
    return make_add(conversation=request.model_dump_json().encode(), max_tokens=400, ignore_eos=False, **changes)


def read(request: GenerationRequest, view: ModelView, text: str) -> list[Piece]:
    parser = parser_of(request, view.output_format)
    return joined([piece for one in text for piece in parser.push(one)] + parser.finish(is_cut=False))


ANSWERS: list[tuple[list[dict[str, object]], list[Piece]]] = [
    ([delta(role="assistant", content=""), delta(content="Hi "), delta(content="there."), delta("stop")],
     [ContentPiece("Hi there.")]),
    ([delta(reasoning_content="Hm "), delta(reasoning="so."), delta(content="\n\nHi."), delta("stop")],
     [ReasoningPiece("Hm so."), ContentPiece("Hi.")]),
    (
        [delta(reasoning_content="Hm."), called(0, "", "go"), called(0, '{"at"'), called(0, ": 3}"),
         called(1, "", "stop"), delta("tool_calls")],
        [ReasoningPiece("Hm."), CallName(0, "go"), CallArguments(0, '{"at": 3}'), CallName(1, "stop"),
         CallArguments(1, "{}")],
    ),
    ([called(0, "{", "go"), called(0, "}", "go"), called(0, "", "go"), delta("tool_calls")],  # as llama-cpp-python
     [CallName(0, "go"), CallArguments(0, "{}")]),
    ([delta(content="I go."), called(0, '{"at": "}"}', "go"), delta("tool_calls")],
     [ContentPiece("I go."), CallName(0, "go"), CallArguments(0, '{"at": "}"}')]),
]  # fmt: skip


@pytest.mark.parametrize(("events", "pieces"), ANSWERS)
def test_an_answer_reads_as_the_server_took_it_apart(
    server: RemoteServer, backend: RemoteBackend, events: list[dict[str, object]], pieces: list[Piece]
) -> None:
    server.answer = lambda body: server.stream(*events)
    request = asked(tools=TOOLS)
    spoken = run(backend, [add(request)])["job", 0]
    assert spoken.finish_reasons == ["stop"]
    assert read(request, load_model_view(spec_of(server.url)), spoken.text) == pieces


def test_a_request_has_the_messages_the_tools_and_what_its_form_must_be(
    server: RemoteServer, backend: RemoteBackend
) -> None:
    server.answer = lambda body: server.stream(delta(content="x"), delta("stop"))
    call = ToolCall(id="c1", name="go", arguments='{"at": 3}')
    messages = (*ASKED, ChatMessage(role="assistant", content="", tool_calls=(call,)),
                ChatMessage(role="tool", content="done", tool_call_id="c1"))  # fmt: skip
    tool = CallableTool(name="go", arguments={"type": "object"})
    forced = StructuredOutput(calls=ToolCalls(format="hermes", tools=(tool,), is_single=True))
    params = SamplingParams(structured_output=forced)
    run(backend, [add(asked(messages, tools=TOOLS, parallel_tool_calls=False, reasoning_effort="low", params=params))])
    [body] = server.bodies
    assert [message["role"] for message in body["messages"]] == ["user", "assistant", "tool"]
    assert body["messages"][1]["tool_calls"][0]["function"] == {"name": "go", "arguments": '{"at": 3}'}
    assert body["messages"][2]["tool_call_id"] == "c1"
    assert body["tools"][0]["function"]["name"] == "go"
    assert body["tool_choice"] == {"type": "function", "function": {"name": "go"}}
    assert (body["parallel_tool_calls"], body["reasoning_effort"], body["temperature"]) == (False, "low", 0.0)
    assert not body.keys() & {"top_k", "prompt", "return_token_ids"}


def test_a_schema_is_passed_on_where_the_entry_says_so(server: RemoteServer) -> None:
    view = load_model_view(spec_of(server.url, structured_output="response_format"))
    schema = SamplingParams(structured_output=StructuredOutput(json_schema={"type": "object"}))
    assert prepare_generation(asked(params=schema), view, [1]).max_tokens > 0
    regex = SamplingParams(structured_output=StructuredOutput(regex="a+"))
    with pytest.raises(UnsupportedParameter, match="regex"):
        prepare_generation(asked(params=regex), view, [1])
    with pytest.raises(UnsupportedParameter, match="json_schema"):
        prepare_generation(asked(params=schema), load_model_view(spec_of(server.url)), [1])


@pytest.mark.parametrize("name", ["top_k", "min_p", "logprobs", "min_tokens"])
def test_what_a_chat_server_does_not_take_is_refused_by_the_engines_name(server: RemoteServer, name: str) -> None:
    value = 0.5 if name == "min_p" else 2
    with pytest.raises(UnsupportedParameter, match="backend 'remote'"):
        prepare_generation(asked(params=SamplingParams(**{name: value})), load_model_view(spec_of(server.url)), [1])


def test_a_prompt_is_refused_and_messages_are_counted(server: RemoteServer) -> None:
    view = load_model_view(spec_of(server.url))
    assert len(view.encode(asked(tools=TOOLS))) > len(view.encode(asked()))
    with pytest.raises(UnsupportedParameter, match="takes only whole messages"):
        view.encode(GenerationRequest(model="m", prompt="Go."))


def test_an_answer_that_breaks_off_before_its_first_text_is_asked_for_again(
    server: RemoteServer, backend: RemoteBackend
) -> None:
    plan = [server.stream(delta(role="assistant"), is_cut=True), server.stream(delta(content="Hi."), delta("stop"))]
    server.answer = lambda body: plan.pop(0)
    assert run(backend, [add(asked())])["job", 0].text == "Hi."


def test_an_answer_that_breaks_off_later_goes_back_and_fails_in_the_end(
    server: RemoteServer, backend: RemoteBackend
) -> None:
    server.answer = lambda body: server.stream(delta(content="Hi "), is_cut=True)
    for attempt in range(1, MAX_BROKEN):
        backend.add(add(asked(), attempt=attempt))
        returned: list[JobReturned] = []
        while not returned:
            returned = step(backend).returned
        assert returned == [JobReturned("job", attempt)]
    backend.add(add(asked(), attempt=MAX_BROKEN))
    failures: list[JobFailed] = []
    while not failures:
        failures = step(backend).failures
    assert "broke off this job's answer" in failures[0].message
    assert not json.dumps(failures[0].message).count("Hi ")
