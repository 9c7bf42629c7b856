"""Running a model on a CUDA device."""
