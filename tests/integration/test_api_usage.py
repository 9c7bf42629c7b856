"""Usage over HTTP: grouped, priced, as CSV, in OpenAI's buckets, and each tenant's for itself."""

import csv
import io
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import httpx
import openai
import pytest
from click.testing import CliRunner
from sqlalchemy.orm import Session, sessionmaker

from celeriac.cli import main
from domain.access import Scope
from domain.catalog import Catalog, ModelSpec
from settings import Settings
from storage import administration, tenants
from storage.administration import TenantChanges
from tests.conftest import MakeTenant
from tests.integration.api_harness import ApiServer, HandWorker, post_job

PRICES = {"price_per_million_prompt_tokens": 0.15, "price_per_million_output_tokens": "0.60"}
CATALOG = Catalog([ModelSpec(id="fake", path="fake", backend="fake", max_model_len=64, **PRICES)])


@pytest.fixture
def keys(session_factory: sessionmaker[Session], make_tenant: MakeTenant) -> dict[str, str]:
    own, other = make_tenant(name="own").id, make_tenant(name="=other").id
    with session_factory.begin() as session:
        return {
            "own": tenants.create_key(session, own),
            "other": tenants.create_key(session, other),
            "admin": tenants.create_key(session, own, scopes=Scope),
        }


@pytest.fixture
def api(database_url: str, redis_url: str) -> Iterator[ApiServer]:
    settings = Settings(database_url=database_url, redis_url=redis_url, auth="api_key", currency="EUR")
    with ApiServer(settings, CATALOG) as server:
        yield server


def use(api: ApiServer, key: str, worker: HandWorker) -> None:
    """A job of 5 prompt tokens and 2 of output."""
    with api.client(key) as http:
        worker.run(post_job(http)["id"], "a", "b")


def groups(http: httpx.Client, **parameters: str) -> list[dict[str, Any]]:
    answer = http.get("/v1/usage", params=parameters)
    assert answer.status_code == 200, answer.text
    return list(answer.json()["data"])


def test_usage_of_a_deleted_tenant_keeps_its_name_until_another_has_it(
    api: ApiServer,
    keys: dict[str, str],
    hand_worker: HandWorker,
    session_factory: sessionmaker[Session],
    make_tenant: MakeTenant,
) -> None:
    gone = make_tenant(name="gone").id
    with session_factory.begin() as session:
        key = tenants.create_key(session, gone)
    use(api, key, hand_worker)
    with api.client(key) as http:
        for job in http.get("/v1/jobs").json()["data"]:
            http.delete(f"/v1/jobs/{job['id']}")
    with session_factory.begin() as session:
        administration.delete_tenant(session, "gone", actor="test")
    with api.client(keys["admin"]) as http:
        [one] = groups(http, group_by="tenant")
        assert (one["tenant"], one["num_jobs"]) == ("gone", 1)
        assert [one["num_jobs"] for one in groups(http, tenant="gone")] == [1]
        with session_factory.begin() as session:
            administration.create_tenant(session, "gone", TenantChanges(), actor="test")
        assert groups(http, tenant="gone") == []
        [one] = groups(http, group_by="tenant")
        assert one["tenant"] == str(gone)


def test_usage_is_grouped_priced_and_a_tenants_own(
    api: ApiServer, keys: dict[str, str], hand_worker: HandWorker
) -> None:
    use(api, keys["own"], hand_worker)
    use(api, keys["other"], hand_worker)
    use(api, keys["other"], hand_worker)
    with api.client(keys["own"]) as http:
        [own] = groups(http, group_by="tenant,key,model,day")
        assert own["tenant"] == "own"
        assert own["key"] == keys["own"].split("_")[1]
        assert (own["model"], own["day"]) == ("fake", f"{datetime.now(UTC):%Y-%m-%d}")
        assert own["cost"] == format((5 * 15 + own["output_tokens"] * 60) / 100_000_000, ".8f").rstrip("0")
        assert groups(http, tenant="=other") == []
    with api.client(keys["admin"]) as http:
        assert [(one["tenant"], one["num_jobs"]) for one in groups(http, group_by="tenant")] == [
            ("=other", 2),
            ("own", 1),
        ]
        whole = http.get("/v1/usage").json()
        assert (whole["currency"], whole["total"]["prompt_tokens"]) == ("EUR", 15)
        assert whole["data"] == [whole["total"]]
        text = http.get("/v1/usage?group_by=tenant", headers={"accept": "text/csv"})
        assert text.headers["content-type"].startswith("text/csv")
        rows = list(csv.DictReader(io.StringIO(text.text)))
        assert [(row["tenant"], row["num_jobs"], row["currency"]) for row in rows] == [
            ("'=other", "2", "EUR"),
            ("own", "1", "EUR"),
        ]
    shown = CliRunner().invoke(main, ["usage", "--by", "tenant", "--url", api.url, "--key", keys["admin"]])
    assert shown.exit_code == 0, shown.output
    assert "=other" in shown.output
    assert "Cost in EUR" in shown.output


def test_openais_client_reads_its_buckets(api: ApiServer, keys: dict[str, str], hand_worker: HandWorker) -> None:
    use(api, keys["own"], hand_worker)
    now = int(datetime.now(UTC).timestamp())
    with openai.OpenAI(base_url=f"{api.url}/v1", api_key=keys["own"], admin_api_key=keys["own"]) as client:
        usage = client.admin.organization.usage
        page = usage.completions(start_time=now - 3 * 86_400, group_by=["model", "api_key_id", "batch"], limit=31)
        full = [bucket for bucket in page.data if bucket.results]
        assert [bucket.object for bucket in page.data] == ["bucket"] * 4
        assert (len(full), page.has_more) == (1, False)
        [result] = full[0].results
        assert result.object == "organization.usage.completions.result"
        assert (result.input_tokens, result.num_model_requests, result.model, result.batch) == (5, 1, "fake", False)
        assert (result.input_uncached_tokens, result.input_cached_tokens, result.output_text_tokens) == (5, 0, 2)
        missing = type(result).model_fields.keys() - result.model_fields_set
        assert missing == {"input_cache_write_12h_tokens", "input_cache_write_30m_tokens"}, "which only OpenAI bills"
        first = usage.completions(start_time=now - 3 * 86_400, limit=2)
        assert first.has_more
        assert first.next_page is not None
        second = usage.completions(start_time=now - 3 * 86_400, limit=2, page=first.next_page)
        assert [bucket.start_time for bucket in first.data + second.data] == [b.start_time for b in page.data]
        assert not second.has_more
        embeddings = usage.embeddings(start_time=now - 3_600, bucket_width="1h")
        assert all(bucket.results == [] for bucket in embeddings.data)


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("group_by=colour", "group_by"),
        ("start=1760000000", "start"),
        ("start=2026-10-02&end=2026-10-01", "start"),
        ("start=2020-10-02", "start"),
        ("start=0001-01-01T00:00:00%2B14:00", "start"),
        ("end=9999-12-31T23:59:59-14:00", "end"),
        ("end=0001-01-05", "end"),
        ("model=%00", "model"),
        ("format=xml", "format"),
    ],
)
def test_a_bad_query_names_its_field(api: ApiServer, keys: dict[str, str], query: str, param: str) -> None:
    with api.client(keys["own"]) as http:
        answer = http.get(f"/v1/usage?{query}")
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text


@pytest.mark.parametrize(
    "query",
    [
        "",
        "start_time=-1",
        "start_time=99999999999",
        *(f"start_time=0&{more}" for more in ("bucket_width=1y", "limit=32", "page=x", "page=page_%C2%B2")),
        "start_time=0&group_by[]=colour",
        "start_time=1700000000&end_time=1600000000",
        "start_time=1700000000&end_time=1700000000",
    ],
)
def test_a_bad_query_for_buckets_is_refused(api: ApiServer, keys: dict[str, str], query: str) -> None:
    with api.client(keys["own"]) as http:
        answer = http.get(f"/v1/organization/usage/completions?{query}")
        assert answer.status_code == 400, answer.text


@pytest.mark.parametrize("width", ["1m", "1h", "1d"])
def test_what_has_not_begun_has_no_buckets(api: ApiServer, keys: dict[str, str], width: str) -> None:
    soon = int(datetime.now(UTC).timestamp()) + 20
    with api.client(keys["own"]) as http:
        for kind in ("completions", "embeddings"):
            page = http.get(f"/v1/organization/usage/{kind}?start_time={soon}&bucket_width={width}").json()
            assert (page["data"], page["has_more"], page["next_page"]) == ([], False, None)
