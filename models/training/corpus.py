"""The synthetic corpus: what is mixed with what, written as token rows that a training step can use.

Nothing is stored: step number and seed decide a step's samples, so a run can be resumed anywhere and repeated exactly.
`python -m models.training.corpus` prints a few samples of each kind and the share of each kind in the tokens.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from random import Random
from typing import NamedTuple

from tokenizers import Tokenizer

from models.training import arithmetic, facts, stories, structured, talk

END = "<|end|>"
PAD = "<|pad|>"
SYSTEM = "<|system|>"
USER = "<|user|>"
ASSISTANT = "<|assistant|>"
SPECIAL_TOKENS = (PAD, END, SYSTEM, USER, ASSISTANT)


class Segment(NamedTuple):
    """A piece of text; only learned pieces count in the loss."""

    text: str
    is_learned: bool


@dataclass(frozen=True)
class Sample:
    kind: str
    segments: list[Segment]


@dataclass
class Row:
    """Token ids of one training row: several samples one after the other, told apart by `sample_numbers`."""

    token_ids: list[int] = field(default_factory=list)
    is_learned: list[bool] = field(default_factory=list)
    sample_numbers: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)

    def append(self, token_ids: list[int], is_learned: list[bool]) -> None:
        number = self.sample_numbers[-1] + 1 if self.sample_numbers else 1
        self.token_ids += token_ids
        self.is_learned += is_learned
        self.sample_numbers += [number] * len(token_ids)
        self.positions += range(len(token_ids))


Exchange = tuple[str, str]


def chat(kind: str, exchanges: list[Exchange], system: str | None = None) -> Sample:
    """A conversation, written exactly as the chat template writes it."""
    segments = [Segment(f"{SYSTEM}{system}{END}", False)] if system else []
    for asked, answered in exchanges:
        segments += [Segment(f"{USER}{asked}{END}{ASSISTANT}", False), Segment(f"{answered}{END}", True)]
    return Sample(kind, segments)


def bare(kind: str, prompt: str, completion: str) -> Sample:
    """A prompt without chat markers, and its completion."""
    return Sample(kind, [Segment(prompt, False), Segment(f"{completion}{END}", True)])


# How many samples of each kind, relative to each other, and how to make one exchange.
SINGLE_EXCHANGES: dict[str, tuple[float, Callable[[Random], Exchange]]] = {
    "sum": (10, lambda random: arithmetic.question(random, arithmetic.training_problem(random))),
    "exercise sheet": (4, arithmetic.exercise_sheet),
    "word problem": (2, arithmetic.word_problem),
    "beyond reach": (0.7, arithmetic.beyond_reach),
    "short story": (9, stories.short_request),
    "long story": (2.2, stories.long_request),
    "json": (20, structured.request),
    "fact": (6, facts.fact),
    "unknown": (4, facts.unknown),
    "small talk": (6, talk.small_talk),
    "repeat": (6, talk.repeating),
    "count": (1.5, talk.counting),
    "list": (1.5, talk.listing),
    "poem": (1.2, talk.poem),
}
COMPLETIONS: dict[str, tuple[float, Callable[[Random], Exchange]]] = {
    "story beginning": (5, stories.beginning),
    "bare sum": (6, lambda random: arithmetic.completion(random, arithmetic.training_problem(random))),
    "bare fact": (1.5, facts.fact_completion),
}
_OTHERS = {"many sums": 12.0, "introduction": 1.0, "json by system": 1.5, "conversation": 4.0}
_WEIGHTS = {kind: weight for kind, (weight, _) in (SINGLE_EXCHANGES | COMPLETIONS).items()} | _OTHERS


def copying_drill(random: Random) -> Sample:
    return chat("copying drill", [talk.copying_drill(random)])


def sums_drill(random: Random) -> Sample:
    """Many bare sums; only the results are learned, so that it says nothing about what follows a sum."""
    segments: list[Segment] = []
    for _ in range(random.randint(10, 32)):
        prompt, result = arithmetic.completion(random, arithmetic.training_problem(random))
        segments += [Segment(f"\n{prompt}" if segments else prompt, False), Segment(result, True)]
    return Sample("sums drill", segments)


def weak_spots(random: Random) -> Sample:
    """What the main part of the training leaves weakest."""
    kind = random.random()
    if kind < 0.35:
        return chat("differences", [arithmetic.bare_difference(random) for _ in range(random.randint(3, 12))])
    if kind < 0.6:
        return chat("count", [talk.counting(random)])
    if kind < 0.85:
        return chat("json", [structured.invention(random)])
    return chat("long story", [stories.long_request(random)])


@dataclass(frozen=True)
class Drill:
    """What is practised beside the mixture, and how large a share of the samples it is."""

    make: Callable[[Random], Sample]
    share: float


def sample(random: Random, *, is_long: bool = False, drill: Drill | None = None) -> Sample:
    """One sample of the mixture or of the drill; a long one is a conversation that fills most of the context."""
    if is_long:
        return _conversation(random, num_exchanges=random.randint(4, 24))
    # Drawn with or without a drill, so that a drill's share is all that it changes in the stream of samples.
    drawn = random.random()
    if drill and drawn < drill.share:
        return drill.make(random)
    (kind,) = random.choices(list(_WEIGHTS), weights=list(_WEIGHTS.values()))
    if kind in COMPLETIONS:
        return bare(kind, *COMPLETIONS[kind][1](random))
    if kind in SINGLE_EXCHANGES:
        return _single(random, kind)
    if kind == "introduction":
        return chat(kind, talk.introduction(random), _system(random))
    if kind == "json by system":
        system, asked, answered = structured.system_request(random)
        return chat(kind, [(asked, answered)], system)
    if kind == "many sums":
        return chat(kind, [_exchange(random, "sum") for _ in range(random.randint(3, 12))], _system(random))
    return _conversation(random, num_exchanges=random.randint(2, 4))


def _single(random: Random, kind: str) -> Sample:
    """One exchange as a chat; now and then the bare question, answered in the same words."""
    exchange = _exchange(random, kind)
    return bare(kind, *exchange) if random.random() < 0.15 else chat(kind, [exchange], _system(random))


def _exchange(random: Random, kind: str) -> Exchange:
    return SINGLE_EXCHANGES[kind][1](random)


def _system(random: Random) -> str | None:
    return random.choice(talk.SYSTEM_PROMPTS) if random.random() < 0.25 else None


def _conversation(random: Random, num_exchanges: int) -> Sample:
    kinds = random.choices(
        list(SINGLE_EXCHANGES), weights=[weight for weight, _ in SINGLE_EXCHANGES.values()], k=num_exchanges
    )
    exchanges = [_exchange(random, kind) for kind in kinds]
    if random.random() < 0.15:
        introduction = talk.introduction(random)
        exchanges = [introduction[0], *exchanges, introduction[-1]]
    return chat("conversation", exchanges, _system(random))


Encoded = tuple[list[int], list[bool]]


def encode(tokenizer: Tokenizer, made: Sample) -> Encoded:
    """Token ids and loss mask; each segment is encoded on its own, as the prompt is at inference."""
    token_ids: list[int] = []
    is_learned: list[bool] = []
    for segment in made.segments:
        encoded = tokenizer.encode(segment.text, add_special_tokens=False).ids
        token_ids += encoded
        is_learned += [segment.is_learned] * len(encoded)
    return token_ids, is_learned


def rows(
    tokenizer: Tokenizer,
    random: Random,
    *,
    num_rows: int,
    row_length: int,
    is_long: bool = False,
    drill: Drill | None = None,
) -> list[Row]:
    """`num_rows` rows, each filled with whole samples; every row begins with a long one if `is_long`."""
    waiting: list[Encoded] = []

    def next_sample(row: Row) -> Encoded:
        is_first_long = is_long and not row.token_ids
        return encode(tokenizer, sample(random, is_long=is_first_long, drill=drill))

    return [_filled(next_sample, waiting, row_length) for _ in range(num_rows)]


def _filled(next_sample: Callable[[Row], Encoded], waiting: list[Encoded], row_length: int) -> Row:
    """A row that is closed at the third sample that does not fit; such samples wait for the next row."""
    row, num_misfits = Row(), 0
    while num_misfits < 3:
        encoded = waiting.pop(0) if waiting and num_misfits == 0 else next_sample(row)
        if len(row.token_ids) + len(encoded[0]) <= row_length:
            row.append(*encoded)
        elif len(encoded[0]) <= row_length:
            waiting.append(encoded)
            num_misfits += 1
    return row


def texts(seed: int, num_samples: int) -> Iterator[str]:
    """Plain texts of the mixture, for the tokenizer to learn its merges from."""
    random = Random(seed)
    for _ in range(num_samples):
        for segment in sample(random).segments:
            text = segment.text
            for special_token in SPECIAL_TOKENS:
                text = text.replace(special_token, "\n")
            yield text


def main() -> None:
    random, num_characters = Random(0), Counter[str]()
    seen = Counter[str]()
    for _ in range(5_000):
        made = sample(random)
        num_characters[made.kind] += sum(len(segment.text) for segment in made.segments)
        seen[made.kind] += 1
        if seen[made.kind] <= 2:
            print(f"[{made.kind}] " + "".join(segment.text for segment in made.segments), end="\n\n")
    for kind, count in num_characters.most_common():
        print(f"{kind:16} {count / num_characters.total():6.1%}")


if __name__ == "__main__":
    main()
