"""A hook of MkDocs: the pages that are not files of docs/, and links that lead out of it.

README.md becomes the first page. `reference.md` is made from the OpenAPI document, which `make docs` leaves at
OPENAPI_PATH; `decisions.md` lists docs/adr. Links to source files, which are not on the site, become plain text.
"""

import json
import os
import re
from collections.abc import Container
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
PAGE_BY_FILE = {"README.md": "index.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
LINK = re.compile(r"(?<!!)\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\(([^()\s]+)\)")
IMAGE = re.compile(r"!\[([^\]]*)\]\(docs/([^()\s]+)\)")
DECISIONS = "decisions.md"
METHODS = ("get", "post", "put", "patch", "delete")


def on_files(files: "Files", config: "MkDocsConfig") -> "Files":
    """Add what is not in docs/."""
    from mkdocs.structure.files import File  # tests of the rest of this file need no MkDocs

    document = json.loads(Path(os.environ["OPENAPI_PATH"]).read_text())
    added = {page: (ROOT / file).read_text() for file, page in PAGE_BY_FILE.items()}
    added |= {"reference.md": reference(document), DECISIONS: decisions()}
    for name, text in added.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_nav(nav: Any, config: "MkDocsConfig", files: "Files") -> Any:
    """Pages of decisions are found through their list."""
    for file in files.documentation_pages():
        if file.src_uri.startswith("adr/"):
            file.inclusion = type(file.inclusion).NOT_IN_NAV
    return nav


def on_page_markdown(markdown: str, page: "Page", config: "MkDocsConfig", files: "Files") -> str:
    """Point links at pages, or at nothing."""
    return with_links_of_the_site(markdown, page.file.src_uri, {file.src_uri for file in files})


def with_links_of_the_site(markdown: str, source: str, names: Container[str]) -> str:
    """`source` is the page's name, `names` are those of all files of the site."""
    is_of_root = source in PAGE_BY_FILE.values() or source == DECISIONS
    folder = ROOT if is_of_root else (ROOT / "docs" / source).parent
    if is_of_root:
        markdown = IMAGE.sub(r"![\1](\2)", markdown)

    def link(found: re.Match[str]) -> str:
        text, target = found.groups()
        path, hash_sign, anchor = target.partition("#")
        if ":" in target or not path:
            return found.group()
        name = _name_of((folder / path).resolve().relative_to(ROOT))
        return f"[{text}]({'../' * source.count('/')}{name}{hash_sign}{anchor})" if name in names else text

    return LINK.sub(link, markdown)


def _name_of(path: Path) -> str:
    """The site's name for a path of this repository."""
    if path == Path("docs/adr"):
        return DECISIONS
    return str(path.relative_to("docs")) if path.is_relative_to("docs") else PAGE_BY_FILE.get(str(path), "")


def decisions() -> str:
    """The list of docs/adr."""
    titles = {
        path.name: path.read_text().splitlines()[0].lstrip("# ") for path in sorted((ROOT / "docs/adr").glob("*.md"))
    }
    return "# Decisions\n\n" + "".join(f"- [{title}](docs/adr/{name})\n" for name, title in titles.items())


def reference(document: dict[str, Any]) -> str:
    """Every route with its parameters, body and answers."""
    schemas = document["components"]["schemas"]
    operations_by_tag: dict[str, list[str]] = {}
    for path, operations in document["paths"].items():
        for method in METHODS:
            if operation := operations.get(method):
                tag = operation.get("tags", ["Other"])[0]
                operations_by_tag.setdefault(tag, []).append(_operation(method, path, operation, schemas))
    parts = [f"## {tag}\n\n" + "\n".join(texts) for tag, texts in operations_by_tag.items()]
    head = "# Every route\n\nFrom this release's OpenAPI document, which a running API serves at `/openapi.json`.\n\n"
    return head + "\n".join(parts)


def _operation(method: str, path: str, operation: dict[str, Any], schemas: dict[str, Any]) -> str:
    lines = [f"### `{method.upper()} {path}`\n", operation.get("description", operation.get("summary", "")), ""]
    rows = [
        (p["name"], p["in"], _type(p.get("schema", {})), p.get("description") or p.get("schema", {}).get("description"))
        for p in operation.get("parameters", ())
    ]
    for content in operation.get("requestBody", {}).get("content", {}).values():
        rows += [
            (name, "body", _type(field), field.get("description"))
            for name, field in _fields(content["schema"], schemas)
        ]
    if rows:
        lines += ["| field | in | type | |", "|---|---|---|---|"]
        lines += [f"| `{name}` | {place} | {_cell(type_)} | {_cell(text or '')} |" for name, place, type_, text in rows]
        lines.append("")
    for status, answer in operation["responses"].items():
        if status.startswith("2"):
            for media_type, content in answer.get("content", {}).items():
                lines.append(f"Answers {status} with `{media_type}`{_named(content.get('schema', {}))}.\n")
    return "\n".join(lines) + "\n"


def _fields(schema: dict[str, Any], schemas: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return list(_resolved(schema, schemas).get("properties", {}).items())


def _resolved(schema: dict[str, Any], schemas: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = schemas[schema["$ref"].rsplit("/", 1)[1]] if "$ref" in schema else schema
    return found


def _type(schema: dict[str, Any]) -> str:
    if "$ref" in schema:
        return str(schema["$ref"].rsplit("/", 1)[1])
    if "enum" in schema or "const" in schema:
        return " or ".join(f"`{json.dumps(value)}`" for value in schema.get("enum", [schema.get("const")]))
    if parts := schema.get("anyOf") or schema.get("oneOf"):
        return " or ".join(dict.fromkeys(_type(part) for part in parts))
    if schema.get("type") == "array":
        return f"array of {_type(schema.get('items', {}))}"
    bounds = [f"{sign} {schema[key]}" for key, sign in (("minimum", "≥"), ("maximum", "≤")) if key in schema]
    return ", ".join([str(schema.get("type", "any")), *bounds])


def _named(schema: dict[str, Any]) -> str:
    return f": `{_type(schema)}`" if "$ref" in schema else ""


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")
