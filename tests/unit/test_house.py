"""The repository keeps its own rules: what the documents say of it is so, and imports go one way."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

from domain.catalog import ModelEntry
from settings import PREFIX, ROOT, Settings
from tests.file_index import PACKAGES, file_index, source_files

README = (ROOT / "README.md").read_text()


def tracked_files() -> list[Path]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [Path(line) for line in listed.splitlines() if (ROOT / line).exists()]


def readme_block(heading: str) -> str:
    """The first code block under a heading of the README."""
    section = README.split(f"\n## {heading}\n")[1]
    return section.split("```")[1].partition("\n")[2]


def tree_of_readme() -> dict[str, str]:
    """Path -> comment, of the annotated tree; folders end with a slash."""
    comment_by_path: dict[str, str] = {}
    folders: list[str] = []
    for line in readme_block("The tree").splitlines():
        name, _, comment = line.strip().partition(" ")
        depth = (len(line) - len(line.lstrip())) // 2
        folders = folders[:depth]
        comment_by_path["".join(folders) + name] = comment.strip()
        if name.endswith("/"):
            folders.append(name)
    return comment_by_path


def test_the_readme_tree_has_every_folder_and_top_level_file_with_a_comment() -> None:
    told = tree_of_readme()
    files = [path for path in tracked_files() if not path.parts[0].startswith(".")]
    expected = {str(path) if len(path.parts) == 1 else f"{path.parts[0]}/" for path in files}
    assert set(told) == expected, "mend the tree of README.md"
    assert all(told.values()), f"without a comment: {[path for path, comment in told.items() if not comment]}"


def test_the_index_of_files_is_what_the_files_say_of_themselves() -> None:
    assert (ROOT / "docs" / "files.md").read_text() == file_index(), "write it again: make index"


def test_every_module_says_in_one_line_what_it_is_for() -> None:
    for path in source_files():
        said = ast.get_docstring(ast.parse((ROOT / path).read_text()))
        assert said, f"{path} has no docstring"
        assert said.splitlines()[0].endswith("."), f"{path} says it in more than one line"


def test_every_make_target_and_celeriac_command_of_the_documents_exists() -> None:
    from celeriac import cli

    text = "\n".join(
        path.read_text() for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md"))
    )
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    commands = set(cli.main.commands)
    assert set(re.findall(r"\bmake ([a-z]+)\b(?=`|\n| +#)", text)) <= targets
    assert set(re.findall(r"(?:`|^ *|/)celeriac ([a-z]+)\b", text, re.MULTILINE)) <= commands


def test_every_link_of_the_documents_leads_somewhere() -> None:
    for document in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/**/*.md")):
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name} links to {target}, which is not there"


def test_the_settings_table_says_what_the_settings_are() -> None:
    operations = (ROOT / "docs" / "operations.md").read_text()
    rows = dict(re.findall(rf"^\| `{PREFIX}(\w+)` \| (.+?) \|", operations, re.MULTILINE))
    assert set(rows) == {name.upper() for name in Settings.model_fields}
    for name, field in Settings.model_fields.items():
        default = field.default
        if isinstance(default, Path):
            default = default.relative_to(ROOT)
        assert rows[name.upper()] == ("–" if default is None else f"`{default}`"), name


def test_the_document_of_models_has_every_key_with_its_default() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| (.+?) \|", (ROOT / "docs" / "models.md").read_text(), re.MULTILINE))
    assert list(rows) == list(ModelEntry.model_fields)
    for name, field in ModelEntry.model_fields.items():
        if isinstance(field.default, bool):
            assert rows[name] == f"`{str(field.default).lower()}`", name
        elif isinstance(field.default, (int, str)):
            assert rows[name] == f"`{field.default}`", name


#: Names of machines, folders and package hosts have no place in a project that anybody may clone.
FORBIDDEN = re.compile(
    "|".join(["/wo" + "rk/", "/tmp/br" + "ief", r"pypi\." + "org", r"download\.pyt" + "orch", "/opt/py" + "pi"])
)


def test_no_file_names_a_machine_or_a_package_host() -> None:
    for path in tracked_files():
        if path.suffix in (".safetensors", ".png", ".gz") or (ROOT / path).stat().st_size > 5_000_000:
            continue
        found = FORBIDDEN.search((ROOT / path).read_text(errors="replace"))
        assert found is None, f"{path} names {found[0] if found else ''}"


@pytest.mark.parametrize("name", ["settings", "observability"])
def test_what_all_may_import_imports_only_domain(name: str) -> None:
    imported = _imports_of(ROOT / f"{name}.py")
    assert not imported & ({*PACKAGES} - {"domain"}), "it would close a circle"


def _imports_of(path: Path) -> set[str]:
    """The top-level names that a file imports."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return {name.split(".")[0] for name in plain | {n.module or "" for n in nodes if isinstance(n, ast.ImportFrom)}}
