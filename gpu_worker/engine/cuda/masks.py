"""Masks over logits on a device: the bits travel packed."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gpu_worker.engine.bans import BITS
from gpu_worker.engine.sampling import TokenMasks


def apply_masks(masks: TokenMasks, logits: Tensor) -> None:
    """Ban all tokens that a row's mask does not allow, in place."""
    num_tokens = min(logits.shape[1], masks.words.shape[1] * BITS)
    banned = bits_on_device(masks.words, logits.device)[:, :num_tokens] == 0
    for number, row in enumerate(masks.rows):
        logits[row, :num_tokens].masked_fill_(banned[number], -torch.inf)
        logits[row, num_tokens:] = -torch.inf


def bits_on_device(words: NDArray[np.int32], device: torch.device) -> Tensor:
    """Ones and zeros, (num_rows, num_tokens), unpacked where they are used."""
    shifts = torch.arange(BITS, dtype=torch.int32, device=device)
    return ((torch.from_numpy(words).to(device)[:, :, None] >> shifts) & 1).flatten(1)
