"""GGUF models run by llama.cpp's batch interface: the model, its cache's slots, one pass over the scheduled rows."""

from gpu_worker.engine.host_cpus import let_threads_sleep

let_threads_sleep()  # its threads wait for each other hundreds of times a step
