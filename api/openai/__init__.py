"""The OpenAI surface: each endpoint turns its body into a job's request, and a job's output into its own objects."""
