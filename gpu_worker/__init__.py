"""The GPU worker: a Celery worker whose pool is a continuously batching engine."""
