"""GGUF models run by llama.cpp's batch interface: the model, its cache's slots, one pass over the scheduled rows."""

import os

# llama.cpp's threads wait for each other hundreds of times a step. GNU's OpenMP reads, when it is loaded, how long they
# spin before they sleep. By default they hardly ever sleep: where another process has one of the cores, each wait lasts
# until the scheduler takes it away again, and a text takes more than ten times as long (docs/adr/0040).
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
