"""The queue: what can be asked for, and how it is asked."""
