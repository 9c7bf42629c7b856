"""The data model: jobs, requests, results and their rules. Imports only pydantic and the standard library."""
