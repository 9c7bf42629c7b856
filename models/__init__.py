"""The embedded default model and how it was made."""
