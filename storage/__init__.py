"""Everything that survives a restart (in PostgreSQL), and live streams over Redis."""
