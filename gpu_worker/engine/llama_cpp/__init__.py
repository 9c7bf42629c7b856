"""GGUF models run by llama.cpp's batch interface: the model, its cache's slots, one pass over the scheduled rows."""
