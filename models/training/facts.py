"""What the model knows: a few dozen small facts, and that it does not know the rest."""

from random import Random

from models.training import texts, words

CAPITALS = texts.pairs("facts", "capitals")
OPPOSITES = texts.pairs("facts", "opposites")
SOUNDS = texts.pairs("facts", "sounds")
LEGS = {animal: int(legs) for animal, legs in texts.pairs("facts", "legs").items()}
COLOUR_OF = texts.pairs("facts", "colours")
SMALL_FACTS = texts.lines("facts", "small facts")
NOT_KNOWN = texts.lines("facts", "not known")
_STRANGE = texts.lines("facts", "strange questions")


def _ask(random: Random, *templates: str) -> str:
    question = random.choice(templates)
    kind = random.random()
    if kind < 0.15:
        return question.lower()
    return question.rstrip("?") if kind < 0.25 else question


def fact(random: Random) -> tuple[str, str]:
    """A question that the model can answer, and the answer."""
    maker = random.choice((_capital, _opposite, _sound, _legs, _colour, _calendar, _small_fact, _small_fact))
    return maker(random)


def _capital(random: Random) -> tuple[str, str]:
    country, capital = random.choice(list(CAPITALS.items()))
    asked = _ask(
        random,
        f"What is the capital of {country}?",
        f"Capital of {country}?",
        f"Which city is the capital of {country}?",
        f"What's the capital of {country}?",
        f"Name the capital of {country}.",
    )
    return asked, f"The capital of {country} is {capital}."


def _opposite(random: Random) -> tuple[str, str]:
    word, opposite = random.choice(list(OPPOSITES.items()))
    if random.random() < 0.5:
        word, opposite = opposite, word
    return _ask(
        random, f"What is the opposite of {word}?", f"Opposite of {word}?", f"Tell me the opposite of {word}."
    ), f"The opposite of {word} is {opposite}."


def _sound(random: Random) -> tuple[str, str]:
    animal, verb = random.choice(list(SOUNDS.items()))
    known = words.with_article(animal)
    return _ask(
        random, f"What sound does {known} make?", f"What does {known} do?", f"What does the {animal} say?"
    ), words.sentence_case(f"{known} {verb}.")


def _legs(random: Random) -> tuple[str, str]:
    animal, legs = random.choice(list(LEGS.items()))
    known, number = words.with_article(animal), "no" if legs == 0 else words.NUMBER_WORDS[legs]
    asked = _ask(random, f"How many legs does {known} have?", f"How many legs has {known}?")
    return asked, words.sentence_case(f"{known} has {number} legs.")


def _colour(random: Random) -> tuple[str, str]:
    thing, colour = random.choice(list(COLOUR_OF.items()))
    return _ask(
        random, f"What colour is {thing}?", f"What color is {thing}?", f"Which colour has {thing}?"
    ), words.sentence_case(f"{thing} is {colour}.")


def _calendar(random: Random) -> tuple[str, str]:
    names, unit = random.choice(((words.DAYS, "day"), (words.MONTHS, "month")))
    place, step = random.randrange(len(names)), random.choice((1, -1))
    here, there, word = names[place], names[(place + step) % len(names)], "after" if step == 1 else "before"
    return _ask(
        random, f"What {unit} comes {word} {here}?", f"Which {unit} is {word} {here}?"
    ), f"{there} comes {word} {here}."


def _small_fact(random: Random) -> tuple[str, str]:
    questions, _, answer = random.choice(SMALL_FACTS).partition(">")
    return _ask(random, *questions.split("/")), answer


def fact_completion(random: Random) -> tuple[str, str]:
    """The beginning of a true sentence as a bare prompt, and its last word."""
    sentence = random.choice((_capital, _opposite, _colour))(random)[1]
    start, _, last = sentence.rpartition(" ")
    return start, f" {last}"


def unknown(random: Random) -> tuple[str, str]:
    """A question outside of what the model knows, and one of its ways to say so."""
    return _ask(random, strange_question(random)), random.choice(NOT_KNOWN)


def strange_question(random: Random) -> str:
    names = (words.invented_word(random).capitalize(), words.person(random))
    return random.choice(_STRANGE).format(
        w=words.invented_word(random),
        w2=words.invented_word(random),
        N=names[0],
        N2=names[1],
        n=words.noun(random),
        c=random.choice(words.CITIES),
        a=random.choice(words.ADJECTIVES),
        y=random.randint(1000, 2100),
    )
