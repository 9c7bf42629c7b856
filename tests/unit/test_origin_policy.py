"""Without keys, a web page that somebody has open gets in by no way that a browser offers."""

import pytest
from pydantic import ValidationError

from domain.addresses import OriginPolicy, is_loopback
from settings import Settings

PAGE = "https://evil.example"
NAVIGATE = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate", "sec-fetch-dest": "document"}


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "localhost:8000",
        "LOCALHOST.",
        "127.0.0.1:8000",
        "127.8.9.1",
        "[::1]:8000",
        "[::1]",
        "app.localhost",
    ],
)
def test_names_of_this_machine_come_in(host: str) -> None:
    assert OriginPolicy().refusal("GET", {"host": host}) is None


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:8000",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "notlocalhost",
        "localhost@evil.example",
        "evil.example#localhost",
        "localhost/../evil",
        "10.0.0.5",
        "192.168.1.2:8000",
        "169.254.169.254",
        "0.0.0.0",
        "[::]:8000",
        "[fe80::1]",
        "[::1",
        "::1]",
        "",
        ":8000",
        "*",
        "localhost\tevil",
    ],
)
def test_other_names_stay_outside(host: str) -> None:
    refusal = OriginPolicy().refusal("GET", {"host": host})
    assert refusal is not None
    assert "CELERIAC_ALLOWED_HOSTS" in refusal
    assert repr(host[:80]) in refusal


def test_the_settings_let_names_in() -> None:
    policy = OriginPolicy(allowed_hosts=["llm.lan", "*.intern.example", "10.0.0.5"])
    for host in ("llm.lan", "LLM.lan:443", "a.intern.example", "a.b.intern.example:8000", "10.0.0.5:80"):
        assert policy.refusal("POST", {"host": host}) is None, host
    for host in ("x.llm.lan", "intern.example", "evilintern.example", "10.0.0.50"):
        assert policy.refusal("POST", {"host": host}) is not None, host


@pytest.mark.parametrize("method", ["GET", "POST", "DELETE", "HEAD", "OPTIONS"])
@pytest.mark.parametrize(
    "headers",
    [
        {"origin": PAGE},
        {"origin": PAGE, **NAVIGATE},
        {"origin": "null"},
        {"origin": ""},
        {"origin": "http://localhost:3000"},
        {"origin": "http://127.0.0.1:8000"},
        {"origin": "http://localhost:8000.evil.example"},
        {"origin": "chrome-extension://localhost:8000"},
        {"origin": "file://"},
        {"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors", "sec-fetch-dest": "image"},
        {"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors", "sec-fetch-dest": "script"},
        {"sec-fetch-site": "same-site", "sec-fetch-mode": "cors", "sec-fetch-dest": "empty"},
        {**NAVIGATE, "sec-fetch-dest": "iframe"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "what"},
    ],
)
def test_another_page_may_neither_change_nor_read(method: str, headers: dict[str, str]) -> None:
    refusal = OriginPolicy().refusal(method, {"host": "localhost:8000", **headers})
    assert refusal is not None
    assert "CELERIAC_CORS_ORIGINS" in refusal


@pytest.mark.parametrize(
    ("method", "headers"),
    [
        ("POST", {"origin": "http://localhost:8000", "sec-fetch-site": "same-origin"}),
        ("POST", {"origin": "HTTP://LOCALHOST:8000"}),
        ("GET", {"sec-fetch-site": "same-origin", "sec-fetch-mode": "cors"}),
        ("GET", {"sec-fetch-site": "none", "sec-fetch-mode": "navigate", "sec-fetch-dest": "document"}),
        ("GET", NAVIGATE),
        ("POST", {}),
        ("DELETE", {"user-agent": "curl"}),
    ],
)
def test_own_pages_links_and_programs_come_in(method: str, headers: dict[str, str]) -> None:
    assert OriginPolicy().refusal(method, {"host": "localhost:8000", **headers}) is None


def test_a_form_that_navigates_stays_outside() -> None:
    assert OriginPolicy().refusal("POST", {"host": "localhost", **NAVIGATE}) is not None


def test_pages_of_the_settings_come_in() -> None:
    policy = OriginPolicy(cors_origins=["https://app.example.com", "null"])
    for origin in ("https://app.example.com", "https://APP.example.com", "null"):
        assert policy.refusal("POST", {"host": "localhost", "origin": origin, "sec-fetch-site": "cross-site"}) is None
    for origin in ("http://app.example.com", "https://app.example.com:8443", "https://x.app.example.com"):
        assert policy.refusal("POST", {"host": "localhost", "origin": origin}) is not None, origin


def test_a_request_without_a_host_is_no_browsers() -> None:
    assert OriginPolicy().refusal("GET", {}) is None


@pytest.mark.parametrize("name", ["", "example.com", "::", "0.0.0.0", "localhost.example"])
def test_what_is_not_loopback(name: str) -> None:
    assert not is_loopback(name)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("cors_origins", "app.example.com"),
        ("cors_origins", "https://app.example.com/"),
        ("cors_origins", "https://*.example.com"),
        ("cors_origins", "https://user@app.example.com"),
        ("allowed_hosts", "https://llm.lan"),
        ("allowed_hosts", "llm.lan:8000"),
        ("allowed_hosts", "*"),
        ("allowed_hosts", "a.*.b"),
    ],
)
def test_a_setting_that_would_let_in_nobody_or_everybody_is_refused(setting: str, value: str) -> None:
    with pytest.raises(ValidationError, match="; use "):
        Settings.model_validate({setting: value})
