"""A pytest plugin, `-p tests.without_torch`, that forbids torch and transformers, which tests/unit does not need."""

import sys

for name in ("torch", "transformers"):
    sys.modules[name] = None  # type: ignore[assignment]
