"""The worker's side of the engine process: forks it, exchanges frames with it, watches it and ends it."""
