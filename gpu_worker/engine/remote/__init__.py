"""The parts of the back end that has a remote server run the model: its requests, its answers, the connection."""
