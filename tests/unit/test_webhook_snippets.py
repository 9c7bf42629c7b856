"""The four ways to verify a webhook in docs/webhooks.md agree with what signs them."""

import json
import shutil
import subprocess
import time
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import openai
import pytest

from domain.webhooks import signature_headers
from tests.documents import snippets

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
BODY = b'{"id":"evt_01J","object":"event","created_at":1792489200,"type":"job.completed","data":{"id":"job_01J"}}'
OTHER_BODY = BODY.replace(b"completed", b"failed")


def snippet(language: str, beginning: str = "") -> str:
    found = [one.text for one in snippets(language) if one.page == "webhooks.md" and one.text.startswith(beginning)]
    [text] = found
    return text


def headers_of(body: bytes) -> dict[str, str]:
    return signature_headers(uuid4(), body, [SECRET], int(time.time()))


def test_openai_unwraps_it() -> None:
    code = snippet("python", "event = openai").replace("whsec_...", SECRET)
    names: dict[str, Any] = {"openai": openai, "request": SimpleNamespace(body=BODY.decode(), headers=headers_of(BODY))}
    exec(code, names)
    assert names["event"].type == "job.completed"
    names["request"].body = OTHER_BODY.decode()
    with pytest.raises(openai.InvalidWebhookSignatureError):
        exec(code, names)


def test_plain_python_accepts_it_and_nothing_else() -> None:
    names: dict[str, Any] = {}
    exec(snippet("python", "import base64"), names)
    assert names["is_genuine"](headers_of(BODY), BODY, SECRET)
    assert not names["is_genuine"](headers_of(BODY), OTHER_BODY, SECRET)


@pytest.mark.skipif(shutil.which("node") is None, reason="there is no node")
def test_node_accepts_it_and_nothing_else() -> None:
    headers = headers_of(BODY)
    calls = [
        f"isGenuine({json.dumps(headers)}, {json.dumps(body.decode())}, '{SECRET}')" for body in (BODY, OTHER_BODY)
    ]
    program = snippet("js") + f"console.log({', '.join(calls)})"
    said = subprocess.run(["node", "-e", program], capture_output=True, text=True, check=True).stdout
    assert said == "true false\n"


@pytest.mark.skipif(not all(map(shutil.which, ("openssl", "xxd"))), reason="there is no openssl or no xxd")
def test_a_shell_computes_the_same_signature() -> None:
    headers = headers_of(BODY)
    variables = {"ID": headers["webhook-id"], "TIMESTAMP": headers["webhook-timestamp"]}
    variables |= {"BODY": BODY.decode(), "SECRET": SECRET, "PATH": "/usr/bin:/bin"}
    said = subprocess.run(
        ["bash", "-ec", snippet("sh", "key=")], env=variables, capture_output=True, text=True, check=True
    )
    assert f"v1,{said.stdout.strip()}" == headers["webhook-signature"]
