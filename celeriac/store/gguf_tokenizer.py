"""The tokenizer that a GGUF file describes, as a tokenizer.json: built by `tokenizers` alone, without PyTorch.

It gives the tokens that transformers' conversion of the same file gives. What is not known here is not guessed.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4  # of `token_type`
SPACE = "\u2581"  # as SentencePiece writes it
PREFIX = "tokenizer.ggml."


class UnknownVocabulary(ValueError):
    """The file's vocabulary is of a kind that is not supported here."""


def build_tokenizer(header: Mapping[str, Any]) -> Tokenizer:
    """Raises UnknownVocabulary, or ValueError for a header that contradicts itself."""
    kind = header.get(PREFIX + "model")
    tokens = header.get(PREFIX + "tokens")
    if not isinstance(tokens, list) or not tokens:
        raise UnknownVocabulary("it has no vocabulary")
    try:
        if kind == "gpt2":
            tokenizer = _byte_level(header, tokens)
        elif kind == "llama" and str(header.get("general.architecture")).startswith("gemma"):
            tokens = [SPACE * len(token) if token and not token.strip(" ") else token for token in tokens]
            tokenizer = _gemma(header, tokens)
        elif kind == "llama":
            tokenizer = _sentence_piece(header, tokens)
        else:
            raise UnknownVocabulary(f"its vocabulary is of the kind {kind!r}")
        _add_whole_tokens(tokenizer, header, tokens)
        _add_ends(tokenizer, header, tokens, kind)
    except (IndexError, TypeError, KeyError) as exc:
        raise ValueError(f"its vocabulary is not consistent ({type(exc).__name__}: {exc})") from exc
    return tokenizer


def special_token(header: Mapping[str, Any], name: str) -> str | None:
    """The text of the token with this role, such as `bos`."""
    token_id = header.get(f"{PREFIX}{name}_token_id")
    tokens = header.get(PREFIX + "tokens", [])
    return tokens[token_id] if isinstance(token_id, int) and 0 <= token_id < len(tokens) else None


# Byte-level vocabularies

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+%s"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*%s"
)
_CASED_REST = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}"
_QWEN2 = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}"
_QWEN35 = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN = rf"{_CASED % ('', '')}|\p{{N}}|{_CASED_REST}"
_GPT4O = rf"{_CASED % (_CONTRACTIONS + '?', _CONTRACTIONS + '?')}|\p{{N}}{{1,3}}|{_CASED_REST}"
_DEEPSEEK3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

#: How a text is cut before its pieces are merged, one pattern after the other, by the names in `tokenizer.ggml.pre`.
_PATTERNS: dict[tuple[str, ...], tuple[str, ...]] = {
    ("gpt-2", "phi-2", "mpt", "olmo", "gigachat", "a.x-4.0", "mellum", "exaone4", "trillion", "granite-docling"): (
        _GPT2,
    ),
    ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"): (r"\p{N}", _GPT2),
    ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"): (_LLAMA3,),
    ("dbrx", "smaug-bpe", "chatglm-bpe", "glm4", "glm5"): (_LLAMA3,),
    ("qwen2", "deepseek-r1-qwen", "kormo", "megrez", "stablelm2", "hunyuan", "solar-open", "grok-2"): (_QWEN2,),
    ("qwen35",): (_QWEN35,),
    ("tekken",): (_TEKKEN,),
    ("gpt-4o", "llama4", "kanana2", "minimax-m2"): (_GPT4O,),
    ("deepseek-v3", "hunyuan-dense", "joyai-llm"): (r"\p{N}{1,3}", "[一-龥\u3040-ゟ゠-ヿ]+", _DEEPSEEK3),
}
_PATTERNS_BY_NAME = {name: patterns for names, patterns in _PATTERNS.items() for name in names}

#: A piece that is a token as a whole is taken as that, even if no merges lead to it.
_WITHOUT_MERGES = frozenset(
    ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "glm4", "glm5", "tekken")
)
#: Of these, texts begin with the token `bos` unless the file says otherwise.
_BEGIN_WITH_BOS = _WITHOUT_MERGES - {"glm4", "glm5"}


def _byte_level(header: Mapping[str, Any], tokens: Sequence[str]) -> Tokenizer:
    name = header.get(PREFIX + "pre")
    if name not in _PATTERNS_BY_NAME:
        raise UnknownVocabulary(f"its texts are cut in the way {name!r}")
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    merges = [_pair(merge) for merge in header[PREFIX + "merges"]]
    tokenizer = Tokenizer(_bpe(vocabulary, merges, ignore_merges=name in _WITHOUT_MERGES))
    cuts = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in _PATTERNS_BY_NAME[name]]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _pair(merge: str) -> tuple[str, str]:
    first, _, second = merge.partition(" ")
    return first, second


def _bpe(vocabulary: Mapping[str, int], merges: Sequence[tuple[str, str]], **options: Any) -> BPE:
    """Raises ValueError."""
    try:
        return BPE(vocab=dict(vocabulary), merges=list(merges), **options)
    except Exception as exc:  # tokenizers raises nothing more specific
        raise ValueError(f"its vocabulary is not consistent ({exc})") from exc


# SentencePiece's


def _gemma(header: Mapping[str, Any], tokens: Sequence[str]) -> Tokenizer:
    """The order of its tokens is that of its merges, which its scores are not."""
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    merges = _implied_merges(vocabulary, {token: -float(token_id) for token, token_id in vocabulary.items()})
    tokenizer = Tokenizer(_with_bytes(header, tokens, vocabulary, merges))
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def _sentence_piece(header: Mapping[str, Any], tokens: Sequence[str]) -> Tokenizer:
    """As Llama 2 and Mistral have it. Phi-3 writes a space before a text even if it begins with one."""
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    if (written := header.get(PREFIX + "merges")) is not None:
        merges = [_pair(merge) for merge in written]
    else:
        scores = header[PREFIX + "scores"]
        merges = _implied_merges(vocabulary, dict(zip(tokens, scores, strict=True)))
    tokenizer = Tokenizer(_with_bytes(header, tokens, vocabulary, merges))
    begins_with_space = bool(header.get(PREFIX + "add_space_prefix", True))
    if header.get("general.architecture") == "phi3" and begins_with_space:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    else:
        scheme = "first" if begins_with_space else "never"
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme=scheme, split=False)
    steps: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if begins_with_space else steps)
    return tokenizer


def _with_bytes(
    header: Mapping[str, Any],
    tokens: Sequence[str],
    vocabulary: Mapping[str, int],
    merges: Sequence[tuple[str, str]],
) -> BPE:
    """What has no token is written in bytes."""
    unknown_id = header.get(PREFIX + "unknown_token_id")
    unknown = tokens[unknown_id] if unknown_id is not None else None
    return _bpe(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)


def _implied_merges(vocabulary: Mapping[str, int], scores: Mapping[str, float]) -> list[tuple[str, str]]:
    """The pairs of tokens that make another one, those with the highest score first. Between equal ones, the same order
    as in transformers."""
    found: list[tuple[float, int, int, str, str]] = []
    for token, score in scores.items():
        pairs = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        known = [pair for pair in pairs if pair[0] in vocabulary and pair[1] in vocabulary]
        known.sort(key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
        found += [(score, len(first), len(second), first, second) for first, second in known]
    found.sort(key=lambda one: one[:3], reverse=True)
    return [(first, second) for _, _, _, first, second in found]


# Both


def _add_whole_tokens(tokenizer: Tokenizer, header: Mapping[str, Any], tokens: Sequence[str]) -> None:
    """Control tokens, and those which a text may contain but no merges may cut."""
    kinds = header.get(PREFIX + "token_type") or []
    named = list(zip(tokens, header[PREFIX + "tokens"], kinds, strict=False))
    control = [AddedToken(token, normalized=False, special=True) for token, _, kind in named if kind == CONTROL]
    whole = [  # a token that is spelled otherwise here is one of spaces, which merges make
        AddedToken(token, normalized=False, special=False)
        for token, spelled, kind in named
        if kind == USER_DEFINED and token == spelled
    ]
    tokenizer.add_special_tokens(control)
    tokenizer.add_tokens(whole)
    for role in ("bos", "eos", "unknown", "padding"):
        if (token := special_token(header, role)) is not None:
            tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True)])


def _add_ends(tokenizer: Tokenizer, header: Mapping[str, Any], tokens: Sequence[str], kind: str) -> None:
    """The tokens between which a text is put."""
    by_default = kind == "llama" or header.get(PREFIX + "pre") in _BEGIN_WITH_BOS
    before, after = _end(header, tokens, "bos", by_default), _end(header, tokens, "eos", False)
    whole = [*before, "$A:0", *after]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=whole,
        pair=[*whole, *(piece.replace(":0", ":1") for piece in (*before, "$B:0", *after))],
        special_tokens=[(piece.removesuffix(":0"), tokens.index(piece.removesuffix(":0"))) for piece in before + after],
    )


def _end(header: Mapping[str, Any], tokens: Sequence[str], name: str, by_default: bool) -> list[str]:
    token_id = header.get(f"{PREFIX}{name}_token_id")
    if token_id is None or not header.get(f"{PREFIX}add_{name}_token", by_default):
        return []
    return [f"{tokens[token_id]}:0"]
