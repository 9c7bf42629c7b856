"""A model's tokenizer and end tokens, from its files and its family, which its configuration does not reliably name.

Free of torch.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tokenizers import Tokenizer

from gpu_worker.engine.detokenizer import with_visible_reasoning
from text.model_files import eos_token_ids, read_json_file
from text.tokenizers import load_tokenizer, special_tokens_of


@dataclass(frozen=True, slots=True)
class Family:
    """Facts about a family of models.

    `turn_ends` are the tokens that end a turn in its chat format. Many checkpoints list only the end-of-text token in
    their configuration, so that the model would go on and write the user's next message.
    """

    turn_ends: tuple[str, ...] = ()
    pooling: Literal["mean", "cls", "last"] = "last"  # for embeddings, unless the model's files specify it


ENCODER = Family(pooling="mean")

CHAT_ML = Family(turn_ends=("<|im_end|>",))

#: By the `model_type` of the configuration. A family that is not listed needs no special treatment.
FAMILIES: dict[str, Family] = {
    **dict.fromkeys(
        ("albert", "bert", "camembert", "distilbert", "electra", "modernbert", "mpnet", "roberta", "xlm-roberta"),
        ENCODER,
    ),
    "cohere2": Family(turn_ends=("<|END_OF_TURN_TOKEN|>",)),
    "gemma2": Family(turn_ends=("<end_of_turn>",)),
    "gemma3_text": Family(turn_ends=("<end_of_turn>",)),
    "gpt_oss": Family(turn_ends=("<|return|>", "<|call|>")),
    "llama": Family(turn_ends=("<|eot_id|>", "<|eom_id|>", "<|im_end|>")),
    "mixtral": CHAT_ML,
    "olmo2": CHAT_ML,
    "phi3": Family(turn_ends=("<|end|>", "<|im_end|>")),
    "qwen2": CHAT_ML,
    "qwen3": CHAT_ML,
    "qwen3_moe": CHAT_ML,
    "smollm3": CHAT_ML,
}


def turn_end_token_ids(model_type: str, tokenizer: Tokenizer) -> frozenset[int]:
    """The family's turn ends that are special tokens of this tokenizer; one that it treats as ordinary text is left
    out."""
    special = {
        token.content: token_id for token_id, token in tokenizer.get_added_tokens_decoder().items() if token.special
    }
    turn_ends = FAMILIES.get(model_type, Family()).turn_ends
    return frozenset(special[content] for content in turn_ends if content in special)


def read_tokenizer(folder: Path) -> Tokenizer:
    """Load it as the API does: the API turns text into token ids, and the engine turns them into text."""
    config = read_json_file(folder / "tokenizer_config.json")
    special_tokens = special_tokens_of(read_json_file(folder / "special_tokens_map.json") | config)
    return with_visible_reasoning(load_tokenizer(folder, config, special_tokens))


def read_end_token_ids(folder: Path, tokenizer: Tokenizer) -> frozenset[int]:
    """The tokens that end a text, or a turn, according to the model's files and its family."""
    config = read_json_file(folder / "config.json")
    named = eos_token_ids(read_json_file(folder / "generation_config.json"), config)
    return frozenset(named) | turn_end_token_ids(str(config.get("model_type")), tokenizer)
