"""The HTTP API. It imports neither torch nor gpu_worker."""
