"""Makes docs/files.md, the first lines of all source files' docstrings. `make index` writes it; a test checks it."""

import ast
from pathlib import Path

from settings import ROOT

#: In the order of the layers, from what people start down to what depends on nothing else.
PACKAGES = (
    "celeriac",
    "maintenance",
    "api",
    "gpu_worker",
    "tasks",
    "dialects",
    "text",
    "storage",
    "local",
    "domain",
)
HEAD = """# Every source file

Written by `make index` from the first line of each file. Rooms are in the order of their layers: each may import from
those below it.
"""


def source_files() -> list[Path]:
    """Paths relative to the root. Packages are in order, files are sorted by name and precede those of subfolders."""
    packaged = [
        sorted((ROOT / package).rglob("*.py"), key=lambda path: (path.parent, path.name)) for package in PACKAGES
    ]
    top_level = sorted(ROOT.glob("*.py"))
    return [path.relative_to(ROOT) for paths in (*packaged, top_level) for path in paths]


def file_index() -> str:
    lines = [HEAD]
    heading = None
    for path in source_files():
        if heading != (heading := str(path.parent)):
            lines.append(f"\n## {heading}/\n" if heading != "." else "\n## What all of them import\n")
        name = path.parent.name + "/" if path.name == "__init__.py" else path.name
        said = ast.get_docstring(ast.parse((ROOT / path).read_text())) or ""
        lines.append(f"- `{name}` {said.splitlines()[0] if said else ''}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    (ROOT / "docs" / "files.md").write_text(file_index())
