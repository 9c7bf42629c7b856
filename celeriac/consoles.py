"""Consoles on which a text of others, such as an error message that quotes a model, can do no more than be read."""

import sys
from typing import Any

from rich.console import Console
from rich.text import Text

#: What a terminal would obey instead of showing it, such as the beginning of a colour, as a character to be seen.
VISIBLE = {code: "\N{REPLACEMENT CHARACTER}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\t\n"}


class VisibleConsole(Console):
    """On a terminal it shows what that would obey. A pipe gets every text as it is."""

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(text.translate(VISIBLE) if self.is_terminal else text, **options)


def visible(text: str) -> str:
    """The text as it may be written to stdout."""
    return text.translate(VISIBLE) if sys.stdout.isatty() else text
