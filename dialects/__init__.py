"""The API dialects, as pure translation: JSON bodies to requests, and jobs to JSON answers. No HTTP, no I/O."""
