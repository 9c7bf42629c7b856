"""Whether tests with many cases try all of them: with THOROUGH=1 (`make thorough`), otherwise only a sample."""

import os

IS_THOROUGH = os.environ.get("THOROUGH") == "1"
