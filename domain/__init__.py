"""Words and rules: what a job, a request and a chunk are. Imports pydantic and the standard library, nothing else."""
