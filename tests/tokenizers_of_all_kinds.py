"""A small tokenizer for each way in which decoders turn tokens into text, and random sequences of its tokens."""

from collections.abc import Callable
from pathlib import Path
from random import Random

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

from tests.engine_parts import byte_tokenizer

MINI = Path(__file__).parents[1] / "models" / "celeriac-mini" / "tokenizer.json"
CHARACTERS = ("é", "€", "𐍈", "日本", "a", " ", "👩‍👩‍👧")
TEXTS = ("é", "€ x", "𐍈𐍈", "hello world.", "the cat a", " a", "  ", "don't")
#: Llama 2, Mistral 7B and Phi-3 decode like this; Gemma leaves out the last part.
LLAMA_DECODER = decoders.Sequence(
    [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
)
GEMMA_DECODER = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])


def sentencepiece_tokenizer(decoder: decoders.Decoder = LLAMA_DECODER) -> Tokenizer:
    """BPE with byte fallback. Two of the added tokens are not special."""
    words = ["▁", "▁the", "▁cat", "a", "b", "x", "▁a", "ing", "�", "▁�", "▁▁", "é", "."]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    merges = [("▁", "▁"), ("▁", "a"), ("▁", "�")]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, ignore_merges=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoder
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False), AddedToken(" y", normalized=False)])
    return tokenizer


def _wordpiece() -> Tokenizer:
    words = ["[UNK]", "[CLS]", "[SEP]", "hello", "##ing", "##s", "world", ".", ",", "'", "n't", "do", "a", "##'s"]
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(["[CLS]", "[SEP]"])
    return tokenizer


def _unigram() -> Tokenizer:
    pieces = [("<unk>", 0.0), ("▁", -1.0), ("▁he", -1.0), ("llo", -1.0), ("▁▁", -2.0), ("x", -1.0), ("a", -1.0)]
    tokenizer = Tokenizer(models.Unigram(pieces, 0))
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


def _suffixed() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE({"a</w>": 0, "b": 1, "c</w>": 2, "de": 3, "a": 4}, []))
    tokenizer.decoder = decoders.BPEDecoder()
    return tokenizer


def _ctc() -> Tokenizer:
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(["<pad>", "a", "b", "c", "|", "."])}, unk_token="a")
    )
    tokenizer.decoder = decoders.CTC()
    return tokenizer


def _byte_level() -> Tokenizer:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["é€", " <tag>"])
    return tokenizer


def _byte_level_in_a_sequence() -> Tokenizer:
    tokenizer = byte_tokenizer()
    tokenizer.decoder = decoders.Sequence([decoders.Replace("Ġ", "_"), decoders.ByteLevel(), decoders.Fuse()])
    return tokenizer


_MAKERS: dict[str, Callable[[], Tokenizer]] = {
    "byte-level": _byte_level,
    "byte-level in a sequence": _byte_level_in_a_sequence,
    "llama": sentencepiece_tokenizer,
    "gemma": lambda: sentencepiece_tokenizer(GEMMA_DECODER),
    "byte fallback and metaspace": lambda: sentencepiece_tokenizer(
        decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    ),
    "wordpiece": _wordpiece,
    "unigram": _unigram,
    "suffixed": _suffixed,
    "ctc": _ctc,
    "no decoder": lambda: Tokenizer(models.WordLevel({"a": 0, "b": 1, "c": 2}, unk_token="a")),
    "celeriac-mini": lambda: Tokenizer.from_file(str(MINI)),
}
TOKENIZERS = {name: make() for name, make in _MAKERS.items()}


def random_tokens(tokenizer: Tokenizer, generator: Random) -> list[int]:
    """Up to about twenty tokens: any tokens, even unknown ones, characters byte by byte, and encoded text."""
    token_ids: list[int] = []
    for _ in range(generator.randrange(1, 6)):
        match generator.randrange(3):
            case 0:
                token_ids += [generator.randrange(tokenizer.get_vocab_size() + 2) for _ in range(3)]
            case 1:
                character = generator.choice(CHARACTERS)
                spelt = [tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in character.encode()]
                token_ids += [token_id for token_id in spelt if token_id is not None]
            case _:
                token_ids += tokenizer.encode(generator.choice(TEXTS), add_special_tokens=False).ids
    return token_ids
