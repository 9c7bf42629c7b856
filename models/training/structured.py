"""Questions that name JSON keys, and answers that are one JSON object with exactly those keys."""

import json
from collections.abc import Callable
from random import Random

from models.training import arithmetic, facts, texts, words

Maker = Callable[[Random], object]

_STATUSES = ("open", "closed", "new", "done", "waiting")
_SIZES = ("small", "medium", "large", "tiny", "huge")
_FEELINGS = ("happy", "sad", "angry", "calm", "excited", "tired")
_TITLES = ("The Lost {}", "The Little {}", "A Song for the {}", "The {} and the Sea", "My Friend the {}")

MAKERS: dict[str, Maker] = {
    "name": words.person,
    "first_name": words.person,
    "friend": words.person,
    "author": words.person,
    "owner": words.person,
    "user": words.person,
    "username": lambda r: words.person(r).lower(),
    "hero": words.person,
    "last_name": words.person,
    "age": lambda r: r.randint(1, 99),
    "year": lambda r: r.randint(1900, 2030),
    "price": lambda r: r.randint(1, 99),
    "count": lambda r: r.randint(0, 50),
    "legs": lambda r: r.choice((2, 4, 6, 8)),
    "score": lambda r: r.randint(0, 10),
    "id": lambda r: r.randint(1, 999),
    "number": lambda r: r.randint(1, 99),
    "pages": lambda r: r.randint(20, 400),
    "rating": lambda r: r.randint(1, 5),
    "height": lambda r: r.randint(10, 200),
    "weight": lambda r: r.randint(1, 90),
    "quantity": lambda r: r.randint(1, 20),
    "temperature": lambda r: r.randint(-10, 35),
    "population": lambda r: r.randint(100, 9999),
    "colour": lambda r: r.choice(words.COLOURS),
    "color": lambda r: r.choice(words.COLOURS),
    "city": words.city,
    "country": lambda r: r.choice(("Germany", "France", "Norway", "Italy", "Japan", "Peru", "Kenya", "Canada")),
    "town": words.city,
    "animal": lambda r: r.choice(words.ANIMALS),
    "pet": lambda r: r.choice(words.ANIMALS),
    "job": lambda r: r.choice(words.JOBS),
    "hobby": lambda r: r.choice(words.HOBBIES),
    "food": lambda r: r.choice(words.FOODS),
    "day": lambda r: r.choice(words.DAYS),
    "month": lambda r: r.choice(words.MONTHS),
    "size": lambda r: r.choice(_SIZES),
    "mood": lambda r: r.choice(_FEELINGS),
    "weather": lambda r: r.choice(("sunny", "rainy", "windy", "cloudy", "snowy")),
    "status": lambda r: r.choice(_STATUSES),
    "title": lambda r: r.choice(_TITLES).format(words.noun(r).capitalize()),
    "subject": words.noun,
    "type": words.noun,
    "item": words.noun,
    "happy": lambda r: r.random() < 0.5,
    "active": lambda r: r.random() < 0.5,
    "married": lambda r: r.random() < 0.5,
    "tags": lambda r: r.sample(words.OBJECTS, r.randint(1, 3)),
    "colours": lambda r: r.sample(words.COLOURS, 2),
    "hobbies": lambda r: r.sample(words.HOBBIES, 2),
    "answer": lambda r: r.choice(("yes", "no")),
    "email": lambda r: f"{words.invented_word(r)}@example.com",
    "place": lambda r: r.choice(words.PLACES),
    "language": lambda r: r.choice(("English", "German", "French", "Spanish", "Python")),
    "sentiment": lambda r: r.choice(("positive", "negative", "neutral")),
}

# What a sentence about a person can say, with the key that asks for it.
FACTS_OF_PERSON: dict[str, tuple[str, ...]] = {
    "age": ("is {} years old", "turned {} today"),
    "colour": ("likes the colour {}", "has a {} bicycle", "always wears a {} hat"),
    "color": ("likes the color {}", "drives a {} car"),
    "city": ("lives in {}", "comes from {}", "moved to {} last year"),
    "job": ("works as a {}", "is a {}", "wants to be a {}"),
    "hobby": ("loves {}", "enjoys {} very much"),
    "food": ("likes to eat {}", "cooks {} every evening"),
    "pet": ("has a pet {}", "owns a {}"),
    "friend": ("is a friend of {}", "often meets {}"),
    "day": ("is at home on {}", "rests every {}"),
}

_ASK = texts.lines("structured", "requests")
_ABOUT = texts.lines("structured", "requests about something")


def key_list(random: Random, keys: list[str]) -> str:
    """The keys as prompts write them: quoted or bare, joined by commas and mostly a last "and"."""
    quote = random.choice(('"', '"', '"', "'", "`", ""))
    quoted = [f"{quote}{key}{quote}" for key in keys]
    if len(quoted) == 1 or random.random() < 0.3:
        return ", ".join(quoted)
    return ", ".join(quoted[:-1]) + " and " + quoted[-1]


def _unknown_key(random: Random) -> str:
    key = words.invented_word(random)
    if random.random() < 0.3:
        return f"{random.choice(words.ADJECTIVES)}_{key}"
    return random.choice((key, random.choice(words.OBJECTS + words.ANIMALS)))


def _value(random: Random, key: str) -> object:
    """A value of the key's own kind; for a key without one, a plain word."""
    maker = MAKERS.get(key)
    return maker(random) if maker else random.choice(words.ADJECTIVES)


def _dump(document: dict[str, object]) -> str:
    return json.dumps(document, ensure_ascii=False)


def extraction(random: Random) -> tuple[str, str]:
    """A sentence about somebody, and the named keys read from it; what it does not say is null."""
    keys = random.sample(list(FACTS_OF_PERSON), random.randint(1, 4))
    document: dict[str, object] = {"name": words.person(random)}
    clauses = []
    for key in keys:
        document[key] = MAKERS[key](random)
        clauses.append(random.choice(FACTS_OF_PERSON[key]).format(document[key]))
    random.shuffle(clauses)
    sentence = (
        f"{document['name']} " + (", ".join(clauses[:-1]) + " and " if len(clauses) > 1 else "") + clauses[-1] + "."
    )
    if random.random() < 0.15:
        document[random.choice([key for key in FACTS_OF_PERSON if key not in document])] = None
    asked = random.sample(list(document), random.randint(1, len(document)))
    request = random.choice(_ASK).format(k=key_list(random, asked))
    prompt = f"{request}: {sentence}" if random.random() < 0.6 else f"{sentence} {request}."
    return prompt, _dump({key: document[key] for key in asked})


def invention(random: Random) -> tuple[str, str]:
    """Keys to fill freely, known and unheard-of ones mixed, sometimes about a given subject."""
    pool = random.sample(list(MAKERS), random.randint(1, 5))
    keys = list(dict.fromkeys(_unknown_key(random) if random.random() < 0.3 else key for key in pool))
    document = {key: _value(random, key) for key in keys}
    if random.random() < 0.5:
        return random.choice(_ASK).format(k=key_list(random, keys)) + ".", _dump(document)
    thing = words.noun(random)
    document |= {key: thing for key in ("subject", "type", "animal") if key in document}
    return random.choice(_ABOUT).format(s=words.with_article(thing), k=key_list(random, keys)), _dump(document)


def answering(random: Random) -> tuple[str, str]:
    """A sum or a fact, asked for as JSON: the answer alone or beside the question."""
    answer: object
    if random.random() < 0.6:
        problem = arithmetic.training_problem(random)
        question, answer = f"{problem.left} {problem.operator} {problem.right}", problem.result
        asked = random.choice((question, f"What is {question}?"))
    else:
        question, answer = facts.fact(random)
        asked = question
    answer_key = random.choice(("answer", "result", "output", "solution"))
    document = {answer_key: answer}
    if random.random() < 0.5:
        document[random.choice(("question", "task", "input"))] = question
    keys = random.sample(list(document), len(document))
    request = random.choice(_ASK).format(k=key_list(random, keys))
    prompt = f"{request}: {asked}" if random.random() < 0.7 else f"{asked} {request}."
    return prompt, _dump({key: document[key] for key in keys})


def request(random: Random) -> tuple[str, str]:
    (maker,) = random.choices((extraction, invention, answering), weights=(55, 32, 13))
    return maker(random)


def system_request(random: Random) -> tuple[str, str, str]:
    """The keys in the system prompt and the sentence in the user's: (system, user, assistant)."""
    keys = ["name", *random.sample(list(FACTS_OF_PERSON), random.randint(1, 3))]
    document = {key: MAKERS[key](random) for key in keys}
    clauses = [random.choice(FACTS_OF_PERSON[key]).format(document[key]) for key in keys[1:]]
    system = random.choice(_ASK).format(k=key_list(random, keys)) + "."
    return system, f"{document['name']} " + " and ".join(clauses) + ".", _dump(document)
