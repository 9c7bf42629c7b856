"""The programs of docs/recipes.md, so that tests run them as they stand there."""

import re
from pathlib import Path

RECIPES = Path(__file__).parent.parent / "docs" / "recipes.md"


def program(heading: str, language: str) -> str:
    """The one block of code in this language under this heading."""
    _, _, section = RECIPES.read_text().partition(f"\n## {heading}\n")
    [code] = re.findall(rf"^```{language}\n(.*?)^```$", section.partition("\n## ")[0], re.DOTALL | re.MULTILINE)
    return str(code)
