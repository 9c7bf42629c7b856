"""Learns the byte-level BPE tokenizer and writes it with the chat template, as transformers' AutoTokenizer loads it.

`python -m models.training.tokenizer` rewrites the tokenizer files of `models/celeriac-mini`; weights trained with
another one are void.
"""

import argparse
import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from models.training.corpus import ASSISTANT, END, PAD, SPECIAL_TOKENS, SYSTEM, USER, texts

MODEL_DIRECTORY = Path(__file__).parent.parent / "celeriac-mini"
VOCABULARY_SIZE = 2048
MAX_MODEL_LEN = 1024

# No loop controls, no filters beyond `trim`, no attribute calls: it renders in any sandbox.
CHAT_TEMPLATE = f"""\
{{%- for message in messages -%}}
  {{%- if message['role'] in ['system', 'developer'] -%}}{{{{- '{SYSTEM}' -}}}}
  {{%- elif message['role'] == 'assistant' -%}}{{{{- '{ASSISTANT}' -}}}}
  {{%- else -%}}{{{{- '{USER}' -}}}}
  {{%- endif -%}}
  {{%- if message['content'] is string -%}}{{{{- message['content'] | trim -}}}}
  {{%- elif message['content'] -%}}
    {{%- for part in message['content'] -%}}{{{{- part['text'] | trim -}}}}{{%- endfor -%}}
  {{%- endif -%}}
  {{{{- '{END}' -}}}}
{{%- endfor -%}}
{{%- if add_generation_prompt -%}}{{{{- '{ASSISTANT}' -}}}}{{%- endif -%}}
"""


def learn(seed: int, num_samples: int) -> Tokenizer:
    """Every digit is a token, so that sums are made of columns; every byte is one, so that any text is covered."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(seed, num_samples), trainer)
    return tokenizer


def save(tokenizer: Tokenizer, directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END,
        "pad_token": PAD,
        "additional_special_tokens": [SYSTEM, USER, ASSISTANT],
        "model_max_length": MAX_MODEL_LEN,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--samples", type=int, default=40_000)
    parser.add_argument("--directory", type=Path, default=MODEL_DIRECTORY)
    options = parser.parse_args()
    tokenizer = learn(options.seed, options.samples)
    save(tokenizer, options.directory)
    print(f"wrote a vocabulary of {tokenizer.get_vocab_size()} tokens to {options.directory}")


if __name__ == "__main__":
    main()
