"""A pytest plugin, `-p tests.without_torch`: whoever imports torch or transformers fails. tests/unit needs neither."""

import sys

for name in ("torch", "transformers"):
    sys.modules[name] = None  # type: ignore[assignment]
