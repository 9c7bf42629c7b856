"""What runs on this machine: child processes and embedded servers that end with their owner, engines' environments."""
