"""A tokenizer and sequences for the engine's unit tests, without torch."""

from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from domain.requests import SamplingParams
from gpu_worker.engine.bans import bans_of
from gpu_worker.engine.detokenizer import TextStream
from gpu_worker.engine.sequence import EngineJob, Sequence


def byte_tokenizer() -> Tokenizer:
    """One token per byte after the end token 0: any text, and any broken UTF-8, can come out of a random model."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={"<eos>": 0} | {c: i + 1 for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<eos>", special=True)])
    return tokenizer


TOKENIZER = byte_tokenizer()


def make_sequences(prompt: list[int], **changes: Any) -> list[Sequence]:
    """The sequences of one job. Keyword arguments are EngineJob fields if they name one, otherwise its params."""
    fields = {name: changes.pop(name) for name in list(changes) if name in EngineJob.__dataclass_fields__}
    params = SamplingParams.model_validate({"temperature": 0.0} | changes)
    defaults: dict[str, Any] = {
        "id": "job",
        "attempt": 1,
        "max_tokens": 100,
        "seed": 0,
        "priority": 0,
        "cache_salt": "",
        "adapter": None,
        "arrival": 0,
        "max_model_len": 1000,
        "end_token_ids": frozenset({0}),
        "penalised_prompt_ids": frozenset(prompt),
    }
    defaults["bans"] = bans_of(params, TOKENIZER, TOKENIZER.get_vocab_size())
    job = EngineJob(params=params, **defaults | fields)
    job.sequences = [
        Sequence(job, index, list(prompt), len(prompt), TextStream(TOKENIZER, prompt, params))
        for index in range(params.n)
    ]
    return job.sequences


def extend(sequence: Sequence, token_ids: list[int]) -> None:
    """Append these tokens as if they had been drawn, without their text."""
    sequence.token_ids += token_ids
    sequence.output_counts.update(token_ids)


def make_sequence(prompt: list[int], **changes: Any) -> Sequence:
    return make_sequences(prompt, **changes)[0]
