"""The vocabulary of the synthetic corpus, and a generator of words that nobody has seen before."""

from random import Random

from models.training import texts

GIRLS = texts.words("words", "girls")
BOYS = texts.words("words", "boys")
PET_NAMES = texts.words("words", "pet_names")
ANIMALS = texts.words("words", "animals")
BEINGS = texts.words("words", "beings")
OBJECTS = texts.words("words", "objects")
ADJECTIVES = texts.words("words", "adjectives")
COLOURS = texts.words("words", "colours")
FRUITS = texts.words("words", "fruits")
CITIES = texts.words("words", "cities")
JOBS = texts.words("words", "jobs")
HOBBIES = texts.words("words", "hobbies")
FOODS = texts.words("words", "foods")
DAYS = texts.words("words", "days")
MONTHS = texts.words("words", "months")
NUMBER_WORDS = texts.words("words", "number_words")
WHO_CLAUSES = texts.lines("stories", "who clauses")
TOPICS = texts.lines("stories", "topics")
PLACES = texts.lines("stories", "places")

_ONSETS = texts.words("words", "onsets")
_VOWELS = texts.words("words", "vowels")
_CODAS = ["", "", "", "b", "ck", "d", "g", "l", "ll", "m", "n", "nd", "ng", "p", "r", "rk", "s", "st", "t", "x", "zz"]


def invented_word(random: Random) -> str:
    """A word of one to three syllables; now and then random letters, so that copying never leans on spelling."""
    if random.random() < 0.1:
        return "".join(random.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(random.randint(3, 8)))
    syllables = random.choice((1, 2, 2, 2, 3))
    return "".join(random.choice(_ONSETS) + random.choice(_VOWELS) + random.choice(_CODAS) for _ in range(syllables))


def person(random: Random) -> str:
    if random.random() < 0.3:
        return invented_word(random).capitalize()
    return random.choice(GIRLS + BOYS)


def city(random: Random) -> str:
    return invented_word(random).capitalize() if random.random() < 0.3 else random.choice(CITIES)


def noun(random: Random) -> str:
    if random.random() < 0.25:
        return invented_word(random)
    return random.choice(random.choice((ANIMALS, BEINGS, OBJECTS)))


def with_article(phrase: str) -> str:
    is_vowel = phrase[0].lower() in "aeiou" and not phrase.startswith("uni")
    return f"{'an' if is_vowel else 'a'} {phrase}"


def sentence_case(text: str) -> str:
    return text[:1].upper() + text[1:]
