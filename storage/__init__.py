"""Everything that survives a restart, and the live channel beside it."""
