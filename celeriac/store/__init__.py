"""Models on this machine: pulled from where they are published, kept with a manifest of hashes, checked, removed."""
