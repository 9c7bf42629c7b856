"""The dashboard in a real browser, against the real API. Skipped on machines without Chromium."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.resources import files
from typing import Any
from uuid import uuid4

import httpx
import playwright.sync_api
import pytest
from sqlalchemy import select
from sqlalchemy.orm import Session, sessionmaker

from domain.access import Scope
from domain.jobs import JobError, JobStatus
from settings import Settings
from storage import administration, erasures, model_pulls, tenants
from storage.administration import TenantChanges
from storage.erasures import Erasure
from storage.model_pulls import Progress, PullStatus
from storage.tables import Tenant
from tests.integration.api_harness import ApiServer, HandWorker, make_chunk, post_job
from tests.waiting import SECONDS, slowness, wait_until

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")

SCRIPT_TEXT = "<img src=x onerror=\"document.title='hacked'\"><b>bold</b>"
VIEWS = ("#/", "#/jobs", "#/batches", "#/dead-letters", "#/models", "#/playground", "#/usage", "#/access")


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with playwright.sync_api.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@contextmanager
def tab(chromium: Any, url: str, **options: Any) -> Iterator[Any]:
    """A page in a profile of its own, at `url`. Fails if anything was logged as an error, such as what the policy
    blocked."""
    context = chromium.new_context(**options)
    context.set_default_timeout(SECONDS / 3 * 1000 * slowness())
    page = context.new_page()
    complaints: list[str] = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.goto(url)
    yield page
    context.close()
    unexpected = [text for text in complaints if not text.startswith("Failed to load resource")]  # a refusal
    assert not unexpected


@pytest.fixture
def page(chromium: Any, api: ApiServer) -> Iterator[Any]:
    with tab(chromium, api.url) as page:
        yield page


def shows(page: Any, text: str) -> None:
    page.get_by_text(text).first.wait_for()


def has_rows(page: Any, count: int) -> None:
    rows = page.locator("tbody tr")
    wait_until(lambda: rows.count() == count, f"there are {count} rows")


def field(page: Any, name: str) -> Any:
    """The control of a form's field, by the whole label without its hint."""
    return page.locator(f".field:has(> span:text-is({name!r}))").locator("input, textarea, select")


def finish(hand_worker: HandWorker, job_id: str, *texts: str) -> None:
    job = hand_worker.claim(job_id)
    hand_worker.say(job, *texts)
    hand_worker.finish(job, *texts)


def test_the_overview_says_what_waits_and_why(page: Any, http: httpx.Client) -> None:
    post_job(http)
    row = page.locator("tr", has_text="no worker").first
    row.wait_for()
    assert "1 no worker" in row.inner_text()
    shows(page, "No worker is ready: start one with celeriac worker, or see the logs of those that are loading.")
    page.locator(".card:has(h2:text-is('Queues by tenant')) tr", has_text="default").wait_for()
    assert page.locator("canvas").count() == 2


def test_a_jobs_page_follows_it_from_the_queue_to_its_end(
    page: Any, api: ApiServer, http: httpx.Client, hand_worker: HandWorker
) -> None:
    job_id = post_job(http, metadata={"who": SCRIPT_TEXT[:60]})["id"]
    page.goto(f"{api.url}/#/jobs/{job_id}")
    shows(page, "Waiting")
    job = hand_worker.claim(job_id)
    hand_worker.say(job, SCRIPT_TEXT)
    log = page.get_by_role("log")
    log.get_by_text("<b>bold</b>").wait_for()
    page.reload()
    log.get_by_text("<b>bold</b>").wait_for()
    hand_worker.release(job)
    again = hand_worker.claim(job_id)
    hand_worker.commit(again, *_chunks(2, " and on"))
    log.get_by_text("</b> and on").wait_for()
    hand_worker.finish(again, SCRIPT_TEXT, " and on")
    page.get_by_role("button", name="Run again").wait_for()
    timeline = page.locator(".timeline").inner_text()
    for step in ("Accepted", "Claimed", "First token", "Paused", "Claimed again", "attempt 2", "Completed"):
        assert step in timeline, timeline
    assert page.title() == "Job · Celeriac"
    assert page.locator("#main img, #main b:text-is('bold')").count() == 0
    page.get_by_role("button", name="Run again").click()
    page.wait_for_url(lambda url: job_id not in url)
    assert http.get("/v1/jobs").json()["data"][0]["id"] in page.url


def _chunks(first: int, *texts: str) -> list[Any]:
    return [make_chunk(number, text) for number, text in enumerate(texts, start=first)]


def test_jobs_are_searched_and_cancelled_together(page: Any, api: ApiServer, http: httpx.Client) -> None:
    mine = [post_job(http, metadata={"run": "a"})["id"] for _ in range(2)]
    other = post_job(http, idempotency_key="order-7")["id"]
    page.goto(f"{api.url}/#/jobs")
    has_rows(page, 3)
    search = page.get_by_label("Search")
    for text, count in (("run=a", 2), ("order-7", 1), ("nothing-has-it", 0), ("run=a", 2)):
        search.fill(text)
        search.press("Enter")
        has_rows(page, count)
    page.get_by_label("Select all jobs of this page").check()
    page.get_by_role("button", name="Cancel 2").click()
    question = page.get_by_role("group", name="Cancel 2 jobs?")
    assert page.evaluate("document.activeElement.textContent") == "Keep"
    page.keyboard.press("Escape")
    question.wait_for(state="detached")
    page.keyboard.press("Enter")  # the focus is back at the button
    question.get_by_role("button", name="Cancel 2").click()
    wait_until(lambda: {http.get(f"/v1/jobs/{one}").json()["status"] for one in mine} == {"cancelled"})
    assert http.get(f"/v1/jobs/{other}").json()["status"] == "queued"
    search.fill(f"chatcmpl-{other.removeprefix('job_')}")
    search.press("Enter")
    page.wait_for_url(f"**/#/jobs/{other}")


def test_a_dead_letter_is_replayed(page: Any, api: ApiServer, http: httpx.Client, hand_worker: HandWorker) -> None:
    job_id = post_job(http)["id"]
    error = JobError(code="engine_error", message="the engine refused it")
    hand_worker.finish(hand_worker.claim(job_id), status=JobStatus.FAILED, error=error)
    page.goto(f"{api.url}/#/dead-letters")
    shows(page, "the engine refused it")
    page.get_by_text("1 attempt").click()
    page.get_by_role("button", name="Replay").click()
    page.wait_for_url("**/#/jobs/job_*")
    shows(page, "as a retry of")


def test_the_playground_compares_two_models_and_survives_a_reload(
    page: Any, api: ApiServer, http: httpx.Client, hand_worker: HandWorker
) -> None:
    page.goto(f"{api.url}/#/playground")
    page.get_by_label("Two side by side").check()
    page.get_by_label("Message 1", exact=True).fill("Hi")
    field(page, "max_tokens").fill("9")
    field(page, "seed").fill(str(2**63 - 1))
    page.get_by_text("All sampling parameters").click()
    field(page, "top_k").fill("3")
    field(page, "stop").fill("END\nSTOP")
    page.get_by_role("button", name="Run", exact=True).click()
    page.wait_for_url("**/#/playground?a=job_*&b=job_*")
    shows(page, "Waiting for a worker of the model")
    ids = re.findall(r"job_\w+", page.url)
    requests = [http.get(f"/v1/jobs/{one}?include=input").json() for one in ids]
    assert [one["model"] for one in requests] == ["fake", "large"]
    params = json.loads(http.get(f"/v1/jobs/{ids[0]}?include=input").text)["input"]["params"]
    assert (params["max_tokens"], params["top_k"], params["stop"]) == (9, 3, ["END", "STOP"])
    assert params["seed"] == 2**63 - 1
    job = hand_worker.claim(ids[0])
    hand_worker.say(job, "One", " two")
    answer = page.get_by_role("log").first
    answer.get_by_text("One two").wait_for()
    page.reload()
    answer.get_by_text("One two").wait_for()
    hand_worker.commit(job, *_chunks(3, " three"))
    answer.get_by_text("One two three").wait_for()
    hand_worker.finish(job, "One", " two", " three")
    page.get_by_role("button", name="Continue the chat").click()
    assert page.get_by_label("Message 2", exact=True).input_value() == "One two three"


def test_a_refusal_is_shown_at_its_field(page: Any, api: ApiServer) -> None:
    page.goto(f"{api.url}/#/playground")
    page.get_by_text("Tools and thinking").click()
    field(page, "tools").fill("[{")
    page.get_by_role("button", name="Run", exact=True).click()
    shows(page, "it is not JSON")
    field(page, "tools").fill("")
    page.get_by_text("All sampling parameters").click()
    field(page, "repetition_penalty").fill("1.1")
    field(page, "min_p").press_sequentially("-")
    page.get_by_text("All sampling parameters").click()  # closed: it is said below the form, too
    page.get_by_role("button", name="Run", exact=True).click()
    page.locator(".problem", has_text="min_p: it is not a number").wait_for()
    page.get_by_text("All sampling parameters").click()
    field(page, "min_p").fill("")
    field(page, "max_tokens").fill("2000000")
    page.get_by_role("button", name="Run", exact=True).click()
    page.locator(".field.wrong", has_text="max_tokens").wait_for()


class TestKeys:
    @pytest.fixture
    def api_settings(self, database_url: str, redis_url: str) -> Settings:
        return Settings(database_url=database_url, redis_url=redis_url, auth="api_key")

    @pytest.fixture
    def make_key(
        self, session_factory: sessionmaker[Session], make_tenant: Callable[..., Tenant]
    ) -> Callable[..., str]:
        def make(**options: Any) -> str:
            with session_factory.begin() as session:
                return tenants.create_key(session, make_tenant().id, **options)

        return make

    def test_each_key_sees_its_own(self, page: Any, api: ApiServer, make_key: Callable[..., str]) -> None:
        mine, other = make_key(), make_key()
        with api.client(mine) as client:
            job_id = post_job(client)["id"]
        field = page.get_by_label("API key")
        field.wait_for()
        assert not serious(page)
        field.fill("sk-wrong")
        page.get_by_role("button", name="Enter").click()
        shows(page, "this API key is not valid")
        for key, count in ((mine, 1), (other, 0)):
            field.fill(key)
            page.get_by_role("button", name="Enter").click()
            page.get_by_role("link", name="Jobs", exact=True).click()
            page.get_by_text("No jobs yet" if count == 0 else job_id[-6:]).wait_for()
            assert page.locator("tbody tr").count() == count
            assert page.get_by_role("heading", name="Workers").count() == 0
            assert key not in page.url
            assert key not in page.evaluate("JSON.stringify(localStorage)")
            page.get_by_role("button", name="Forget key").click()
            field.wait_for()

    def test_a_key_that_only_reads_is_offered_nothing_else(
        self,
        page: Any,
        api: ApiServer,
        hand_worker: HandWorker,
        make_tenant: Callable[..., Tenant],
        session_factory: sessionmaker[Session],
    ) -> None:
        with session_factory.begin() as session:
            tenant = make_tenant().id
            whole = tenants.create_key(session, tenant)
            reading = tenants.create_key(session, tenant, scopes=[Scope.READ])
        with api.client(whole) as client:
            waiting, failed = post_job(client)["id"], post_job(client)["id"]
        error = JobError(code="x", message="it broke")
        hand_worker.finish(hand_worker.claim(failed), status=JobStatus.FAILED, error=error)
        for key, is_offered in ((reading, False), (whole, True)):
            page.get_by_label("API key").fill(key)
            page.get_by_role("button", name="Enter").click()
            for view, sign, offers in (
                (f"jobs/{waiting}", "Accepted", ("button:text-is('Cancel')",)),
                (f"jobs/{failed}", "Failed", ("button:text-is('Retry')", "button:text-is('Delete')")),
                ("jobs", "it broke", ("input[type=checkbox]", ".bulk")),
                ("dead-letters", "it broke", ("button:text-is('Replay')",)),
                ("batches", "No batches yet", ("h2:text-is('New batch')",)),
                ("playground", "Nothing asked yet", ("button:text-is('Run'):enabled",)),
            ):
                page.goto(f"{api.url}/#/{view}")
                shows(page, sign)
                for offer in offers:
                    assert (page.locator(offer).count() > 0) is is_offered, (view, offer)
            page.get_by_role("button", name="Forget key").click()

    def test_a_key_keeps_what_it_may_do_while_that_cannot_be_asked(
        self, page: Any, api: ApiServer, make_key: Callable[..., str]
    ) -> None:
        page.get_by_label("API key").fill(make_key(scopes=["read"]))
        page.get_by_role("button", name="Enter").click()
        shows(page, "No job of yours is running")
        page.route("**/v1/key", lambda route: route.fulfill(status=503, json={"error": {"message": "away"}}))
        page.route("**/v1/jobs?*", lambda route: route.fulfill(status=401, json={"error": {"message": "who?"}}))
        with page.expect_response("**/v1/key"):
            page.goto(f"{api.url}/#/jobs")
        page.unroute("**/v1/jobs?*")
        page.goto(f"{api.url}/#/batches")
        shows(page, "No batches yet")
        assert page.get_by_role("heading", name="New batch").count() == 0

    def test_an_admin_has_a_user_erased(
        self, page: Any, api: ApiServer, session_factory: sessionmaker[Session], make_key: Callable[..., str]
    ) -> None:
        page.get_by_label("API key").fill(make_key(scopes=list(Scope)))
        page.get_by_role("button", name="Enter").click()
        page.get_by_role("link", name="Access", exact=True).click()
        page.get_by_role("button", name="Erase a user").first.click()
        inset = page.locator(".inset")
        erase = inset.get_by_role("button", name="Erase", exact=True)
        assert erase.is_disabled()
        field(inset, "Metadata name").press_sequentially("user ")
        field(inset, "Metadata value").press_sequentially("John Smith")
        erase.click()
        shows(inset, 'of the user with the metadata user="John Smith", with their texts?')
        inset.get_by_role("group").get_by_role("button", name="Erase", exact=True).click()
        row = inset.locator("tbody tr")
        shows(row, "erasing batches")
        shows(row, "0 jobs, 0 batches, 0 conversations")
        assert not serious(page)
        with session_factory.begin() as session:
            [erasure] = session.scalars(select(Erasure))
            assert (erasure.metadata_name, erasure.metadata_value) == ("user", "John Smith")
            erasures.put_off(session, erasure.id, error="the archive is full")
        shows(row, "the archive is full")
        assert "John" not in row.inner_text()

    def test_one_of_many_tenants_is_found(
        self, page: Any, api: ApiServer, session_factory: sessionmaker[Session], make_key: Callable[..., str]
    ) -> None:
        with session_factory.begin() as session:
            for number in range(60):
                administration.create_tenant(session, f"tenant-{number:02}", TenantChanges(), actor="test")
        page.get_by_label("API key").fill(make_key(scopes=list(Scope)))
        page.get_by_role("button", name="Enter").click()
        page.get_by_role("link", name="Access", exact=True).click()
        page.get_by_role("link", name="Next").click()
        shows(page, "tenant-59")
        field(page, "Only the tenant").fill("tenant-07")
        page.keyboard.press("Enter")
        page.get_by_role("heading", name="Keys of tenant-07").wait_for()
        page.get_by_role("button", name="Create key").click()
        shows(page, "This is the only time that it is shown.")
        page.goto(f"{api.url}/#/access?tenant=nobody")
        shows(page, "nobody")

    def test_an_admin_unloads_a_model(self, page: Any, http: httpx.Client, make_key: Callable[..., str]) -> None:
        page.get_by_label("API key").fill(make_key(scopes=list(Scope)))
        page.get_by_role("button", name="Enter").click()
        page.get_by_role("link", name="Models", exact=True).click()
        card = page.locator(".card", has_text="fake").first
        card.get_by_role("button", name="Unload").click()
        card.get_by_role("button", name="Unload").click()
        card.get_by_role("button", name="Load", exact=True).wait_for()
        wait_until(lambda: http.get("/health").json()["models_unloaded"] == ["fake"])

    def test_an_admin_pulls_a_model(
        self, page: Any, session_factory: sessionmaker[Session], make_key: Callable[..., str]
    ) -> None:
        page.get_by_label("API key").fill(make_key(scopes=list(Scope)))
        page.get_by_role("button", name="Enter").click()
        page.get_by_role("link", name="Models", exact=True).click()
        source, pull = field(page, "Model"), page.get_by_role("button", name="Pull", exact=True)
        source.fill("gemma3-270m")
        assert pull.is_disabled()
        page.get_by_label("I accept the Gemma Terms of Use").check()
        pull.click()
        row = page.locator("tr", has_text="gemma3-270m")
        shows(row, "queued")
        owner = uuid4()
        with session_factory.begin() as session:
            assert model_pulls.claim(session, owner)
            assert model_pulls.report(session, "gemma3-270m", owner, Progress("Storing gemma3-270m", 63, 252))
        shows(row, "Storing gemma3-270m: 25 % of 252 B")
        row.get_by_role("button", name="Cancel").click()
        row.get_by_role("group").get_by_role("button", name="Cancel").click()
        shows(row, "is cancelled")
        with session_factory.begin() as session:
            model_pulls.end(session, "gemma3-270m", owner, PullStatus.FAILED, "the disk is full")
        shows(row, "the disk is full")
        source.fill("/etc/passwd")
        pull.click()
        shows(page, "a folder is pulled with celeriac models pull")

    def test_an_admin_makes_a_tenant_with_a_limit_and_a_key(
        self, page: Any, api: ApiServer, make_key: Callable[..., str]
    ) -> None:
        page.get_by_label("API key").fill(make_key(scopes=list(Scope)))
        page.get_by_role("button", name="Enter").click()
        page.get_by_role("link", name="Access", exact=True).click()
        page.get_by_label("New tenant").fill("acme")
        page.get_by_role("button", name="Add").click()
        tenant = page.locator("li.letter", has_text="acme").first
        tenant.get_by_role("button", name="Change").click()
        field(tenant, "queued jobs").fill("50")
        tenant.get_by_role("button", name="Save").click()
        shows(tenant, "50 queued jobs")
        first = page.locator("li.letter:has(button:text-is('Rotate'))").first
        first.get_by_role("button", name="Change").click()
        field(first, "max priority").fill("3")
        first.get_by_role("button", name="Save").click()
        shows(first, "priority up to 3")
        first.get_by_role("button", name="Change").click()
        field(first, "name").fill("nightly runs")
        first.get_by_role("button", name="Save").click()
        shows(first, "nightly runs")
        field(page, "Tenant").select_option("acme")
        page.get_by_role("button", name="Create key").click()
        shows(page, "This is the only time that it is shown.")
        with api.client(page.get_by_role("region", name="The new key").inner_text()) as client:
            assert client.get("/v1/jobs").status_code == 200


def test_the_theme_is_the_systems_until_one_is_chosen(chromium: Any, api: ApiServer) -> None:
    def shown(page: Any) -> Any:
        return page.evaluate("getComputedStyle(document.documentElement).colorScheme")

    with tab(chromium, api.url, color_scheme="dark") as page:
        button = page.get_by_role("button", name="Light")
        button.wait_for()
        assert shown(page) == "dark"
        page.emulate_media(color_scheme="light")
        page.get_by_role("button", name="Dark").wait_for()
        assert shown(page) == "light"
        page.get_by_role("button", name="Dark").click()
        button.wait_for()
        assert shown(page) == "dark"
        page.reload()
        button.wait_for()
        assert shown(page) == "dark"


def test_with_the_systems_colours_the_view_that_is_shown_can_be_told(chromium: Any, api: ApiServer) -> None:
    with tab(chromium, api.url, forced_colors="active") as page:
        page.get_by_role("link", name="Overview").wait_for()
        lines = "[...document.querySelectorAll('nav a')].map((one) => getComputedStyle(one).borderBottomColor)"
        chosen, *others = page.evaluate(lines)
        assert chosen not in others
        assert len(set(others)) == 1


def test_it_works_under_the_path_of_a_proxy(chromium: Any, api_settings: Settings) -> None:
    settings = api_settings.model_copy(update={"root_path": "/celeriac"})
    with ApiServer(settings) as api, tab(chromium, f"{api.url}/celeriac") as page:
        shows(page, "No worker is ready")
        assert page.url == f"{api.url}/celeriac/"
        page.goto(f"{page.url}#/playground")
        field(page, "max_tokens").fill("9")
        page.get_by_label("Message 1", exact=True).fill("Hi")
        page.get_by_role("button", name="Run", exact=True).click()
        page.wait_for_url("**/celeriac/#/playground?a=job_*")
        page.get_by_role("link", name="API").click()
        shows(page, "/v1/jobs")
        assert page.url == f"{api.url}/celeriac/docs"


def test_every_view_is_usable_by_keyboard_and_on_a_phone(chromium: Any, api: ApiServer, http: httpx.Client) -> None:
    post_job(http)
    with tab(chromium, api.url, viewport={"width": 360, "height": 740}) as page:
        for view in VIEWS:
            page.goto(f"{api.url}/{view}")
            page.locator("h1").first.wait_for(state="attached")
            page.wait_for_load_state("networkidle" if view == "#/models" else "load")
            assert page.evaluate("document.documentElement.scrollWidth") <= 360, view
        page.goto(f"{api.url}/#/jobs")
        page.locator("td[data-label='Status']").first.wait_for()
        box = page.locator(".scroll").bounding_box()
        cell = page.locator("td[data-label='Took']").bounding_box()
        assert cell["x"] + cell["width"] <= box["x"] + box["width"], "a row is a list"
        page.goto(f"{api.url}/#/playground")
        page.get_by_role("button", name="Run", exact=True).wait_for()
        page.evaluate("document.activeElement.blur()")
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.textContent") == "Skip to the content"
        field(page, "max_tokens").fill("9")
        page.get_by_label("Message 1", exact=True).fill("Hi")  # the fake model's context is short
        page.keyboard.press("Control+Enter")
        page.wait_for_url("**/#/playground?a=job_*")
        is_seen = "document.querySelector('.answers').getBoundingClientRect().top < innerHeight"
        wait_until(lambda: page.evaluate(is_seen), "the answer is in view")


def test_without_a_database_it_says_so_and_shows_no_zeros(chromium: Any, redis_url: str) -> None:
    settings = Settings(database_url="postgresql://127.0.0.1:1/gone", redis_url=redis_url)
    with ApiServer(settings) as api, tab(chromium, api.url) as page:
        shows(page, "Queues, workers and jobs are not known without the database")
        assert page.locator(".tiles").count() == 0
        page.goto(f"{api.url}/#/models")
        page.get_by_role("heading", name="Served here").wait_for()
        assert not serious(page)


def test_a_server_that_was_away_is_back_without_a_reload(page: Any, http: httpx.Client) -> None:
    shows(page, "No job of yours is running")
    page.route("**/*", lambda route: route.abort())
    shows(page, "no answer")
    shows(page, "The server does not answer.")
    page.unroute("**/*")
    page.get_by_text("The server does not answer.").first.wait_for(state="detached")
    page.route(re.compile("/(v1|health)"), lambda route: route.abort())
    page.reload()
    page.get_by_role("button", name="Try again").wait_for()
    page.unroute(re.compile("/(v1|health)"))
    shows(page, "No job of yours is running")


def test_an_answer_that_is_not_ours_spoils_only_its_view(chromium: Any, api: ApiServer) -> None:
    page = chromium.new_context().new_page()  # not `tab`: the fault is logged
    page.route("**/v1/batches?*", lambda route: route.fulfill(body="<title>Log in</title>", content_type="text/html"))
    page.route("**/v1/usage?*", lambda route: route.fulfill(json={"data": None}))
    page.goto(f"{api.url}/#/batches")
    shows(page, "perhaps a proxy that wants you to log in")
    page.goto(f"{api.url}/#/usage")
    shows(page, "This page cannot be drawn")
    page.get_by_role("link", name="Models", exact=True).click()
    page.get_by_role("heading", name="Models", exact=True).wait_for()
    page.context.close()


REFUSES_STORAGE = """
    for (const name of ["localStorage", "sessionStorage"])
        Object.defineProperty(window, name, { get() { throw new DOMException("denied", "SecurityError"); } });
"""


def test_it_works_where_the_browser_stores_nothing(chromium: Any, api: ApiServer) -> None:
    with tab(chromium, "about:blank") as page:
        page.add_init_script(REFUSES_STORAGE)
        page.goto(f"{api.url}/#/playground")
        page.get_by_label("Message 1", exact=True).fill("Hi")
        page.get_by_role("link", name="Jobs", exact=True).click()
        shows(page, "No jobs yet")
        page.get_by_role("link", name="Playground", exact=True).click()
        assert page.get_by_label("Message 1", exact=True).input_value() == "Hi"
        page.get_by_role("button", name="Dark").click()
        page.get_by_role("button", name="Light").wait_for()


def test_a_long_request_is_asked_for_once_and_shown_when_asked(
    page: Any, api: ApiServer, http: httpx.Client, hand_worker: HandWorker
) -> None:
    job_id = post_job(http, model="large", prompt=f"{'long ' * 6_000}end")["id"]
    page.goto(f"{api.url}/#/jobs/{job_id}")
    prompt = page.get_by_role("region", name="Prompt")
    prompt.wait_for()
    assert len(prompt.inner_text()) < 21_000
    prompt.get_by_role("button", name="Show all 30,003 characters").click()
    assert prompt.inner_text().endswith("end")
    with page.expect_request(f"**/v1/jobs/{job_id}?include=attempts"):
        hand_worker.say(hand_worker.claim(job_id), "Hi")
    shows(page, "Claimed")
    assert prompt.inner_text().endswith("end")


def test_nothing_is_asked_for_while_the_tab_is_hidden(chromium: Any, api: ApiServer, http: httpx.Client) -> None:
    post_job(http)
    with tab(chromium, "about:blank") as page:
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.clock.install()
        for view in VIEWS:
            turn(page, is_hidden=False)
            page.goto(f"{api.url}/{view}")
            page.reload()
            page.locator(".card").first.wait_for()
            page.wait_for_load_state("networkidle")
            turn(page, is_hidden=True)
            asked.clear()
            page.clock.run_for(60_000)
            assert not asked, view
            with page.expect_request("**/health"):
                turn(page, is_hidden=False)


def turn(page: Any, *, is_hidden: bool) -> None:
    """As a browser does when another tab is shown; a headless one has all tabs in view."""
    page.evaluate(
        "isHidden => { Object.defineProperty(document, 'hidden', {configurable: true, value: isHidden});"
        " document.dispatchEvent(new Event('visibilitychange')) }",
        is_hidden,
    )


def serious(page: Any) -> list[Any]:
    """What axe finds on the page as it is, of those kinds that shut somebody out."""
    page.evaluate((files("axe_playwright_python") / "axe.min.js").read_text() + "; null")
    found = page.evaluate("axe.run(document)")
    assert len(found["passes"]) > 10
    return [one for one in found["violations"] if one["impact"] in ("serious", "critical")]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(
    chromium: Any, api: ApiServer, http: httpx.Client, hand_worker: HandWorker, scheme: str
) -> None:
    failed, done = post_job(http)["id"], post_job(http, metadata={"a": "b"})["id"]
    hand_worker.finish(hand_worker.claim(failed), status=JobStatus.FAILED, error=JobError(code="x", message="it broke"))
    finish(hand_worker, done, "a", "b")
    post_job(http)
    with tab(chromium, api.url, color_scheme=scheme, bypass_csp=True) as page:
        for view in (*VIEWS, f"#/jobs/{done}"):
            page.goto(f"{api.url}/{view}")
            page.reload()
            page.locator(".card").first.wait_for()
            for summary in page.locator("summary").all():
                summary.click()
            assert not serious(page), view
