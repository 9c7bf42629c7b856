"""Small talk: greetings, what the model is, names it is told, counting, repeating, lists and little poems."""

from random import Random

from models.training import texts, words

SYSTEM_PROMPTS = texts.lines("talk", "system prompts")
_GREETINGS = texts.lines("talk", "greetings")
_WELCOMES = texts.lines("talk", "welcomes")
_WELL = texts.lines("talk", "well")
_EXCHANGES = texts.lines("talk", "exchanges")


def small_talk(random: Random) -> tuple[str, str]:
    if random.random() < 0.3:
        asked = random.choice(_GREETINGS)
        return asked, random.choice(_WELL if "how" in asked.lower().split(" do")[0].replace("howdy", "") else _WELCOMES)
    questions, _, answers = random.choice(_EXCHANGES).partition(">")
    asked = random.choice(questions.split("/"))
    if random.random() < 0.15:
        asked = asked.lower()
    return asked, random.choice(answers.split("/"))


def introduction(random: Random) -> list[tuple[str, str]]:
    """Two or more exchanges: the user says a name, and asks for it again later."""
    name = words.person(random)
    told = random.choice(
        ("My name is {}", "I am {}", "My name is {}.", "Hi, I am {}.", "Hello, my name is {}!", "I'm {}", "Call me {}")
    ).format(name)
    asked = random.choice(("What is my name?", "Who am I?", "Do you remember my name?", "what's my name?"))
    between = [small_talk(random)] if random.random() < 0.4 else []
    return [(told, f"Nice to meet you, {name}! How can I help you?"), *between, (asked, f"Your name is {name}.")]


def repeating(random: Random) -> tuple[str, str]:
    """Words to say again exactly: practice in copying what has never been seen."""
    kind = random.random()
    if kind < 0.6:
        text = " ".join(
            random.choice((words.invented_word, words.noun, words.person))(random) for _ in range(random.randint(1, 8))
        )
    elif kind < 0.75:
        text = "".join(
            random.choice("äöüßéèñçåøæœ€…–日本語中文你好😀🦊🌱🎉🥕αβγдж") for _ in range(random.randint(1, 5))
        )
    else:
        text = f"The {random.choice(words.ADJECTIVES)} {words.noun(random)} is in {random.choice(words.PLACES)}."
    return random.choice(
        ("Repeat: {}", "Say: {}", "Repeat after me: {}", "Please repeat this: {}", "Echo {}", 'Say "{}"')
    ).format(text), text


def copying_drill(random: Random) -> tuple[str, str]:
    """A long string of unrelated words: a model that has to say it again learns to copy early."""
    count = random.randint(4, 30)
    text = " ".join(random.choice((words.invented_word, words.noun, words.person))(random) for _ in range(count))
    return random.choice(("Repeat: {}", "Say: {}", "Repeat after me: {}", "Echo {}")).format(text), text


def counting(random: Random) -> tuple[str, str]:
    start = random.choice((1, 1, 1, random.randint(0, 60)))
    end = start + random.randint(2, 30 if random.random() < 0.9 else 60)
    numbers = [str(number) for number in range(start, end + 1)]
    if random.random() < 0.2:
        start, end, numbers = end, start, numbers[::-1]
    asked = random.choice(
        (
            "Count from {} to {}",
            "Count from {} to {}.",
            "count from {} to {}",
            "Please count from {} to {}.",
            "Write the numbers from {} to {}",
        )
    )
    return asked.format(start, end), ", ".join(numbers)


def listing(random: Random) -> tuple[str, str]:
    kinds = {
        "animals": words.ANIMALS,
        "colours": words.COLOURS,
        "names": words.GIRLS + words.BOYS,
        "cities": words.CITIES,
        "foods": words.FOODS,
        "hobbies": words.HOBBIES,
        "jobs": words.JOBS,
        "things": words.OBJECTS,
    }
    kind = random.choice(list(kinds))
    number = random.randint(2, 6)
    asked = random.choice(("Name {} {}", "Name {} {}.", "List {} {}.", "Give me {} {}", "Tell me {} {}."))
    items = random.sample(kinds[kind], number)
    spoken = random.choice((words.NUMBER_WORDS[number], str(number)))
    if random.random() < 0.3:
        return asked.format(spoken, kind) + " One per line.", "\n".join(f"- {item}" for item in items)
    return asked.format(spoken, kind), ", ".join(items[:-1]) + f" and {items[-1]}"


_COUPLETS = texts.lines("talk", "couplets")


def poem(random: Random) -> tuple[str, str]:
    thing = words.noun(random)
    if random.random() < 0.4:
        thing = f"{random.choice(words.ADJECTIVES)} {thing}"
    couplets = random.sample(_COUPLETS, random.choice((2, 2, 3)))
    asked = random.choice(
        (
            "Write a poem about {}",
            "Write a poem about {}.",
            "Write a short poem about {}.",
            "Tell me a poem about {}",
            "A poem about {}, please.",
        )
    )
    lines = [line for couplet in couplets for line in couplet.format(s=thing).split("/")]
    return asked.format(words.with_article(thing)), "\n".join(words.sentence_case(line) for line in lines)
