"""The blocks of code in README.md, CONTRIBUTING.md and docs/*.md, for the tests that run them."""

import re
from dataclasses import dataclass

from settings import ROOT

DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True, slots=True)
class Snippet:
    """A fenced block of code."""

    page: str
    language: str
    text: str


def snippets(*languages: str) -> list[Snippet]:
    """Those in these languages, or all of them."""
    found = [Snippet(page.name, *fence) for page in DOCUMENTS for fence in FENCE.findall(page.read_text())]
    return [snippet for snippet in found if not languages or snippet.language in languages]


def commands_of(snippet: Snippet) -> list[str]:
    """The command lines of a block for a shell, those that go on in the next lines as one; of a block that shows a
    session, what follows its prompts."""
    lines = snippet.text.replace("\\\n", " ").splitlines()
    if not snippet.language:
        return [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
    commands: list[str] = []
    for line in lines:
        if commands and commands[-1].count("'") % 2:  # in the middle of a quoted body
            commands[-1] += f"\n{line}"
        else:
            commands.append(line)
    return commands
