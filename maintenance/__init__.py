"""Upkeep: one process whose clocks rescue, expire, dispatch and prune jobs, run batches and send webhooks."""
