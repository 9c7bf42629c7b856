"""The local model store: pulls models from where they are published, checks them against hashes, removes them."""
