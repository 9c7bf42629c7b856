"""HTTP in, domain objects out. Never torch, never gpu_worker."""
