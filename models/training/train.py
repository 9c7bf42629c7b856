"""Trains celeriac-mini from a seed and writes its weights; interrupted, it goes on from its last checkpoint.

`python -m models.training.train` takes less than an hour on two idle cores with AMX, and uses a GPU where there is one.
`--export-only` writes the weights of the last checkpoint without training on.
"""

import argparse
import json
import math
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from random import Random

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
# Most steps see short rows. Every eighth sees rows as long as the context, so that no position is new at inference.
LONG_STEP_EVERY = 8
PAD_ID, END_ID = corpus.SPECIAL_TOKENS.index(corpus.PAD), corpus.SPECIAL_TOKENS.index(corpus.END)


@dataclass(frozen=True)
class Step:
    """What one step sees; all tensors are (num_rows, row_length) but `attention_mask`, (num_rows, 1, row_length, row_length)."""

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


def step_of(tokenizer: Tokenizer, seed: int, number: int, tokens_per_step: int) -> Step:
    """The rows of step `number`: the same for the same seed, whenever and wherever it is asked for."""
    is_long = number % LONG_STEP_EVERY == LONG_STEP_EVERY - 1
    row_length = MAX_MODEL_LEN if is_long else 384
    rows = corpus.rows(tokenizer, Random(f"{seed}:{number}"), num_rows=tokens_per_step // row_length, row_length=row_length, is_long=is_long)
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


def loss_of(model: LlamaForCausalLM, decoder: torch.nn.Module, step: Step) -> Tensor:
    """Mean cross-entropy of the learned tokens; only their positions go through the output layer."""
    hidden = decoder(input_ids=step.token_ids, position_ids=step.positions, attention_mask=step.attention_mask, use_cache=False)[0]
    is_target = step.is_learned[:, 1:]
    logits = model.lm_head(hidden[:, :-1][is_target])
    return cross_entropy(logits.float(), step.token_ids[:, 1:][is_target])


def learning_rate(number: int, num_steps: int, peak: float) -> float:
    """Linear warm-up, then a cosine down to a fiftieth of the peak."""
    if number < WARMUP_STEPS:
        return peak * (number + 1) / WARMUP_STEPS
    progress = (number - WARMUP_STEPS) / max(1, num_steps - WARMUP_STEPS)
    return peak * (0.02 + 0.98 * (1 + math.cos(math.pi * progress)) / 2)


def optimizers_of(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for the embedding and the norms; both on AdamW's scale of learning rates."""
    inner = [parameter for name, parameter in model.named_parameters() if parameter.ndim == 2 and "embed" not in name]
    outer = [parameter for name, parameter in model.named_parameters() if parameter.ndim != 2 or "embed" in name]
    return [
        torch.optim.Muon(inner, lr=0.0, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(outer, lr=0.0, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def save_checkpoint(path: Path, model: LlamaForCausalLM, optimizers: list[torch.optim.Optimizer], number: int) -> None:
    """Written beside and renamed, so that an interruption leaves the old checkpoint whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    states = [optimizer.state_dict() for optimizer in optimizers]
    torch.save({"step": number, "model": model.state_dict(), "optimizers": states}, unfinished)
    unfinished.replace(path)


def load_checkpoint(path: Path, model: LlamaForCausalLM, optimizers: list[torch.optim.Optimizer]) -> int:
    """The number of steps that the checkpoint has behind it; 0 where there is none."""
    if not path.exists():
        return 0
    saved = torch.load(path, map_location="cpu", weights_only=True)
    model.load_state_dict(saved["model"])
    for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
        optimizer.load_state_dict(state)
    return int(saved["step"])


def export(model: LlamaForCausalLM, directory: Path) -> None:
    """Write config, generation config and bfloat16 safetensors; the model stays as it is."""
    stored = LlamaForCausalLM(model.config).to(torch.bfloat16)
    stored.load_state_dict(model.state_dict())
    stored.generation_config = GenerationConfig(eos_token_id=END_ID, pad_token_id=PAD_ID, max_new_tokens=400)
    stored.save_pretrained(directory)
    config_path = directory / "config.json"
    config = json.loads(config_path.read_text())
    config_path.write_text(json.dumps(config | {"dtype": "bfloat16"}, indent=2, sort_keys=True) + "\n")


def is_bfloat16_fast(device: torch.device) -> bool:
    return device.type == "cuda" or torch.cpu._is_amx_tile_supported()


def train(options: argparse.Namespace) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    use_bfloat16 = is_bfloat16_fast(device) if options.precision == "auto" else options.precision == "bfloat16"
    tokenizer = Tokenizer.from_file(str(options.directory / "tokenizer.json"))
    model = new_model(options.seed).to(device)
    optimizers = optimizers_of(model)
    first = load_checkpoint(options.checkpoint, model, optimizers)
    use_compiler = not options.no_compile and shutil.which("g++") is not None
    decoder = torch.compile(model.model, dynamic=False) if use_compiler else model.model
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    saved_at = time.monotonic()
    with Progress(*columns, disable=options.quiet) as progress:
        bar = progress.add_task("training", total=options.steps, completed=first)
        for number in range(first, options.steps):
            step = step_of(tokenizer, options.seed, number, options.tokens_per_step)
            step = Step(**{name: tensor.to(device) for name, tensor in vars(step).items()})
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(number, options.steps, options.learning_rate)
            with torch.autocast(device.type, torch.bfloat16, enabled=use_bfloat16):
                loss = loss_of(model, decoder, step)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            progress.update(bar, advance=1, description=f"loss {loss.item():.3f}")
            if options.log is not None and (number + 1) % 25 == 0:
                with options.log.open("a") as log:
                    log.write(json.dumps({"step": number + 1, "loss": round(loss.item(), 4), "seconds": round(time.monotonic() - saved_at, 1)}) + "\n")
            if time.monotonic() - saved_at > options.checkpoint_seconds:
                save_checkpoint(options.checkpoint, model, optimizers, number + 1)
                saved_at = time.monotonic()
    save_checkpoint(options.checkpoint, model, optimizers, options.steps)
    export(model, options.directory)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, default=3_600)
    parser.add_argument("--tokens-per-step", type=int, default=8_192)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--precision", choices=("auto", "bfloat16", "float32"), default="auto")
    parser.add_argument("--no-compile", action="store_true", help="do not use torch.compile, which needs a C++ compiler")
    parser.add_argument("--threads", type=int, default=2, help="processor threads")
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--checkpoint-seconds", type=float, default=180)
    parser.add_argument("--log", type=Path, help="a file for the loss of every 25th step, one JSON object a line")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.add_argument("--directory", type=Path, default=MODEL_DIRECTORY, help="where the tokenizer is and the weights go")
    parser.add_argument("--export-only", action="store_true", help="write the weights of the last checkpoint and stop")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if not options.export_only:
        return train(options)
    model = new_model(options.seed)
    step = load_checkpoint(options.checkpoint, model, optimizers_of(model))
    export(model, options.directory)
    print(f"wrote the weights of step {step} to {options.directory}")


if __name__ == "__main__":
    main()
