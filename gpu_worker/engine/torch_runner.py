"""What all runners of torch have in common: their errors, their memory, and the scores of prompts on their device."""

import torch
from torch import Tensor

from gpu_worker.engine.runner import AtOnce, process_memory_bytes
from gpu_worker.engine.sampling import LEAST_LOGPROB, Drawn


class TorchErrors:
    fatal_errors: tuple[type[Exception], ...] = (torch.AcceleratorError,)
    memory_errors: tuple[type[Exception], ...] = (torch.OutOfMemoryError,)

    def free_memory(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def memory_bytes(self) -> int:
        """Of the GPU if there is one, else of this process."""
        return int(torch.cuda.memory_allocated()) if torch.cuda.is_available() else process_memory_bytes()


class TorchAtOnce(TorchErrors, AtOnce):
    """A runner of torch that does not overlap anything."""


def score_tokens(logits: Tensor, token_ids: list[int], num_top: int) -> list[Drawn]:
    """As that of sampling.py, on the device of the logits."""
    logprobs = logits.float().log_softmax(-1).clamp_(min=LEAST_LOGPROB)
    if not bool(torch.isfinite(logprobs).all()):
        raise ValueError("the model's logits are not finite")
    given = logprobs.gather(1, torch.tensor(token_ids, device=logits.device)[:, None]).squeeze(1).tolist()
    values, ids = logprobs.topk(min(num_top, logprobs.shape[-1]))
    tops = [tuple(zip(*pair, strict=True)) for pair in zip(ids.tolist(), values.tolist(), strict=True)]
    return [Drawn(token_id, logprob, top) for token_id, logprob, top in zip(token_ids, given, tops, strict=True)]
