"""vLLM as the runner of our sequences. Sets vLLM's environment variables, which it reads when it is imported.

One process, since each model has an engine process of its own already; our log format; nothing is reported to anybody.
The second version of vLLM's model runner has another interface for logits processors.
"""

import logging
import os

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_USE_V2_MODEL_RUNNER": "0",
    "VLLM_CONFIGURE_LOGGING": "0",
    "VLLM_NO_USAGE_STATS": "1",
}

#: After a failure, it would log the parameters of all requests in the step.
logging.getLogger("vllm.logging_utils.dump_input").disabled = True
