"""Responses over a WebSocket, with the unmodified SDK and, for what it would not send, with its WebSocket library."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Thread
from typing import Any

import openai
import pytest

from api.openai.response_socket import ResponseSocket
from storage import tenants
from storage.tables import DEFAULT_TENANT_ID
from tests.conformance.harness import Served
from tests.integration.api_harness import ApiServer, HandWorker
from tests.integration.runner_harness import MODEL
from tests.waiting import wait_until

sockets = pytest.importorskip("websockets.sync.client")
refusals = pytest.importorskip("websockets.exceptions")

ASK: dict[str, Any] = {"type": "response.create", "model": "fake", "max_output_tokens": 8}


@contextmanager
def connected(api: ApiServer, path: str = "/v1/responses", **options: Any) -> Iterator[Any]:
    with sockets.connect(f"ws://127.0.0.1:{api.port}{path}", max_size=None, **options) as socket:
        yield socket


def ask(socket: Any, **fields: Any) -> dict[str, Any]:
    """Send a message, and return what comes first."""
    socket.send(json.dumps(ASK | fields))
    return said(socket)


def said(socket: Any) -> dict[str, Any]:
    return dict(json.loads(socket.recv(timeout=60)))


def to_the_end(socket: Any) -> list[dict[str, Any]]:
    events = [said(socket)]
    while events[-1]["type"] not in ("response.completed", "response.incomplete", "response.failed", "error"):
        events.append(said(socket))
    return events


def incomplete(connection: Any) -> Any:
    return next(event.response for event in connection if event.type == "response.incomplete")


@pytest.mark.filterwarnings("ignore:connect.. must be used:DeprecationWarning")  # it is how the SDK uses it
def test_turns_over_one_connection_are_those_of_a_stream(served: Served) -> None:
    with served.client.responses.connect() as connection:
        connection.response.create(model=MODEL, input="Hi", max_output_tokens=5)
        events: list[Any] = []
        for event in connection:
            events.append(event)
            if event.type == "response.incomplete":
                break
        first = events[-1].response
        streamed = list(served.client.responses.retrieve(first.id, stream=True))
        assert [event.to_dict() for event in events] == [event.to_dict() for event in streamed]
        connection.response.create(
            model=MODEL, input="More", max_output_tokens=5, previous_response_id=first.id, store=False
        )
        second = incomplete(connection)
        prompt = f"user: Hi\nassistant: {first.output_text}\nuser: More\nassistant: "
        assert second.usage.input_tokens == len(prompt.encode())
        with pytest.raises(openai.NotFoundError):
            served.client.responses.retrieve(second.id)
        connection.response.create(model=MODEL, input="So", max_output_tokens=5, previous_response_id=second.id)
        third = incomplete(connection)
        assert third.usage.input_tokens == len(f"{prompt}{second.output_text}\nuser: So\nassistant: ".encode())


def test_what_is_wrong_is_told_and_the_connection_goes_on(api: ApiServer, hand_worker: HandWorker) -> None:
    with connected(api) as socket:
        for fields, code, param in (
            ({}, "invalid_value", "input"),
            ({"input": "Hi", "type": "response.steer"}, "invalid_value", "type"),
            ({"input": "Hi", "background": True}, "unsupported_parameter", "background"),
            ({"input": "Hi", "generate": False}, "unsupported_parameter", "generate"),
            ({"input": "Hi", "odd": 1}, "invalid_value", "odd"),
            ({"input": "Hi", "model": "none"}, "model_not_found", "model"),
            ({"input": "Hi", "previous_response_id": "resp_x"}, "previous_response_not_found", "previous_response_id"),
        ):
            error = ask(socket, **fields)
            assert (error["type"], error["error"]["code"], error["error"]["param"]) == ("error", code, param), error
            assert error["status"] in (400, 404)
        for message in ("", "[]", "{", "\ud83d".encode("utf-8", "surrogatepass"), b"{}"):
            socket.send(message)
            assert said(socket)["error"]["type"] == "invalid_request_error"
        created = ask(socket, input="Hi", background=False)
        hand_worker.run(created["response"]["id"], "Hello")
        assert to_the_end(socket)[-1]["response"]["output"][0]["content"][0]["text"] == "Hello"


def test_lanes_leave_nothing_behind(api: ApiServer, hand_worker: HandWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[ResponseSocket] = []
    serve = ResponseSocket.serve

    async def noted(self: ResponseSocket) -> None:
        made.append(self)
        await serve(self)

    monkeypatch.setattr(ResponseSocket, "serve", noted)
    with connected(api) as socket:
        for lane in ("a", "b", "a"):
            hand_worker.run(ask(socket, input="Hi", stream_id=lane)["response"]["id"], "Hello")
            assert to_the_end(socket)[-1]["type"] == "response.completed"
        wait_until(lambda: not made[0]._waiting)


def test_what_waits_is_no_larger_than_one_body(api: ApiServer) -> None:
    with connected(api) as socket:
        ask(socket, input="1")
        large = json.dumps(ASK | {"input": "a" * 600_000})
        socket.send(large)
        socket.send(large)
        error = to_the_end(socket)[-1]["error"]
        assert error["code"] == "server_is_overloaded"


def test_lanes_are_answered_in_order_each_and_at_the_same_time(api: ApiServer, hand_worker: HandWorker) -> None:
    with connected(api) as socket:
        first = ask(socket, input="1", stream_id="a")
        socket.send(json.dumps(ASK | {"input": "2", "stream_id": "a"}))
        other = said(socket)
        assert other["type"] == "response.in_progress"
        other = ask(socket, input="3", stream_id="b")
        assert (first["stream_id"], other["type"], other["stream_id"]) == ("a", "response.created", "b")
        hand_worker.run(other["response"]["id"], "c")
        assert {event["stream_id"] for event in to_the_end(socket)} == {"b"}
        hand_worker.run(first["response"]["id"], "d")
        assert {event["stream_id"] for event in to_the_end(socket)} == {"a"}
        second = said(socket)
        assert (second["type"], second["stream_id"]) == ("response.created", "a")


def test_a_connection_that_breaks_leaves_the_response(api: ApiServer, hand_worker: HandWorker) -> None:
    with connected(api) as socket:
        id_ = ask(socket, input="Hi")["response"]["id"]
        passing = ask(socket, input="Hi", store=False, stream_id="b")["response"]["id"] if said(socket) else ""
        job = hand_worker.claim(id_)
        hand_worker.say(job, "Hel")
        before = [said(socket) for _ in range(4)]
        socket.socket.close()
    hand_worker.say(job, "lo", first=2)
    hand_worker.finish(job, "Hel", "lo")
    with api.client() as http:
        answer = http.get(f"/v1/responses/{id_}").json()
        assert (answer["status"], answer["output"][0]["content"][0]["text"]) == ("completed", "Hello")
        wait_until(lambda: http.get(f"/v1/jobs/{passing.replace('resp_', 'job_')}").json()["status"] == "cancelled")
    assert len(before) == 4
    wait_until(lambda: api.services.slots.num_taken == 0)


def test_whoever_may_not_connect_is_refused_before(api: ApiServer) -> None:
    for headers in ({"origin": "https://evil.example"}, {"origin": "null"}):
        with pytest.raises(refusals.InvalidStatus) as caught, connected(api, additional_headers=headers):
            pass
        assert caught.value.response.status_code == 403
    with connected(api, additional_headers={"origin": f"http://127.0.0.1:{api.port}"}) as socket:
        assert ask(socket, input="Hi")["type"] == "response.created"
    api.services.authenticator._is_open = False
    with pytest.raises(refusals.InvalidStatus) as caught, connected(api):
        pass
    assert caught.value.response.status_code == 401
    assert json.loads(caught.value.response.body)["error"]["code"] == "invalid_api_key"
    for path in ("/v1/jobs", "/", "/v1/responses/resp_x"):
        with pytest.raises(refusals.InvalidStatus) as caught, connected(api, path):
            pass
        assert caught.value.response.status_code in (200, 401), "the upgrade is ignored"


def test_a_revoked_key_and_a_stopping_server_close_the_connection(api: ApiServer, hand_worker: HandWorker) -> None:
    with hand_worker.sessions.begin() as session:
        key = tenants.create_key(session, DEFAULT_TENANT_ID)
    api.services.authenticator._is_open = False
    bearer = {"authorization": f"Bearer {key}"}
    with connected(api, additional_headers=bearer) as socket:
        with hand_worker.sessions.begin() as session:
            tenants.revoke_key(session, key.split("_")[1], DEFAULT_TENANT_ID)
        assert said(socket)["error"]["code"] == "invalid_api_key"
        with pytest.raises(refusals.ConnectionClosed) as caught:
            socket.recv(timeout=60)
        assert caught.value.rcvd.code == 1008
    api.services.authenticator._is_open = True
    with connected(api) as socket:
        ask(socket, input="Hi")
        api.stop()
        assert to_the_end(socket)[-1]["error"]["message"] == "this server is restarting; connect again"
        with pytest.raises(refusals.ConnectionClosed) as caught:
            said(socket)
        assert caught.value.rcvd is not None
        assert caught.value.rcvd.code == 1012


def test_a_stopping_server_finishes_what_has_begun_and_takes_nothing_new(
    api: ApiServer, hand_worker: HandWorker
) -> None:
    api.app.state.drain_seconds = 60.0
    with connected(api) as idle, connected(api) as socket:
        begun = ask(socket, input="Hi")["response"]["id"]
        stopping = Thread(target=api.stop, kwargs={"grace_seconds": 60})
        stopping.start()
        assert said(idle)["error"]["message"] == "this server is restarting; connect again"
        with pytest.raises(refusals.ConnectionClosed) as caught:
            said(idle)
        assert caught.value.rcvd.code == 1012
        socket.send(json.dumps(ASK | {"input": "Later", "stream_id": "later"}))
        while (event := said(socket))["type"] != "error":
            pass
        assert (event["stream_id"], event["status"]) == ("later", 503)
        hand_worker.run(begun, "Hello")
        assert to_the_end(socket)[-1]["type"] == "response.completed"
        assert said(socket)["error"]["message"] == "this server is restarting; connect again"
        with pytest.raises(refusals.ConnectionClosed) as caught:
            said(socket)
        assert caught.value.rcvd.code == 1012
    stopping.join()


def test_messages_and_connections_have_their_limits(api: ApiServer) -> None:
    api.services.settings = api.services.settings.model_copy(update={"stream_lifetime_seconds": 0.5})
    with connected(api) as socket:
        while (event := said(socket))["type"] != "error":
            pass
        assert event["error"]["code"] == "websocket_connection_limit_reached"
    api.services.settings = api.services.settings.model_copy(update={"stream_lifetime_seconds": 600.0})
    with connected(api) as socket:
        socket.send(json.dumps(ASK | {"input": "x" * (1 << 20)}))
        with pytest.raises(refusals.ConnectionClosed) as caught:
            socket.recv(timeout=60)
        assert caught.value.sent is None or caught.value.rcvd.code == 1009
    with connected(api) as socket:
        for number in range(16):
            socket.send(json.dumps(ASK | {"input": "Hi", "stream_id": f"{number}"}))
        socket.send(json.dumps(ASK | {"input": "Hi", "stream_id": "one too many"}))
        while (event := said(socket))["type"] != "error":
            pass
        assert event["error"]["param"] == "stream_id"
    api.services.slots.num_places = 0
    with pytest.raises(refusals.InvalidStatus) as caught_status, connected(api):
        pass
    assert caught_status.value.response.status_code == 503
