"""One Push for each operation of the OpenAPI document, so that a new route is tried by itself; and further ones.

A body has the fields that are required and those of VALUES that name what is asked; whatever makes something that a
path names comes from THINGS. An operation of which these say nothing is sent with what its schema asks for.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from bench.flood import LARGE_BYTES, Push, Step
from bench.tenants import MODEL, SECOND_MODEL

SAY = [{"role": "user", "content": "@unique@"}]
NUM_TEXTS = 16
MAX_TOKENS = 20
#: What fields are given, wherever a body has them: those in ASKED always, the others if they are required.
VALUES: dict[str, Any] = {
    "model": MODEL, "prompt": "@unique@", "messages": SAY, "input": "@unique@", "query": "@unique@",
    "documents": [f"@unique@ {number}" for number in range(NUM_TEXTS)], "text_1": "@unique@",
    "text_2": [f"@unique@ {number}" for number in range(NUM_TEXTS)], "tokens": [65] * 500,
    "items": [{"id": "msg_@unique@", "role": "user", "content": "Hi"}], "max_tokens": MAX_TOKENS,
    "max_output_tokens": MAX_TOKENS, "store": True, "background": True, "metadata": {"a": "b"}, "user": "a",
    "input_file_id": "@file_id@", "endpoint": "/v1/completions", "completion_window": "24h",
    "name": "n-@unique@", "url": "http://localhost:9/@unique@", "event_types": ["job.completed"],
    "event_type": "job.completed", "source": "hf:nobody/nothing@main", "purpose": "batch",
    "requests": [
        {"custom_id": f"{number}", "params": {"model": MODEL, "max_tokens": MAX_TOKENS, "messages": SAY}}
        for number in range(20)
    ],
}  # fmt: skip
ASKED = ("model", "max_tokens", "max_output_tokens", "store", "background")
INPUTS = ("messages", "prompt", "input")  # one of them
#: Bodies of which the schema says too little.
BODIES: dict[str, dict[str, Any]] = {
    "POST /v1/jobs": {"model": MODEL, "prompt": "@unique@", "params": {"max_tokens": MAX_TOKENS}},
    "POST /v1/embeddings": {"model": MODEL, "input": ["@unique@"] * 64},
    "POST /v1/conversations": {"items": [{"id": "msg_1", "role": "user", "content": "Hi"}]},
    "POST /v1/admin/tenants/{tenant}/erasures": {"metadata": {"a": "b"}},
}
LINES = json.dumps({"custom_id": "a", "method": "POST", "url": "/v1/completions",
    "body": {"model": MODEL, "prompt": "a", "max_tokens": MAX_TOKENS}})  # fmt: skip
MULTIPART = "multipart/form-data; boundary=x"


def form(content: str, purpose: str = "batch") -> str:
    """The body of an upload."""
    return (
        f'--x\r\ncontent-disposition: form-data; name="purpose"\r\n\r\n{purpose}\r\n'
        f'--x\r\ncontent-disposition: form-data; name="file"; filename="a"\r\n\r\n{content}\r\n--x--\r\n'
    )


def post(path: str, body: Mapping[str, Any] | None = None, gives: str = "") -> Step:
    return Step("POST", path, body=json.dumps(body or {}), gives=gives)


def upload(content: str, gives: str = "") -> Step:
    return Step("POST", "/v1/files", body=form(content), headers={"content-type": MULTIPART}, gives=gives)


_CHAT = {"model": MODEL, "messages": SAY, "max_tokens": 1}
_BATCH = {"input_file_id": "@file_id@", "endpoint": "/v1/completions", "completion_window": "24h"}
_JOB = post("/v1/jobs", BODIES["POST /v1/jobs"], "job_id")

#: What makes the thing that a parameter of a path names. It is made once for those who read it, and anew for each other
#: request.
THINGS: dict[str, list[Step]] = {
    "job_id": [_JOB],
    "completion_id": [post("/v1/chat/completions", _CHAT | {"store": True}, "completion_id")],
    "response_id": [
        post("/v1/responses", {"model": MODEL, "input": "@unique@", "background": True}, "response_id"),
    ],
    "conversation_id": [post("/v1/conversations", BODIES["POST /v1/conversations"], "conversation_id")],
    "file_id": [upload(LINES, "file_id")],
    "batch_id": [upload(LINES, "file_id"), post("/v1/batches", _BATCH, "batch_id")],
    "message_batch_id": [
        post("/v1/messages/batches", {"requests": VALUES["requests"][:1]}, "message_batch_id"),
    ],
    "webhook_endpoint_id": [
        post(
            "/v1/webhook_endpoints",
            {name: VALUES[name] for name in ("name", "url", "event_types")},
            "webhook_endpoint_id",
        )
    ],
    "key_id": [post("/v1/admin/keys", {}, "key_id")],
    "tenant": [post("/v1/admin/tenants", {"name": "t-@unique@"}, "tenant")],
    "erasure_id": [
        post("/v1/admin/tenants", {"name": "t-@unique@"}, "tenant"),
        post("/v1/admin/tenants/@tenant@/erasures", {"metadata": {"a": "b"}}, "erasure_id"),
    ],
}
FIXED = {"item_id": "msg_1", "model": SECOND_MODEL, "hostname": "nobody", "name": "nothing", "delivery_id": "0"}
BEFORE = {"POST /v1/jobs/{job_id}/retry": [Step("POST", "/v1/jobs/@job_id@/cancel")]}

READS = ("GET", "HEAD")


def pushes_of(document: Mapping[str, Any]) -> dict[str, Push]:
    """By operation: "GET /v1/jobs"."""
    return {
        f"{method.upper()} {path}": _push(document, method.upper(), path, operation)
        for path, operations in document["paths"].items()
        for method, operation in operations.items()
    }


def _push(document: Mapping[str, Any], method: str, path: str, operation: Mapping[str, Any]) -> Push:
    steps: list[Step] = []
    target = path + _query(operation)
    for name in _names(path):
        target = target.replace(f"{{{name}}}", f"@{name}@")
        if method not in READS:
            steps += THINGS.get(name, [])
    content = operation.get("requestBody", {}).get("content", {})
    if "multipart/form-data" in content:
        return Push([upload(LINES + "\n" * 1_000_000)])
    step = Step(method, target)
    if "application/json" in content:
        body = BODIES.get(f"{method} {path}") or body_of(document, content["application/json"]["schema"])
        step = replace(step, body=json.dumps(body))
    return Push([*steps, *BEFORE.get(f"{method} {path}", ()), step])


def _names(path: str) -> list[str]:
    return [part[1:-1] for part in path.split("/") if part.startswith("{")]


def _query(operation: Mapping[str, Any]) -> str:
    """As much of a list as there can be."""
    for parameter in operation.get("parameters", ()):
        if parameter["in"] == "query" and parameter["name"] == "limit":
            most = max((one.get("maximum", 0) for one in _choices(parameter["schema"])), default=0)
            return f"?limit={min(most, 1_000)}" if "maximum" in parameter["schema"] else ""
    return ""


def _choices(schema: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [schema, *schema.get("anyOf", ())]


def body_of(document: Mapping[str, Any], schema: Mapping[str, Any]) -> Any:
    """A value that the schema allows, by VALUES where it has fields of these names."""
    if "$ref" in schema:
        return body_of(document, document["components"]["schemas"][schema["$ref"].rpartition("/")[2]])
    for choice in ("anyOf", "oneOf", "allOf"):
        if choice in schema:
            return body_of(document, schema[choice][0])
    if "const" in schema or "enum" in schema:
        return schema.get("const", schema.get("enum", [None])[0])
    if schema.get("type") == "object" or "properties" in schema:
        return _object(document, schema)
    if schema.get("type") == "array":
        return [body_of(document, schema.get("items", {}))] * max(1, schema.get("minItems", 0))
    bound = schema.get("minimum", 1)
    return {"string": "@unique@", "integer": bound, "number": bound, "boolean": True}.get(schema.get("type", ""))


def _object(document: Mapping[str, Any], schema: Mapping[str, Any]) -> dict[str, Any]:
    fields, required = schema.get("properties", {}), list(schema.get("required", ()))
    inputs = [name for name in INPUTS if name in fields]
    names = [name for name in fields if name in required or name in ASKED]
    if inputs and not set(inputs) & set(required):
        names.append(inputs[0])
    return {name: VALUES[name] if name in VALUES else body_of(document, fields[name]) for name in names}


_GET = Step("GET", "/v1/jobs")
_STREAM = {"model": MODEL, "messages": SAY, "max_tokens": 200, "stream": True}
PAGES = ("/", "/docs", "/openapi.json", "/static/dashboard/app.js")
_RUBBISH = "Bearer celeriac_rubbish_@unique@"
_DEEP = '{"a":' * 60_000 + "1" + "}" * 60_000


def further_pushes() -> dict[str, Push]:
    """What no list of operations has."""
    long_poll = Step("GET", "/v1/jobs/@job_id@?wait=60")
    durable = Step("GET", "/v1/jobs/@job_id@/stream?offset=now&live=long-poll")
    preflight = {"origin": "https://a.invalid", "access-control-request-method": "POST", "authorization": ""}
    return {
        **{f"GET {path}": Push([Step("GET", path, headers={"authorization": ""})]) for path in PAGES},
        "no key": Push([replace(_GET, headers={"authorization": ""})]),
        "rubbish keys": Push([replace(_GET, headers={"authorization": _RUBBISH})]),
        "CORS preflights": Push([Step("OPTIONS", "/v1/jobs", headers=preflight)]),
        "paths that do not exist": Push([Step("GET", "/@unique@")]),
        "reads of queued jobs": Push([_JOB, *20 * [Step("GET", "/v1/jobs/@job_id@")]], clients=200),
        "HEAD of a durable stream": Push([Step("HEAD", "/v1/jobs/@job_id@/stream")]),
        "long polls": Push([long_poll], clients=200),
        "long polls of durable streams": Push([durable], clients=200),
        "abandoned streams": Push([post("/v1/chat/completions", _STREAM)], is_cut=True),
        "abandoned chats": Push([post("/v1/chat/completions", _STREAM | {"stream": False})], is_cut=False, clients=200),
        "streams": Push([post("/v1/chat/completions", _STREAM)], clients=200),
        "lists by metadata": Push([replace(_GET, path="/v1/jobs?metadata[a]=b&limit=100")]),
        "lists by no such metadata": Push([replace(_GET, path="/v1/jobs?metadata[a]=@unique@&limit=100")]),
        "idempotency keys": Push([replace(_JOB, headers={"idempotency-key": "the same"})]),
        "minutes of usage": Push([
            Step("GET", "/v1/organization/usage/completions?start_time=1&bucket_width=1m&limit=1440"),
        ]),
        "pipelined requests": Push([_GET], pipelined=50),
        "HTTP/1.0": Push([replace(_GET, version="1.0")]),
        "a connection for each request": Push([_GET], is_new=True, clients=200),
        "huge headers": Push([replace(_GET, headers={"x": "a" * 31_000})]),
        "too huge headers": Push([replace(_GET, headers={"x": "a" * 40_000})]),
        "deep JSON": Push([Step("POST", "/v1/jobs", body=_DEEP)], clients=30),
        "prompts of a megabyte": Push([post("/v1/jobs", {"model": MODEL, "prompt": "a b " * 240_000})], clients=30),
        "a million metadata": Push([
            post("/v1/jobs", {"model": MODEL, "prompt": "a", "metadata": {str(i): "" for i in range(60_000)}}),
        ], clients=30),
        "files of 100 MB": Push([
            Step("POST", "/v1/files", body="x" * 1_000_000, repeated=LARGE_BYTES // 1_000_000,
                headers={"content-type": MULTIPART}),
        ], clients=30),
        "half-open connections": Push(wild="half_open", clients=500),
        "idle connections": Push(wild="idle", clients=2_000),
        "heads of a byte a second": Push(wild="trickled_head", clients=200),
        "bodies of a byte a second": Push(wild="trickled_body", clients=400),
        "uploads of a byte a second": Push(wild="trickled_upload", clients=200),
        "files that nobody reads": Push(wild="unread", clients=100),
        "connections": Push(wild="connections", clients=60),
        "a WebSocket's responses": Push([Step("", "", body=json.dumps(
            {"type": "response.create", "model": MODEL, "input": "@unique@", "max_output_tokens": MAX_TOKENS}
        ))], wild="socket_responses", clients=100),
    }  # fmt: skip
