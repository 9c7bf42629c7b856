"""The OpenAI-compatible routes: each turns its body into the request of a job, and the job's output into its answer."""
