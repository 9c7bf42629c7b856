"""The dialects of clients, as pure translation: JSON bodies to requests, and jobs' results to JSON answers."""
