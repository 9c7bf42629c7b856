"""The engine: the running batch, and the only room that imports torch and transformers."""
