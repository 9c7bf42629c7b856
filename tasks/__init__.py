"""Submission and dispatch: from a request to a committed job and its Celery message; and the webhook HTTP client."""
