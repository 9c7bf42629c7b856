"""The repository keeps its own rules: what the documents say of it is so, and imports go one way."""

import ast
import re
import subprocess
import tomllib
from collections import Counter
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
    headings = re.findall(r"^## (.+)$", file_index(), re.MULTILINE)
    assert len(headings) == len(set(headings)), "the files of a folder are in one place"


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
    assert set(re.findall(r"(?:`|^ *|/)celeriac ([a-z][a-z-]*)\b", text, re.MULTILINE)) <= commands


def test_every_link_of_the_documents_leads_somewhere() -> None:
    for document in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/**/*.md")):
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name} links to {target}, which is not there"


def documents() -> list[Path]:
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md"))]


#: `storage/jobs.py`, `tests/chaos`, `jobs.py`, `jobs.py:12` in backticks.
PATH = re.compile(r"`([\w.-]+/[\w./-]*|[\w-]+\.py)(?::\d+)?`")
#: `tasks.app`, `storage.jobs.claim`, `Submitter.submit` in backticks, with or without parentheses.
DOTTED = re.compile(r"`(\w+(?:\.\w+)+)(?:\(\))?`")
#: `StreamReader` in backticks.
CLASS = re.compile(r"`((?:[A-Z][a-z0-9]+){2,})`")
#: A browser's class, fields of requests and of /health, a logger.
NOT_OURS = {"EventSource", "text.format", "maintenance.seconds_since_last_tick", "celeriac.jobs"}


def test_every_path_in_the_documents_exists() -> None:
    files = tracked_files()
    folders = {path.parts[0] for path in files if len(path.parts) > 1}
    names = {path.name for path in files}
    for document in [*documents(), *ROOT.glob("docs/adr/*.md")]:
        for told in PATH.findall(document.read_text()):
            if "/" not in told:
                assert told in names, f"{document.name} names `{told}`, and no file is called that"
            elif told.split("/")[0] in folders:
                assert (ROOT / told).exists(), f"{document.name} names `{told}`, which is not there"


def test_every_module_class_and_function_in_the_documents_exists() -> None:
    names_by_class = _names_by_class()
    alerts = set(re.findall(r"alert: (\w+)", (ROOT / "deploy" / "alerts.yml").read_text()))
    for document in documents():
        unknown = set(CLASS.findall(document.read_text())) - names_by_class.keys() - NOT_OURS - alerts
        assert not unknown, f"{document.name} names {', '.join(sorted(unknown))}, and no class is called that"
        for told in DOTTED.findall(document.read_text()):
            first, *rest = told.split(".")
            if rest[-1] == "py":
                continue
            if first in names_by_class:
                assert rest[0] in names_by_class[first], f"{document.name} names `{told}`: {first} has no {rest[0]}"
            elif first in PACKAGES and told not in NOT_OURS:
                assert _is_in_a_module(told), f"{document.name} names `{told}`, which is not there"


def test_the_walk_names_what_its_files_define() -> None:
    for path, cell in walk_of_architecture():
        told = re.findall(r"`([\w.]+)`", cell)
        assert told, f"the walk says nothing of what to look at in {path}"
        defined = _names_of(ROOT / path)
        assert set(told) <= defined, f"{path} does not define {', '.join(set(told) - defined)}; mend the walk"


def test_the_walk_is_as_short_as_it_says() -> None:
    """In lines to read: the docstring of each file, and what it is to be read for."""
    told = int(re.findall(r"(\d+) lines in all", (ROOT / "docs" / "architecture.md").read_text())[0])
    counted = 0
    for path, cell in walk_of_architecture():
        module = ast.parse((ROOT / path).read_text())
        nodes = _nodes_by_name(module)
        read = [module.body[0], *(nodes[name] for name in re.findall(r"`([\w.]+)`", cell))]
        counted += sum((node.end_lineno or node.lineno) - node.lineno + 1 for node in read)
    assert abs(counted - told) <= told / 8, f"it has {counted} lines; say so in docs/architecture.md, or shorten it"


def test_the_rooms_are_drawn_as_the_import_contract_has_them() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = [layer.split(" | ") for layer in contracts[0]["layers"]]
    drawing = (ROOT / "docs" / "architecture.md").read_text().split("\n## Rooms\n")[1].split("```")[1].strip("\n")
    drawn = [re.match(r" +(\w+)(?: +\| +(\w+))?", line) for line in drawing.splitlines()]
    assert [[room for room in line.groups() if room] for line in drawn if line] == layers
    assert list(PACKAGES) == [room for layer in layers for room in layer]


def test_the_readme_lists_the_files_of_the_walk_and_they_are_few() -> None:
    paths = [path for path, _ in walk_of_architecture()]
    assert 0 < len(paths) <= 16, "a job's main path is to be read in half an hour"
    section = README.split("\n## Reading the code\n")[1].split("\n## ")[0]
    assert re.findall(r"\[(\S+\.py)\]", section) == paths


def test_the_readme_is_a_first_look() -> None:
    assert len(README.splitlines()) <= 200, "move what only some users need to docs/, and link it"


def walk_of_architecture() -> list[tuple[str, str]]:
    """Path and "look at" of each numbered row of the walk, in its order."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    return re.findall(r"^\| \d+ \| \[(\S+)\]\(\S+\) \| (.+?) \|", text, re.MULTILINE)


def _names_by_class() -> dict[str, set[str]]:
    """What is defined in the body of each class of ours, or set on `self`."""
    found: dict[str, set[str]] = {}
    for path in source_files():
        for node in ast.walk(ast.parse((ROOT / path).read_text())):
            if isinstance(node, ast.ClassDef):
                own = set(_defined_in(node.body))
                own |= {n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)}
                found.setdefault(node.name, set()).update(own)
    return found


def _names_of(path: Path) -> set[str]:
    return set(_nodes_by_name(ast.parse(path.read_text())))


def _nodes_by_name(module: ast.Module) -> dict[str, ast.stmt]:
    """The top-level names of a module, and `Class.name` for what its classes define."""
    found = _defined_in(module.body)
    for node in [node for node in found.values() if isinstance(node, ast.ClassDef)]:
        found |= {f"{node.name}.{name}": inner for name, inner in _defined_in(node.body).items()}
    return found


def _defined_in(body: list[ast.stmt]) -> dict[str, ast.stmt]:
    nodes: dict[str, ast.stmt] = {}
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            nodes[node.name] = node
        elif isinstance(node, ast.Assign):
            nodes |= {target.id: node for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            nodes[node.target.id] = node
    return nodes


def _is_in_a_module(dotted: str) -> bool:
    """Whether it is a module or a package of ours, or a name that one defines."""
    parts = dotted.split(".")
    for length in range(len(parts), 0, -1):
        base = ROOT.joinpath(*parts[:length])
        module = next((path for path in (base.with_suffix(".py"), base / "__init__.py") if path.exists()), None)
        if module is not None:
            rest = ".".join(parts[length:])
            return not rest or rest in _names_of(module)
    return False


def test_the_settings_table_says_what_the_settings_are() -> None:
    operations = (ROOT / "docs" / "operations.md").read_text()
    rows = dict(re.findall(rf"^\| `{PREFIX}(\w+)` \| (.+?) \|", operations, re.MULTILINE))
    assert set(rows) == {name.upper() for name in Settings.model_fields}
    for name, field in Settings.model_fields.items():
        default = field.default
        if isinstance(default, Path):
            default = default.relative_to(ROOT)
        assert rows[name.upper()] == ("–" if default in (None, "") else f"`{default}`"), name


def test_every_setting_that_the_documents_name_exists() -> None:
    for document in documents():
        told = set(re.findall(rf"`{PREFIX}(\w+)", document.read_text()))
        unknown = told - {name.upper() for name in Settings.model_fields}
        assert not unknown, f"{document.name} names {PREFIX}{unknown}, which is no setting"


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


@pytest.mark.parametrize("name", ["settings", "metrics", "observability"])
def test_what_all_may_import_imports_only_domain(name: str) -> None:
    imported = _imports_of(ROOT / f"{name}.py")
    assert not imported & ({*PACKAGES} - {"domain"}), "it would close a circle"


def _imports_of(path: Path) -> set[str]:
    """The top-level names that a file imports."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return {name.split(".")[0] for name in plain | {n.module or "" for n in nodes if isinstance(n, ast.ImportFrom)}}


def test_no_two_classes_have_one_name() -> None:
    """Whoever reads a name knows what it is, wherever it stands."""
    files_by_class: dict[str, list[str]] = {}
    for path in source_files():
        for node in ast.parse((ROOT / path).read_text()).body:
            if isinstance(node, ast.ClassDef):
                files_by_class.setdefault(node.name, []).append(str(path))
    assert {name: files for name, files in files_by_class.items() if len(files) > 1} == {}


def test_no_two_test_files_have_one_name() -> None:
    """pytest imports them by their names alone."""
    names = Counter(path.name for path in (ROOT / "tests").rglob("test_*.py") if "node_modules" not in path.parts)
    assert [name for name, count in names.items() if count > 1] == []
