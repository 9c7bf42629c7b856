"""The data model: jobs, requests, chunks and their rules. Imports only pydantic and the standard library."""
