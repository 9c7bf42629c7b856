"""The vocabulary of the synthetic corpus, and a generator of words that nobody has seen before."""

from random import Random

GIRLS = """Mia Anna Lena Nora Zoë Ida Ruth Clara Alice Emma Lucy Rosa Maya Iris Ella Hazel Ada Grace Tess Olga Freya Nina Vera Lily
Maria Sofia Julia Eva Amira Priya Yuki Wanda Chloé Bea""".split()
BOYS = """Tom Ben Leo Max Finn Oscar Sam Hugo Jonas Paul Otto Emil Noah Adam Kofi Omar Ivan Søren Luis Marco Felix Theo Henry Jack
Ravi Kenji David Peter Milo Arthur José Karl Nils Rory""".split()
PET_NAMES = """Pip Bramble Pepper Clover Biscuit Juniper Moss Rusty Pebble Maple Ember Fern Willow Button Dusty Ginger Hazelnut Poppy
Sunny Pumpkin Nutmeg Tumble Whisker Acorn Bean Thistle Marble Cricket Snowdrop Olive""".split()

ANIMALS = """fox bear rabbit mouse owl hedgehog wolf cat dog duck frog turtle squirrel badger otter deer goat sheep pig cow horse
donkey hen crow raven sparrow robin penguin seal whale dolphin octopus crab snail bee ant spider butterfly beetle lion tiger elephant
monkey giraffe zebra camel kangaroo koala panda sloth parrot peacock swan goose heron beaver mole bat moth lizard crocodile snake hamster
kitten puppy lamb foal pony dragonfly firefly walrus moose reindeer""".split()
BEINGS = """dragon giant robot witch wizard king queen princess prince knight pirate sailor baker farmer tailor painter gardener
fisherman shepherd miller clockmaker librarian astronaut inventor teacher doctor musician ghost elf dwarf mermaid unicorn troll fairy
snowman scarecrow child boy girl grandmother grandfather lighthouse-keeper postman chimney-sweep carpenter beekeeper explorer cook""".split()
OBJECTS = """teapot lantern kite clock umbrella boat train bicycle piano violin candle mirror spoon shoe hat button pencil book map key
bell drum wheel ladder basket bottle blanket pillow chair table kettle cup snowflake cloud star moon river mountain tree leaf acorn
pumpkin potato apple carrot mushroom flower rose sunflower stone feather balloon windmill lighthouse castle bridge tower train computer
server telescope compass raindrop turnip celeriac""".split()
ADJECTIVES = """brave little tiny old young shy clever lonely curious gentle proud sleepy hungry clumsy kind quiet cheerful grumpy
lazy noisy forgetful patient small big tired lost golden silver blue red green purple wooden rusty happy sad invisible famous
polite careful wise""".split()
WHO_CLAUSES = """could not sleep|wanted to fly|was afraid of the dark|loved to sing|collected stars|lost a hat|never said sorry
lived on the moon|dreamed of the sea|could talk to trees|had no friends|baked bread every night|was always late|wanted to be a king
learned to swim|painted the sky|forgot everything|could not stop laughing|found a secret door|had never seen snow""".replace("\n", "|").split("|")
TOPICS = """friendship|courage|the sea|the moon|dragons|pirates|robots|winter|spring|snow|music|space|trains|magic|cats|dogs|kindness
a rainy day|the first day of school|time travel|honesty|chess|bread|the stars|autumn leaves|wild horses|volcanoes|dinosaurs|mountains
football|patience|lost treasure|the wind|home|summer holidays|gardening|computers|queues|a birthday party|two brothers|three sisters
two old friends|hope|colours|a long journey|the desert|the north wind|small things|sharing|thunder""".replace("\n", "|").split("|")

PLACES = """a forest|a small village|a quiet valley|a big city|a castle|an old lighthouse|a harbour town|a snowy mountain village|a garden
a stable|a library|a little house by the sea|a cave behind a waterfall|a hollow tree|a deep well|a market town|a windmill|a space station
a train station|a kitchen|a wooden hut|a green meadow|a swamp|a tall tower|a school|an old barn|a bakery|a quiet bay|a jungle
a toy shop|a museum|a submarine""".replace("\n", "|").split("|")
COLOURS = "red blue green yellow orange purple pink black white brown grey silver golden turquoise violet".split()
FRUITS = "apples pears plums cherries oranges lemons berries nuts eggs carrots cookies pancakes marbles stamps coins shells buttons books".split()
CITIES = """Berlin Paris London Rome Madrid Oslo Vienna Prague Lisbon Dublin Athens Warsaw Tokyo Cairo Lima Boston Hamburg Lyon Leeds
Porto Kyoto Nairobi Quito Bergen Turin""".split()
JOBS = """baker teacher nurse farmer painter pilot singer cook doctor gardener engineer tailor sailor writer librarian carpenter
dentist driver actor plumber""".split()
HOBBIES = "chess swimming reading cooking dancing painting hiking singing fishing football gardening sailing knitting tennis running".split()
FOODS = "pizza soup bread rice pasta salad cheese cake curry pancakes porridge sushi stew pie noodles celeriac".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = "January February March April May June July August September October November December".split()
NUMBER_WORDS = "zero one two three four five six seven eight nine ten eleven twelve".split()

_ONSETS = "b br c ch cl d dr f fl g gl gr h j k kl l m n p pl pr qu r s sh sk sl sn st t th tr v w wh y z zw".split()
_VOWELS = "a e i o u ai ea ee oo ou ie a e i o u a e i o u".split()
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
    return f"{'an' if phrase[0].lower() in 'aeiou' else 'a'} {phrase}"


def sentence_case(text: str) -> str:
    return text[:1].upper() + text[1:]
