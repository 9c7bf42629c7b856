"""The documentation's site has every page and every route, and no link that leads nowhere."""

import re

from api.app import create_app
from api.openapi import document_of
from deploy.site.pages import PAGE_BY_FILE, decisions, reference, with_links_of_the_site
from domain.catalog import Catalog, ModelSpec
from settings import ROOT, Settings

MADE = {*PAGE_BY_FILE.values(), "reference.md", "decisions.md"}
PAGES = {path.name for path in (ROOT / "docs").glob("*.md")} | MADE


def test_the_site_names_every_page_once() -> None:
    nav = (ROOT / "deploy" / "site" / "mkdocs.yml").read_text().split("\nnav:\n")[1]
    named = re.findall(r"- [^:]+: (\S+\.md)$", nav, re.MULTILINE)
    assert sorted(named) == sorted(PAGES)


def test_the_reference_has_every_route_and_every_field_of_its_body() -> None:
    catalog = Catalog([ModelSpec(id="example", path="none", backend="fake", max_model_len=4096)])
    document = document_of(create_app(Settings(), catalog))
    text = reference(document)
    for path, operations in document["paths"].items():
        for method in operations:
            assert f"\n### `{method.upper()} {path}`\n" in text
    chat = text.split("### `POST /v1/chat/completions`\n")[1].split("\n### ")[0]
    assert "| `temperature` | body | number, ≥ 0, ≤ 2 or null |" in chat
    assert "Answers 200 with `text/event-stream`" in chat


def test_links_lead_to_pages_of_the_site_or_become_text() -> None:
    text = (
        "[a](docs/api.md#jobs) [b](CHANGELOG.md) [`c`](api/jobs.py) [d](https://example.com) [e](docs/adr) [f](#here)"
    )
    assert with_links_of_the_site(text, "index.md", PAGES) == (
        "[a](api.md#jobs) [b](changelog.md) `c` [d](https://example.com) [e](decisions.md) [f](#here)"
    )
    text = "[a](../api.md) [b](../../README.md) [c](../../storage/jobs.py) [d](0001-x.md)"
    found = with_links_of_the_site(text, "adr/0002-y.md", PAGES | {"adr/0001-x.md"})
    assert found == "[a](../api.md) [b](../index.md) c [d](../adr/0001-x.md)"
    assert "](docs/adr/0001-" in decisions()
