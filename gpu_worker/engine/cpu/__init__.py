"""Running a model on a CPU."""
