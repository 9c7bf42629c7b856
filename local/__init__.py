"""Everything on one machine: processes, and PostgreSQL and Redis among them, that end when their owner does."""
