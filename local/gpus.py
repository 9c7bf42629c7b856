"""The GPUs of this machine, as NVIDIA's driver reports them. Free of torch."""

import os
import subprocess
from dataclasses import dataclass

ASK_SECONDS = 30.0  # a driver that nobody uses first initialises its devices


@dataclass(frozen=True, slots=True)
class Gpu:
    id: str  # as CUDA_VISIBLE_DEVICES takes it
    total_bytes: int


def visible_gpus() -> list[Gpu]:
    """The GPUs that this process may use, in the driver's order, or in that of CUDA_VISIBLE_DEVICES; empty if there
    are none."""
    command = ["nvidia-smi", "--query-gpu=index,uuid,memory.total", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=ASK_SECONDS, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return _chosen(answer, os.environ.get("CUDA_VISIBLE_DEVICES"))


def _chosen(answer: str, visible: str | None) -> list[Gpu]:
    """The GPUs in nvidia-smi's answer that `visible` names by index or by (the beginning of) their UUID. As in CUDA,
    the first name that fits none hides all that follow."""
    rows = [[field.strip() for field in line.split(",")] for line in answer.splitlines() if line.count(",") == 2]
    gpus = [(uuid, Gpu(index, int(mebibytes) * 2**20)) for index, uuid, mebibytes in rows if mebibytes.isdigit()]
    if visible is None:
        return [gpu for _, gpu in gpus]
    chosen = []
    for name in map(str.strip, visible.split(",")):
        found = [gpu for uuid, gpu in gpus if name == gpu.id or (name.startswith("GPU-") and uuid.startswith(name))]
        if not found:
            break
        chosen.append(found[0])
    return chosen
