"""Entry point of an engine's template process in any environment: imports the rest, or reports why it cannot.

Until then it imports only the standard library, and it encodes its one message by hand, so that even an interpreter
that lacks a package can report which one.
"""

import argparse
import os
import socket
import struct
import sys

from gpu_worker.engine.host_cpus import let_threads_sleep
from local.engine_environments import missing_interpreter

MAX_REASON_BYTES = 500

_CANNOT_LOAD = b"\x82\xa4type\xabcannot_load\xa6reason\xda"  # frames.CannotLoad up to the reason's length


def main() -> None:
    let_threads_sleep()
    parser = argparse.ArgumentParser(prog="gpu_worker.engine.child")
    parser.add_argument("--spec", required=True, help="a ModelSpec as JSON")
    parser.add_argument("--python", required=True, help="the interpreter that should run the engine")
    parser.add_argument("--control-fd", type=int, required=True)
    parser.add_argument("--heartbeat-seconds", type=float, required=True)
    parser.add_argument("--log-level", required=True)
    parser.add_argument("--log-format", required=True)
    arguments = parser.parse_args()
    control = socket.socket(fileno=arguments.control_fd)
    if not os.access(arguments.python, os.X_OK):
        tell_why(control, missing_interpreter(arguments.python))
    try:
        from gpu_worker.engine.process import run_template
    except ImportError as exc:
        tell_why(control, missing_package(exc))
    run_template(
        arguments.spec,
        control,
        heartbeat_seconds=arguments.heartbeat_seconds,
        log_level=arguments.log_level,
        log_format=arguments.log_format,
    )


def missing_package(exc: ImportError) -> str:
    what = f"has no {exc.name}" if isinstance(exc, ModuleNotFoundError) and exc.name else f"cannot import: {exc}"
    return f"the engine's interpreter {sys.executable} {what}; see docs/engines.md for what it needs"


def tell_why(control: socket.socket, reason: str) -> None:
    """Report the reason on the connection of the first engine to be started, and exit."""
    _, descriptors, _, _ = socket.recv_fds(control, 1, 2)
    if descriptors:
        text = " ".join(reason.split()).encode()[:MAX_REASON_BYTES]
        frame = _CANNOT_LOAD + struct.pack(">H", len(text)) + text
        with socket.socket(fileno=descriptors[0]) as worker:
            worker.sendall(struct.pack(">I", len(frame)) + frame)
    sys.exit(1)


if __name__ == "__main__":
    main()
