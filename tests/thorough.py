"""Whether tests that try many cases try all of them: with THOROUGH=1 (`make thorough`), else a sample."""

import os

IS_THOROUGH = os.environ.get("THOROUGH") == "1"
