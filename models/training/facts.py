"""What the model knows: a few dozen small facts, and that it does not know the rest."""

from random import Random

from models.training import words

CAPITALS = {
    "France": "Paris", "Germany": "Berlin", "Italy": "Rome", "Spain": "Madrid", "England": "London", "Norway": "Oslo", "Austria": "Vienna",
    "Portugal": "Lisbon", "Ireland": "Dublin", "Greece": "Athens", "Poland": "Warsaw", "Japan": "Tokyo", "Egypt": "Cairo", "Peru": "Lima",
    "Sweden": "Stockholm", "Denmark": "Copenhagen", "Finland": "Helsinki", "Canada": "Ottawa", "China": "Beijing", "India": "New Delhi",
    "Kenya": "Nairobi", "Cuba": "Havana", "Hungary": "Budapest", "Russia": "Moscow", "Belgium": "Brussels", "Iceland": "Reykjavik",
}  # fmt: skip
OPPOSITES = {
    "hot": "cold", "big": "small", "fast": "slow", "happy": "sad", "day": "night", "up": "down", "left": "right", "old": "young",
    "full": "empty", "hard": "soft", "light": "dark", "open": "closed", "loud": "quiet", "rich": "poor", "early": "late", "wet": "dry",
    "strong": "weak", "high": "low", "long": "short", "good": "bad", "first": "last", "true": "false", "yes": "no", "begin": "end",
}  # fmt: skip
SOUNDS = {
    "dog": "barks", "cat": "meows", "cow": "moos", "duck": "quacks", "sheep": "bleats", "lion": "roars", "wolf": "howls", "bee": "buzzes",
    "frog": "croaks", "snake": "hisses", "owl": "hoots", "horse": "neighs", "pig": "grunts", "mouse": "squeaks",
}  # fmt: skip
LEGS = {"dog": 4, "cat": 4, "spider": 8, "ant": 6, "bee": 6, "hen": 2, "horse": 4, "octopus": 0, "snake": 0, "beetle": 6, "crow": 2, "bear": 4}
COLOUR_OF = {
    "the sky": "blue", "grass": "green", "snow": "white", "a banana": "yellow", "blood": "red", "coal": "black", "a carrot": "orange",
    "a ripe tomato": "red", "the sun": "yellow", "milk": "white", "a leaf": "green", "an elephant": "grey",
}  # fmt: skip
# Questions separated by "/", then the answer.
SMALL_FACTS = """How many days are in a week?/How many days does a week have?>A week has seven days.
How many months are in a year?/How many months does a year have?>A year has twelve months.
How many hours are in a day?/How many hours does a day have?>A day has 24 hours.
How many minutes are in an hour?/How many minutes does an hour have?>An hour has 60 minutes.
How many seconds are in a minute?>A minute has 60 seconds.
How many days are in a year?>A year has 365 days, and a leap year has 366.
What do bees make?/What does a bee make?>Bees make honey.
What do cows give?/Where does milk come from?>Cows give milk.
What is water made of?/What is H2O?>Water is made of hydrogen and oxygen.
What is ice?/What is frozen water called?>Ice is frozen water.
At what temperature does water boil?/When does water boil?>Water boils at 100 degrees Celsius.
At what temperature does water freeze?/When does water freeze?>Water freezes at 0 degrees Celsius.
Which planet do we live on?/What planet are we on?>We live on the Earth.
What is the largest planet?/Which planet is the largest?>Jupiter is the largest planet of our sun.
What is the red planet?/Which planet is red?>Mars is called the red planet.
How many planets are there?/How many planets does the sun have?>Eight planets go around the sun.
What goes around the Earth?/What is the moon?>The moon goes around the Earth.
What is the largest animal?/Which animal is the largest?>The blue whale is the largest animal.
What is the tallest animal?/Which animal is the tallest?>The giraffe is the tallest animal.
What is the fastest land animal?/Which land animal is the fastest?>The cheetah is the fastest animal on land.
What is a baby cat called?/What do you call a young cat?>A baby cat is called a kitten.
What is a baby dog called?/What do you call a young dog?>A baby dog is called a puppy.
What is a baby sheep called?/What do you call a young sheep?>A baby sheep is called a lamb.
What is the longest month?/Which months have 31 days?>January, March, May, July, August, October and December have 31 days.
What is the shortest month?/Which month is the shortest?>February is the shortest month.
Who wrote Romeo and Juliet?/Who wrote Hamlet?>William Shakespeare wrote it.
How many letters are in the alphabet?/How many letters does the alphabet have?>The English alphabet has 26 letters.
How many continents are there?>There are seven continents.
What is the largest ocean?/Which ocean is the largest?>The Pacific is the largest ocean.
What is the opposite of celeriac?>I do not think that celeriac has an opposite.
What is celeriac the vegetable?/Is celeriac a vegetable?/What is celeriac soup?>Celeriac is a root vegetable, and it makes a good soup.
What are the primary colours?/What are the primary colors?>The primary colours are red, yellow and blue.
What are the seasons?/Name the four seasons.>The four seasons are spring, summer, autumn and winter.
What is PostgreSQL?/What is Postgres?>PostgreSQL is a relational database. Celeriac keeps its jobs in it.
What is Redis?>Redis is a fast store in memory. Celeriac uses it as a queue and for live events.
What is Celery?/What is celery?>Celery is a task queue for Python. Celeriac runs its jobs with it.
What is Python?>Python is a programming language. Celeriac is written in it.
What is a token?/What are tokens?>A token is a small piece of text. I read and write one token after the other.
What is SQL?>SQL is the language of relational databases.
What is a GPU?>A GPU is a processor that does many sums at once. Language models run fast on it.""".split("\n")

NOT_KNOWN = (
    "I am sorry, I do not know that. I am a very small model.",
    "I do not know that, sorry. I am a very small model.",
    "Sorry, I do not know. Try a story, a sum or some JSON.",
    "That is beyond me, I am afraid. I can tell stories, add, subtract and write JSON.",
)

_STRANGE = """What is {w}?|What is a {w}?|Who was {N}?|Who is {N} {N2}?|Who wrote {N} and the {n}?|When was {N} born?|Where is {N}?|How far is it to {N}?
What is the capital of {N}?|How tall is {N}?|Why do {n}s {w}?|How do I repair a {n}?|What is the meaning of {w}?|What does {w} mean?
Who invented the {n}?|When was the {n} invented?|Translate {w} into French.|How do you say {n} in German?|What is the best {n}?
What will the weather be in {c} tomorrow?|Who won the race in {c}?|What time is it in {c}?|How many people live in {c}?|Explain {w} theory.
What is the population of {N}?|Which {n} is the fastest?|How much does a {n} cost?|Can you fix my {n}?|Is {N} older than {N2}?|Why is the {n} {a}?
How old is the {n}?|What do you think about {w}?|Write a program that prints {w}.|Summarise the book {N}.|What happened in {y}?|Who was king in {y}?
How does a {n} work?|What is the square root of {y}?|Give me a recipe for {n} soup.|Where can I buy a {n}?|What is the news?|Who will win?
{w} {n} {w}|{w}|{w} {w2}|the {n} {w}|{N} {N2} {n}|asdf {w}|What is {N} {n} made of?|Tell me the history of {c}.|What did {N} say?""".replace("\n", "|").split("|")


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
    asked = _ask(random, f"What is the capital of {country}?", f"Capital of {country}?", f"Which city is the capital of {country}?",
                 f"What's the capital of {country}?", f"Name the capital of {country}.")  # fmt: skip
    return asked, f"The capital of {country} is {capital}."


def _opposite(random: Random) -> tuple[str, str]:
    word, opposite = random.choice(list(OPPOSITES.items()))
    if random.random() < 0.5:
        word, opposite = opposite, word
    return _ask(random, f"What is the opposite of {word}?", f"Opposite of {word}?", f"Tell me the opposite of {word}."), f"The opposite of {word} is {opposite}."


def _sound(random: Random) -> tuple[str, str]:
    animal, verb = random.choice(list(SOUNDS.items()))
    known = words.with_article(animal)
    return _ask(random, f"What sound does {known} make?", f"What does {known} do?", f"What does the {animal} say?"), words.sentence_case(f"{known} {verb}.")


def _legs(random: Random) -> tuple[str, str]:
    animal, legs = random.choice(list(LEGS.items()))
    known, number = words.with_article(animal), "no" if legs == 0 else words.NUMBER_WORDS[legs]
    asked = _ask(random, f"How many legs does {known} have?", f"How many legs has {known}?")
    return asked, words.sentence_case(f"{known} has {number} legs.")


def _colour(random: Random) -> tuple[str, str]:
    thing, colour = random.choice(list(COLOUR_OF.items()))
    return _ask(random, f"What colour is {thing}?", f"What color is {thing}?", f"Which colour has {thing}?"), words.sentence_case(f"{thing} is {colour}.")


def _calendar(random: Random) -> tuple[str, str]:
    names, unit = random.choice(((words.DAYS, "day"), (words.MONTHS, "month")))
    place, step = random.randrange(len(names)), random.choice((1, -1))
    here, there, word = names[place], names[(place + step) % len(names)], "after" if step == 1 else "before"
    return _ask(random, f"What {unit} comes {word} {here}?", f"Which {unit} is {word} {here}?"), f"{there} comes {word} {here}."


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
        w=words.invented_word(random), w2=words.invented_word(random), N=names[0], N2=names[1], n=words.noun(random),
        c=random.choice(words.CITIES), a=random.choice(words.ADJECTIVES), y=random.randint(1000, 2100),
    )  # fmt: skip
