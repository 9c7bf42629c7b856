"""Which URLs may be webhooks: everything that could mean a machine of ours is refused, in every spelling."""

import asyncio
import socket
import threading
from collections.abc import Awaitable, Callable

import httpcore
import pytest
from pydantic import ValidationError

from domain.webhooks import BadWebhookUrl, is_public_address, parse_webhook_url
from settings import Settings
from tasks.webhook_http import CONNECT_SECONDS, GuardedNetwork, LookupThreads, TargetGuard, TargetRefused, WebhookClient

SETTINGS = Settings()

GOOD = [
    "https://example.com",
    "https://example.com/",
    "https://EXAMPLE.com/Path?Query=1&b=%20",
    "https://example.com:8443/hook",
    "https://a-b.c_d.example/hook",
    "https://xn--bcher-kva.example/hook",
    "https://1.2.3.4.example.com/hook",
    "https://hooks.example.com?token=abc",
    "https://example.com/a@b:c",
    "https://example.com/" + "x" * 2000,
]

LOOPBACKS = [
    "127.0.0.1", "127.1", "127.0.1", "2130706433", "0x7f000001", "0x7F.0x0.0x0.0x1", "0177.0.0.1", "017700000001",
    "0x7f.1", "127.0.0.1.", "127.000.000.001", "0", "0.0.0.0", "00000", "0x0", "127.65535", "1.1.1.1", "8.8.8.8",
    "[::1]", "[::]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[0:0:0:0:0:0:0:1]", "[fe80::1%25eth0]", "[fc00::1]",
    "[64:ff9b::7f00:1]", "[2002:7f00:1::]", "[2606:4700::1111]", "[::127.0.0.1]", "[v1.x]", "[", "]", "[]",
    "１２７.0.0.1", "127。0。0。1", "①②⑦.0.0.1", "localhost", "LOCALHOST", "localhost.", "foo.localhost", "db",
    "redis", "postgres.local", "kubernetes.default.svc.cluster.local", "metadata.google.internal", "router.lan",
    "printer.home.arpa", "wiki.intranet", "x.localdomain", "site.onion", "169.254.169.254", "0xa9fea9fe",
    "2852039166", "0251.0376.0251.0376", "169.254.43518", "10.0.0.1", "10.1", "192.168.1.1", "172.16.0.1",
    "100.64.0.1", "192.168.257", "0xc0a80101", "3232235777", "224.0.0.1", "255.255.255.255", "999.999.999.999",
    "1.2.3.4.5", "a.0x1", "a.1", "example.0x", "-example.com", "example-.com", "exa mple.com", "example..com",
    ".example.com", "example.com.", "exämple.com", "ｅxample.com", "example.com%00.evil.com", "example.com%2f",
    "%6cocalhost", "local\u200bhost", "exam\u00adple.com", "ex*mple.com", "exa\tmple.com", "example.com\r\nx: y",
    "a" * 64 + ".example.com", ".".join(["a" * 60] * 5) + ".com", "",
]  # fmt: skip

SHAPES = [
    "https://user@example.com/", "https://user:password@example.com/", "https://@example.com/",
    "https://example.com@127.0.0.1/", "https://127.0.0.1@example.com/", "https://example.com:443@evil.example/",
    "https://example.com\\@127.0.0.1/", "https://example.com\\.evil.example/", "https:\\\\example.com\\",
    "https://evil.example\\example.com/", "https:/example.com/", "https:example.com", "https:///example.com/",
    "https:////example.com/", "//example.com/", "example.com", "/hook", "", " ", "https://", "https://:443/",
    "http://example.com/", "HTTPS://example.com/", "ftp://example.com/", "file:///etc/passwd", "gopher://example.com/",
    "dict://example.com:11211/", "ws://example.com/", "wss://example.com/", "data:text/plain,x", "javascript:alert(1)",
    "unix:///var/run/docker.sock", "http+unix://%2Fvar%2Frun%2Fdocker.sock/", "ldap://example.com/",
    "jar:https://example.com!/", "blob:https://example.com/x", "about:blank", "mailto:a@example.com", "s3://bucket/x",
    "https://example.com:22/", "https://example.com:25/", "https://example.com:80/", "https://example.com:6379/",
    "https://example.com:5432/", "https://example.com:0/", "https://example.com:65536/", "https://example.com:99999/",
    "https://example.com:-1/", "https://example.com:/", "https://example.com:44３/", "https://example.com:0x1bb/",
    "https://example.com:443:443/", "https://example.com:+443/", "https://example.com: 443/",
    "https://example.com/#fragment", "https://example.com#@evil.example/", "https://example.com/a b",
    "https://example.com/\n", "https://example.com/\r\nHost: evil", "https://example.com/\t", "https://example.com/\x00",
    "https://example.com/é", "https://example.com/\u2028", " https://example.com/", "https://example.com/ ",
    "\thttps://example.com/", "https ://example.com/", "https://example.com;@evil.example/",
    "https://example.com,evil.example/", "https://example.com&@evil.example/", "https://example.com/" + "x" * 2040,
    "https://[::1", "https://::1/", "https://::1]:443/", "https://example.com]/", "https://{example.com}/",
    "https://exa|mple.com/", "https://exa<mple.com/", 'https://exa"mple.com/', "https://$(id).example.com/",
]  # fmt: skip

BAD = [*(f"https://{host}/" for host in LOOPBACKS), *SHAPES]

PRIVATE = [
    "127.0.0.1", "127.255.255.254", "0.0.0.0", "0.1.2.3", "10.0.0.1", "10.255.255.255", "100.64.0.1", "100.127.255.255",
    "169.254.169.254", "172.16.0.1", "172.31.255.255", "192.0.0.1", "192.0.0.9", "192.0.2.1", "192.88.99.1",
    "192.168.0.1", "198.18.0.1", "198.19.255.255", "198.51.100.1", "203.0.113.1", "224.0.0.1", "239.255.255.255",
    "240.0.0.1", "255.255.255.255", "::", "::1", "::7f00:1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:8.8.8.8",
    "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "64:ff9b:1::1", "100::1", "2001::1", "2001:db8::1", "2001:10::1",
    "2002:7f00:1::", "2002:a9fe:a9fe::", "fc00::1", "fd00:ec2::254", "fe80::1", "fe80::1%eth0", "fec0::1", "ff02::1",
    "2606:4700::1111%eth0", "", "localhost", "1.1.1", "0x7f.0.0.1",
]  # fmt: skip
PUBLIC = ["1.1.1.1", "8.8.8.8", "93.184.216.34", "2606:4700::1111", "2001:4860:4860::8888"]


def resolver(*addresses: str) -> Callable[[str, int], Awaitable[list[str]]]:
    async def resolve(host: str, port: int) -> list[str]:
        return list(addresses)

    return resolve


class Sink(httpcore.AsyncNetworkBackend):
    """Instead of a network: counts where one wanted to connect."""

    def __init__(self) -> None:
        self.connected: list[str] = []

    async def connect_tcp(self, host: str, *arguments: object, **options: object) -> httpcore.AsyncNetworkStream:
        self.connected.append(host)
        raise httpcore.ConnectError


@pytest.mark.parametrize("text", GOOD)
def test_a_good_url_is_taken_and_stored_as_it_was_understood(text: str) -> None:
    url = TargetGuard(SETTINGS).parse(text)
    assert parse_webhook_url(str(url)) == url
    assert str(parse_webhook_url(str(url))) == str(url)
    assert str(url).split("/")[2].partition(":")[0] == url.host  # what SQL takes for the host


def test_the_corpus_is_large_enough() -> None:
    assert len(set(BAD)) >= 150


@pytest.mark.parametrize("text", BAD)
def test_a_bad_url_is_refused(text: str) -> None:
    with pytest.raises(BadWebhookUrl):
        TargetGuard(SETTINGS).parse(text)


@pytest.mark.parametrize("address", PRIVATE)
def test_an_address_that_is_not_global_is_known(address: str) -> None:
    assert not is_public_address(address)


@pytest.mark.parametrize("address", PUBLIC)
def test_a_public_address_is_known(address: str) -> None:
    assert is_public_address(address)


async def attempts_of(texts: list[str], *addresses: str) -> list[str]:
    """Where a client connects that is given these URLs, past all that refuses them at registration."""
    guard = TargetGuard(SETTINGS, resolver(*addresses))
    sink = Sink()
    client = WebhookClient(guard, sink)
    for text in texts:
        try:
            url = parse_webhook_url(text)
        except BadWebhookUrl:
            continue
        await client.post(url, {}, b"{}")
    await client.aclose()
    return sink.connected


def test_no_connection_goes_to_an_address_that_is_not_global() -> None:
    """Whatever the URL, and however the private address is mixed with public ones."""
    for address in PRIVATE:
        assert asyncio.run(attempts_of([*GOOD, "https://localhost/"], address)) == []
        assert asyncio.run(attempts_of(GOOD[:2], "1.1.1.1", address)) == []
        assert asyncio.run(attempts_of(GOOD[:2], address, "1.1.1.1")) == []
    connected = asyncio.run(attempts_of(BAD, "8.8.8.8"))
    assert all(map(is_public_address, connected))


def test_the_connection_goes_to_the_address_that_was_checked() -> None:
    assert asyncio.run(attempts_of(["https://example.com/"], "8.8.8.8")) == ["8.8.8.8"]


def test_a_name_that_turns_private_after_the_registration_is_refused() -> None:
    answers = iter([["8.8.8.8"], ["169.254.169.254"]])

    async def rebinding(host: str, port: int) -> list[str]:
        return next(answers)

    async def rebind() -> None:
        guard = TargetGuard(SETTINGS, rebinding)
        await guard.check("https://example.com/")
        network = GuardedNetwork(guard, "https", Sink())
        with pytest.raises(TargetRefused):
            await network.connect_tcp("example.com", 443, CONNECT_SECONDS)

    asyncio.run(rebind())


@pytest.mark.parametrize(
    ("error", "is_refused"), [(socket.EAI_NONAME, True), (socket.EAI_AGAIN, False)], ids=["no name", "no resolver"]
)
def test_a_name_is_refused_where_the_resolver_says_that_there_is_none(error: int, is_refused: bool) -> None:
    async def failing(host: str, port: int) -> list[str]:
        raise socket.gaierror(error, "no")

    check = TargetGuard(SETTINGS, failing).check("https://example.com/")
    if is_refused:
        with pytest.raises(BadWebhookUrl, match="has no address"):
            asyncio.run(check)
    else:
        assert asyncio.run(check).host == "example.com"


def test_private_targets_can_be_allowed() -> None:
    guard = TargetGuard(Settings(webhook_private_targets=True), resolver("127.0.0.1"))
    assert asyncio.run(guard.check("http://localhost:8080/hook")).port == 8080
    with pytest.raises(BadWebhookUrl):  # an address is still no name
        guard.parse("http://127.0.0.1:8080/hook")


def test_an_operators_networks_are_reached_also_by_http_and_nothing_else_is() -> None:
    settings = Settings(webhook_private_networks="10.1.0.0/16, fd12::/48", webhook_ports="80,443")

    async def check(url: str, *addresses: str) -> None:
        await TargetGuard(settings, resolver(*addresses)).check(url)

    for address in ("10.1.2.3", "fd12::1"):
        for url in ("http://hooks.internal/", "https://hooks/", "https://example.com/"):
            asyncio.run(check(url, address))
    for addresses in (("10.2.0.1",), ("169.254.169.254",), ("127.0.0.1",), ("10.1.2.3", "10.2.0.1"), ("fd13::1",)):
        with pytest.raises(BadWebhookUrl, match="not public"):
            asyncio.run(check("https://hooks.internal/", *addresses))
    with pytest.raises(BadWebhookUrl, match="not in a network"):
        asyncio.run(check("http://example.com/", "8.8.8.8"))
    with pytest.raises(BadWebhookUrl, match="allowed ports"):
        asyncio.run(check("https://hooks.internal:5432/", "10.1.2.3"))
    asyncio.run(check("https://example.com/", "8.8.8.8"))


def test_nothing_is_sent_in_clear_to_a_public_host_that_could_not_be_looked_up_at_the_registration() -> None:
    settings = Settings(webhook_private_networks="10.1.0.0/16", webhook_ports="80,443")

    async def late(host: str, port: int) -> list[str]:
        raise socket.gaierror(socket.EAI_AGAIN, "no answer yet")

    async def post(text: str, *addresses: str) -> list[str]:
        url = await TargetGuard(settings, late).check(text)
        sink = Sink()
        client = WebhookClient(TargetGuard(settings, resolver(*addresses)), sink)
        response = await client.post(url, {}, b"{}")
        await client.aclose()
        assert ("use https" in str(response.error)) is not bool(sink.connected)
        return sink.connected

    assert asyncio.run(post("http://example.com/", "8.8.8.8")) == []
    assert asyncio.run(post("http://example.com/", "10.1.2.3", "8.8.8.8")) == []
    assert asyncio.run(post("http://example.com/", "10.1.2.3")) == ["10.1.2.3"]
    assert asyncio.run(post("https://example.com/", "8.8.8.8")) == ["8.8.8.8"]


@pytest.mark.parametrize("text", ["10.1.0.0/33", "10.1.2.3/16", "intranet", "10.1.0.0/16 10.2.0.0/16"])
def test_networks_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(ValidationError, match="is not a network; use a form like"):
        Settings(webhook_private_networks=text)


def test_a_proxy_of_the_environment_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert asyncio.run(attempts_of(["https://example.com/"], "8.8.8.8")) == ["8.8.8.8"]


def test_names_that_nobody_answers_for_keep_no_other_from_being_found() -> None:
    may_end = threading.Event()

    def look_up(host: str, port: int) -> list[str]:
        if host.startswith("silent"):
            may_end.wait()
        return ["8.8.8.8"]

    async def ask() -> None:
        lookups = LookupThreads(look_up)
        silent = [asyncio.create_task(lookups.resolve(f"silent-{n}.example", 443)) for n in range(64)]
        await asyncio.sleep(0)
        assert await lookups.resolve("example.com", 443) == ["8.8.8.8"]
        assert not any(task.done() for task in silent)
        may_end.set()
        assert await asyncio.gather(*silent) == [["8.8.8.8"]] * 64

    asyncio.run(ask())


def test_a_silent_name_is_looked_up_once_for_all_and_only_so_many_are_at_a_time() -> None:
    may_end, asked = threading.Event(), []

    def look_up(host: str, port: int) -> list[str]:
        asked.append(host)
        may_end.wait()
        raise socket.gaierror(socket.EAI_AGAIN, "no")

    async def ask() -> None:
        lookups = LookupThreads(look_up, max_lookups=2)
        same = [asyncio.create_task(lookups.resolve("a.example", 443)) for _ in range(8)]
        await asyncio.sleep(0)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0):
                await lookups.resolve("b.example", 443)
        with pytest.raises(OSError, match="2 names are already being looked up"):
            await lookups.resolve("c.example", 443)
        same[0].cancel()
        may_end.set()
        first, *others = await asyncio.gather(*same, return_exceptions=True)
        assert isinstance(first, asyncio.CancelledError)
        assert all(isinstance(other, socket.gaierror) for other in others)
        assert sorted(asked) == ["a.example", "b.example"]

    asyncio.run(ask())
