"""The dashboard's files as a browser gets them: types, a strict policy, and answers that may be kept."""

import httpx
import pytest

from settings import ROOT

STATIC = ROOT / "api" / "static"
TYPES = {
    ".css": "text/css",
    ".html": "text/html",
    ".js": "text/javascript",
    ".png": "image/png",
    ".svg": "image/svg+xml",
}


def policy_of(response: httpx.Response) -> dict[str, str]:
    directives = response.headers["content-security-policy"].split("; ")
    return dict(directive.partition(" ")[::2] for directive in directives)


def test_every_file_has_its_type_a_strict_policy_and_a_tag(http: httpx.Client) -> None:
    for file in STATIC.rglob("*"):
        if not file.is_file():
            continue
        path = f"/static/{file.relative_to(STATIC)}"
        answer = http.get(path)
        assert answer.content == file.read_bytes(), path
        told = answer.headers["content-type"].partition(";")[0].replace("application/javascript", "text/javascript")
        assert told == TYPES.get(file.suffix, told), path
        policy = policy_of(answer)
        assert policy["default-src"] == "'none'", path
        assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'", path
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["cache-control"] == "no-cache"
        head = http.head(path)
        assert (head.status_code, head.content) == (200, b""), path
        assert head.headers["content-length"] == answer.headers["content-length"]
        again = http.get(path, headers={"if-none-match": answer.headers["etag"]})
        assert (again.status_code, again.content) == (304, b""), path


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_the_dashboard_is_for_those_who_accept_html(http: httpx.Client, method: str) -> None:
    browser = http.request(method, "/", headers={"accept": "text/html,*/*"})
    assert browser.headers["content-type"].startswith("text/html")
    assert policy_of(browser)["require-trusted-types-for"] == "'script'"
    assert "unsafe" not in browser.headers["content-security-policy"]
    assert "accept" in browser.headers["vary"]
    kept = http.request(method, "/", headers={"accept": "text/html", "if-none-match": browser.headers["etag"]})
    assert kept.status_code == 304
    assert http.request(method, "/", headers={"accept": "*/*"}).headers["content-type"] == "application/json"


def test_jobs_are_found_by_their_key_and_bad_filters_are_refused(http: httpx.Client) -> None:
    made = http.post(
        "/v1/jobs", json={"model": "fake", "prompt": "Hello"}, headers={"idempotency-key": "order-1"}
    ).json()
    assert [job["id"] for job in http.get("/v1/jobs?idempotency_key=order-1").json()["data"]] == [made["id"]]
    assert http.get("/v1/jobs?idempotency_key=order-2").json()["data"] == []
    assert http.get(f"/v1/jobs?batch=batch_{'0' * 26}").json()["data"] == []
    for query, param in (("idempotency_key=a%20b", "idempotency_key"), ("batch=1", "batch"), ("batch=job_1", "batch")):
        refused = http.get(f"/v1/jobs?{query}")
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, param), refused.text
