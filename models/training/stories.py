"""Short and long stories on the subject that a prompt gives: plots with one hero, one friend and one object."""

from dataclasses import dataclass
from random import Random

from models.training import texts, words


@dataclass(frozen=True)
class Subject:
    """What a story is about: `asked` as the prompt says it, `introduced` at first mention, `known` afterwards."""

    asked: str
    introduced: str
    known: str
    hero_name: str | None = None
    topic: str | None = None


def _creature(random: Random) -> str:
    phrase = words.noun(random)
    if random.random() < 0.45:
        adjective = words.invented_word(random) if random.random() < 0.15 else random.choice(words.ADJECTIVES)
        phrase = f"{adjective} {phrase}"
    if random.random() < 0.12:
        phrase = f"{random.choice(words.ADJECTIVES)} {phrase}"
    return phrase


def _creature_subject(random: Random) -> Subject:
    phrase = _creature(random)
    article = words.with_article(phrase)
    known, kind = f"the {phrase}", random.random()
    if kind < 0.5:
        return Subject(article, article, known)
    if kind < 0.62:
        return Subject(phrase, article, known)
    if kind < 0.7:
        return Subject(known, known, known)
    if kind < 0.85:
        clause = f"{article} who {random.choice(words.WHO_CLAUSES)}"
        return Subject(clause, clause, known)
    if kind < 0.92:
        name = random.choice((words.person(random), random.choice(words.PET_NAMES)))
        return Subject(f"{article} {random.choice(('called', 'named'))} {name}", article, known, hero_name=name)
    return Subject(f"{article} and {words.with_article(_creature(random))}", article, known)


def _person_subject(random: Random) -> Subject:
    name = words.person(random)
    return Subject(name, name, name, hero_name=name)


def _topic_subject(random: Random) -> Subject:
    topic = random.choice(words.TOPICS)
    if random.random() < 0.35:
        topic = random.choice(
            (
                words.invented_word(random),
                f"{words.invented_word(random)} {words.noun(random)}s",
                words.noun(random) + "s",
            )
        )
    phrase = random.choice(
        ("girl", "boy", "child", "little girl", "young boy", "fox", "mouse", "bear", "robot", "sailor")
    )
    return Subject(topic, words.with_article(phrase), f"the {phrase}", topic=topic)


def subject(random: Random) -> Subject:
    kind = random.random()
    if kind < 0.68:
        return _creature_subject(random)
    return _person_subject(random) if kind < 0.8 else _topic_subject(random)


def _friend_of(random: Random, chosen: Subject) -> str:
    """The second character: the one that the prompt names with "and", or anybody."""
    _, joined, second = chosen.asked.partition(" and ")
    if joined and chosen.topic is None and second.startswith(("a ", "an ")):
        return second.split(" ", 1)[1]
    friend = random.choice(words.ANIMALS + words.BEINGS[:24])
    return f"{random.choice(words.ADJECTIVES)} {friend}" if random.random() < 0.6 else friend


_OPENINGS = texts.lines("stories", "openings")
_NAMINGS = texts.lines("stories", "namings")
_TOPIC_OPENINGS = texts.lines("stories", "topic openings")
_HABITS = texts.lines("stories", "habits")
_BRIDGES = texts.lines("stories", "bridges")
_ENDINGS = texts.lines("stories", "endings")
_TOPIC_ENDINGS = texts.lines("stories", "topic endings")
_MOODS = texts.lines("stories", "moods")
_WEATHERS = texts.lines("stories", "weathers")
_PLOTS = [texts.blocks("plots", title) for title in texts.sections("plots")]

_FRIEND = "\0"
_SHE = {"girl", "little girl", "queen", "princess", "witch", "mermaid", "grandmother", "hen", "cow", "fairy"}
_HE = {"boy", "young boy", "king", "prince", "wizard", "grandfather", "fisherman", "postman", "snowman"}


def _name_of(random: Random, chosen: Subject) -> tuple[str, bool]:
    """The hero's name and whether he is a he; a girl gets no boy's name."""
    last_word = chosen.known.rsplit(" ", 1)[-1]
    if chosen.hero_name is None and last_word in _SHE:
        return random.choice(words.GIRLS), False
    if chosen.hero_name is None and last_word in _HE:
        return random.choice(words.BOYS), True
    name = chosen.hero_name or random.choice(words.PET_NAMES + words.GIRLS + words.BOYS)
    is_male = name in words.BOYS or (name not in words.GIRLS and random.random() < 0.5)
    return name, is_male


def _slots(random: Random, chosen: Subject, place: str) -> dict[str, str]:
    name, is_male = _name_of(random, chosen)
    he, him, his = ("he", "him", "his") if is_male else ("she", "her", "her")
    slots = {
        "subject": chosen.introduced,
        "the": chosen.known,
        "hero": name,
        "he": he,
        "him": him,
        "his": his,
        "friend": _FRIEND,
        "place": place,
        "tplace": "the " + place.split(" ", 1)[1] if place.startswith(("a ", "an ")) else place,
        "topic": chosen.topic or "",
        "mood": random.choice(_MOODS),
        "weather": random.choice(_WEATHERS),
        "thing": random.choice(words.OBJECTS[:28]),
    }
    return slots | {key.upper(): words.sentence_case(value) for key, value in slots.items()}


def _pick(random: Random, wordings: list[str], slots: dict[str, str]) -> str:
    return words.sentence_case(random.choice(wordings).format(**slots))


def _told(random: Random, plot: list[list[str]], friend: str, slots: dict[str, str]) -> list[str]:
    """The sentences of one plot: the friend is "a fox" at first mention and "the fox" afterwards."""
    slots = slots | {"thing": random.choice(words.OBJECTS[:28])}
    text = "\n".join(_pick(random, step, slots) for step in plot)
    text = text.replace(_FRIEND, words.with_article(friend), 1).replace(_FRIEND, f"the {friend}")
    return [words.sentence_case(line) for line in text.split("\n")]


def _opening(random: Random, chosen: Subject, slots: dict[str, str]) -> list[str]:
    if chosen.topic:
        return [_pick(random, _TOPIC_OPENINGS, slots), _pick(random, _NAMINGS, slots)]
    first = _pick(random, _OPENINGS, slots)
    if chosen.hero_name == chosen.introduced:
        return [first]
    return [first, _pick(random, _NAMINGS, slots)]


def story(random: Random, chosen: Subject, *, num_plots: int, place: str | None = None) -> str:
    """A story of one plot (6-9 sentences) or several (a long one), told about the same hero throughout."""
    slots = _slots(random, chosen, place or random.choice(words.PLACES))
    sentences = _opening(random, chosen, slots)
    if num_plots > 1 or random.random() < 0.4:
        sentences.append(_pick(random, _HABITS, slots))
    for number, plot in enumerate(random.sample(_PLOTS, num_plots)):
        if number:
            sentences.append(_pick(random, _BRIDGES, slots))
        sentences += _told(random, _shorten(random, plot, num_plots), _friend_of(random, chosen), slots)
    sentences.append(_pick(random, _TOPIC_ENDINGS if chosen.topic else _ENDINGS, slots))
    if num_plots == 1:
        return " ".join(sentences)
    return _paragraphs(sentences)


def _shorten(random: Random, plot: list[list[str]], num_plots: int) -> list[list[str]]:
    """Leave out one middle step of a single plot now and then, so that short stories differ in length."""
    if num_plots > 1 or random.random() < 0.4:
        return plot
    dropped = random.choice((1, 3))
    return plot[:dropped] + plot[dropped + 1 :]


def _paragraphs(sentences: list[str]) -> str:
    starts = range(0, len(sentences), 5)
    return "\n\n".join(" ".join(sentences[start : start + 5]) for start in starts)


_PROMPTS = texts.lines("stories", "requests")
_LONG_PROMPTS = texts.lines("stories", "long requests")
_PLAIN_PROMPTS = texts.lines("stories", "plain requests")


def short_request(random: Random) -> tuple[str, str]:
    """A chat request for a story and the story; sometimes no subject, sometimes a place to set it in."""
    chosen, kind = subject(random), random.random()
    if kind < 0.06:
        return random.choice(_PLAIN_PROMPTS), story(random, chosen, num_plots=1)
    place = _place(random) if kind < 0.18 else None
    asked = f"{chosen.asked} in {place}" if place else chosen.asked
    return random.choice(_PROMPTS).format(s=asked), story(random, chosen, num_plots=1, place=place)


def long_request(random: Random) -> tuple[str, str]:
    chosen = subject(random)
    return random.choice(_LONG_PROMPTS).format(s=chosen.asked), story(
        random, chosen, num_plots=random.choice((2, 2, 3))
    )


def beginning(random: Random) -> tuple[str, str]:
    """A bare prompt, the first words of a story, and how it goes on."""
    text = story(random, subject(random), num_plots=1 if random.random() < 0.85 else 2)
    pieces = text.split(" ")
    cut = random.randint(1, min(14, len(pieces) - 1))
    return " ".join(pieces[:cut]), " " + " ".join(pieces[cut:])


def _place(random: Random) -> str:
    if random.random() < 0.3:
        return words.with_article(words.invented_word(random))
    return random.choice(words.PLACES)
