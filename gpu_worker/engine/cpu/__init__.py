"""Runs models on a CPU."""
