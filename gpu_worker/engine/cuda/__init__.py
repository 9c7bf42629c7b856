"""Runs models on a CUDA device."""
