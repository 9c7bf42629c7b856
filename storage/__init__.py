"""Everything that survives a restart (PostgreSQL), and live streams over Redis."""
