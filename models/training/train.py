"""Trains celeriac-mini from a seed and writes its weights; interrupted, it goes on from its last checkpoint.

`python -m models.training.train` takes less than an hour on two idle cores with AMX, and uses a GPU where there is one.
`--export-only` writes the weights of the last checkpoint without training on.
"""

import argparse
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from models.training import corpus
from models.training.tokenizer import MAX_MODEL_LEN, MODEL_DIRECTORY, VOCABULARY_SIZE

CHECKPOINT = Path(".celeriac/training/checkpoint.pt")
WARMUP_STEPS = 100
# Most steps see short rows. One in twelve sees rows as long as the context, so that no position is new at inference.
LONG_STEP_EVERY = 12
# Copying a subject, a name or a key from the prompt is learned late unless it is drilled early, and the units of a sum
# stay a guess until sums have most of the tokens for a while.
COPYING_STEPS = 800
COPYING_SHARES = (0.4, 0.03)
SUMS_SHARE = 0.12
SUMS_PEAK = range(1524, 1824)
SUMS_PEAK_SHARE = 0.4
# The rate stays at its peak at first and falls over the second half. A second, lower fall polishes what is weakest.
MAIN_STEPS = 2_400
DECAY_SHARE = 0.55
POLISH_STEPS = 400
POLISH_PEAK = 0.3
POLISH_SHARE = 0.3
PAD_ID, END_ID = corpus.SPECIAL_TOKENS.index(corpus.PAD), corpus.SPECIAL_TOKENS.index(corpus.END)


@dataclass(frozen=True)
class Step:
    """(num_rows, row_length) tensors, and `attention_mask` of (num_rows, 1, row_length, row_length)."""

    token_ids: Tensor
    positions: Tensor
    is_learned: Tensor
    attention_mask: Tensor


def new_model(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=5,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=MAX_MODEL_LEN,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=END_ID,
        pad_token_id=PAD_ID,
    )
    return LlamaForCausalLM(config)


def drill_of(number: int) -> corpus.Drill:
    """What step `number` practises beside the mixture."""
    if number >= MAIN_STEPS:
        return corpus.Drill(corpus.weak_spots, POLISH_SHARE)
    if number >= COPYING_STEPS:
        return corpus.Drill(corpus.sums_drill, SUMS_PEAK_SHARE if number in SUMS_PEAK else SUMS_SHARE)
    first_share, last_share = COPYING_SHARES
    share = max(last_share, first_share * (1 - number / COPYING_STEPS))
    return corpus.Drill(corpus.copying_drill, share)


def step_of(tokenizer: Tokenizer, seed: int, number: int, tokens_per_step: int) -> Step:
    """The rows of step `number`: the same for the same seed, whenever and wherever it is asked for."""
    is_long = number % LONG_STEP_EVERY == LONG_STEP_EVERY - 1
    row_length = MAX_MODEL_LEN if is_long else 384
    rows = corpus.rows(
        tokenizer,
        Random(f"{seed}:{number}"),
        num_rows=tokens_per_step // row_length,
        row_length=row_length,
        is_long=is_long,
        drill=drill_of(number),
    )
    sample_numbers = _padded([row.sample_numbers for row in rows], row_length, 0)
    is_same_sample = sample_numbers[:, :, None] == sample_numbers[:, None, :]
    is_before = torch.ones(row_length, row_length, dtype=torch.bool).tril()
    return Step(
        token_ids=_padded([row.token_ids for row in rows], row_length, PAD_ID),
        positions=_padded([row.positions for row in rows], row_length, 0),
        is_learned=_padded([[int(learned) for learned in row.is_learned] for row in rows], row_length, 0).bool(),
        attention_mask=(is_same_sample & is_before)[:, None],
    )


def _padded(rows: list[list[int]], row_length: int, value: int) -> Tensor:
    return torch.tensor([row + [value] * (row_length - len(row)) for row in rows])


def loss_of(model: LlamaForCausalLM, decoder: Callable[..., Any], step: Step) -> Tensor:
    """Mean cross-entropy of the learned tokens; only their positions go through the output layer."""
    hidden = decoder(
        input_ids=step.token_ids, position_ids=step.positions, attention_mask=step.attention_mask, use_cache=False
    )[0]
    is_target = step.is_learned[:, 1:]
    logits = model.lm_head(hidden[:, :-1][is_target])
    return cross_entropy(logits.float(), step.token_ids[:, 1:][is_target])


def learning_rate(number: int, peak: float) -> float:
    """Linear warm-up, a plateau, down in a straight line to nearly nothing; then the same line once more from lower."""
    if number >= MAIN_STEPS:
        return peak * POLISH_PEAK * (MAIN_STEPS + POLISH_STEPS - number) / POLISH_STEPS
    warmed = (number + 1) / WARMUP_STEPS
    remaining = (MAIN_STEPS - number) / (DECAY_SHARE * MAIN_STEPS)
    return peak * min(1.0, warmed, remaining)


def optimizers_of(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for embedding and norms, both on the same scale of rates."""
    inner = [parameter for name, parameter in model.named_parameters() if parameter.ndim == 2 and "embed" not in name]
    outer = [parameter for name, parameter in model.named_parameters() if parameter.ndim != 2 or "embed" in name]
    return [
        torch.optim.Muon(inner, lr=0.0, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(outer, lr=0.0, betas=(0.9, 0.95), weight_decay=0.0),
    ]


@dataclass(frozen=True)
class Trainer:
    """A model with its optimizers; `decoder` is the model without its output layer, compiled where that is possible."""

    model: LlamaForCausalLM
    decoder: Callable[..., Any]
    optimizers: list[torch.optim.Optimizer]
    device: torch.device
    use_bfloat16: bool

    @classmethod
    def new(cls, seed: int, precision: str, *, may_compile: bool) -> "Trainer":
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        is_fast = device.type == "cuda" or torch.cpu._is_amx_tile_supported()
        use_bfloat16 = is_fast if precision == "auto" else precision == "bfloat16"
        model = new_model(seed).to(device)
        can_compile = may_compile and shutil.which("g++") is not None
        decoder = torch.compile(model.model, dynamic=False) if can_compile else model.model
        return cls(model, decoder, optimizers_of(model), device, use_bfloat16)

    def learn(self, step: Step, rate: float) -> float:
        """Take one optimizer step; the result is the loss before it."""
        step = Step(**{name: tensor.to(self.device) for name, tensor in vars(step).items()})
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.use_bfloat16):
            loss = loss_of(self.model, self.decoder, step)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad()
        return loss.item()

    def save(self, path: Path, number: int) -> None:
        """Written beside and renamed, so that an interruption leaves the old checkpoint whole."""
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".unfinished")
        states = [optimizer.state_dict() for optimizer in self.optimizers]
        torch.save({"step": number, "model": self.model.state_dict(), "optimizers": states}, unfinished)
        unfinished.replace(path)

    def load(self, path: Path) -> int:
        """The number of steps that the checkpoint has behind it; 0 where there is none."""
        if not path.exists():
            return 0
        saved = torch.load(path, map_location="cpu", weights_only=True)
        self.model.load_state_dict(saved["model"])
        for optimizer, state in zip(self.optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        return int(saved["step"])


def export(model: LlamaForCausalLM, directory: Path) -> None:
    """Write config, generation config and bfloat16 safetensors; the model stays as it is."""
    stored = LlamaForCausalLM(model.config).to(torch.bfloat16)
    stored.load_state_dict(model.state_dict())
    stored.generation_config = GenerationConfig(eos_token_id=END_ID, pad_token_id=PAD_ID, max_new_tokens=400)
    stored.save_pretrained(directory)
    (directory / "model.safetensors").chmod(0o644)


def train(trainer: Trainer, options: argparse.Namespace) -> None:
    """Go on from the checkpoint to `options.steps`, with a checkpoint every few minutes and one at the end."""
    tokenizer = Tokenizer.from_file(str(options.directory / "tokenizer.json"))
    first, saved_at = trainer.load(options.checkpoint), time.monotonic()
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(TextColumn("{task.description}"), *columns) as progress:
        bar = progress.add_task("training", total=options.steps, completed=first)
        for number in range(first, options.steps):
            step = step_of(tokenizer, options.seed, number, options.tokens_per_step)
            loss = trainer.learn(step, learning_rate(number, options.learning_rate))
            progress.update(bar, advance=1, description=f"loss {loss:.3f}")
            is_last = number + 1 == options.steps
            if is_last or time.monotonic() - saved_at > options.checkpoint_seconds:
                trainer.save(options.checkpoint, number + 1)
                saved_at = time.monotonic()
                progress.console.print(f"step {number + 1} of {options.steps}: loss {loss:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, default=MAIN_STEPS + POLISH_STEPS, help="stop after so many")
    parser.add_argument("--tokens-per-step", type=int, default=4_096)
    parser.add_argument("--learning-rate", type=float, default=4e-3)
    parser.add_argument("--precision", choices=("auto", "bfloat16", "float32"), default="auto")
    parser.add_argument("--no-compile", action="store_true", help="do without torch.compile and its C++ compiler")
    parser.add_argument("--threads", type=int, default=2, help="processor threads")
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--checkpoint-seconds", type=float, default=180)
    parser.add_argument("--directory", type=Path, default=MODEL_DIRECTORY, help="has the tokenizer, gets the weights")
    parser.add_argument("--export-only", action="store_true", help="write the weights of the last checkpoint and stop")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    trainer = Trainer.new(options.seed, options.precision, may_compile=not options.no_compile)
    if not options.export_only:
        train(trainer, options)
    step = trainer.load(options.checkpoint)
    export(trainer.model, options.directory)
    print(f"wrote the weights of step {step} to {options.directory}")


if __name__ == "__main__":
    main()
