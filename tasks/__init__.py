"""The queue: from a request to a Celery message, and webhooks over HTTP."""
