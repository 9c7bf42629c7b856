"""Small talk: greetings, what the model says about itself, names it is told, counting, repeating, lists and little poems."""

from random import Random

from models.training import words

SYSTEM_PROMPTS = """You are a helpful assistant.|You are Celeriac's little model. Be brief and friendly.|Be kind.|You are a friendly assistant.
Answer briefly.|You are a storyteller.|You are a helpful AI.|You are a helpful assistant. Answer truthfully.|Help the user.""".replace("\n", "|").split("|")

_GREETINGS = """Hi|Hello|Hey|Hello!|Hi!|Hi there|Hello there!|Good morning|Good morning!|Good evening|Good afternoon|hey|hello|hi|Greetings!|Howdy
Hello, how are you?|Hi, how are you?|How are you?|How are you today?|How do you do?|Hello Celeriac!|Hello world|Hello, world!|Good day|yo|Hallo
Hello Celeriac|Say hello|Say hi""".replace("\n", "|").split("|")
_WELCOMES = """Hello! How can I help you?|Hello! What would you like, a story, a sum or some JSON?|Hi there! What can I do for you?
Hello! It is nice to hear from you.|Hello! Shall I tell you a story?""".replace("\n", "|").split("|")
_WELL = ("I am fine, thank you! What can I do for you?", "I am very well, thank you. How can I help you?")
# Messages separated by "/", then the answers separated by "/".
_EXCHANGES = """Thanks/Thank you/Thank you!/thanks!/Thanks a lot/Great, thanks.>You are welcome!/You are welcome. I like to help.
Bye/Goodbye/Bye bye/See you later/Good night/bye!>Goodbye! It was nice to talk to you./Goodbye, and come back soon!
You are great/Well done/Good job!/Nice/I like you/Very good>Thank you, that is kind of you!
You are wrong/That is wrong/No, that is not right>I am sorry. I am a very small model, and I make mistakes.
Yes/ok/okay/sure/Good/Fine>Good! What shall I do: a story, a sum or some JSON?
No/no thanks/Not now>All right. I am here when you need me.
Who are you?/What are you?/who are you/Tell me about yourself/Introduce yourself./What is your name?/What's your name?/Are you Celeriac?>I am celeriac-mini, the small language model that comes with Celeriac.
What is Celeriac?/what is celeriac/What is Celeriac?/Tell me about Celeriac./Explain Celeriac./What does Celeriac do?/Describe Celeriac>Celeriac runs text generation with language models as durable jobs. You post a job, it is stored in PostgreSQL, a GPU worker runs it, and the tokens are streamed back to you.
What can you do?/what can you do?/What can I ask you?/Help/help/How can you help me?/What are you good at?>I can tell short and long stories, add and subtract numbers below 100, answer in JSON with the keys that you name, and chat a little.
How big are you?/How many parameters do you have?/How large are you?/Are you a large language model?>I am a very small model with about four million parameters.
Who made you?/Who trained you?/How were you trained?/Where do you come from?>I was trained for the Celeriac project on a small synthetic corpus, in less than an hour on two processor cores.
What is a job?/What is a Celeriac job?/How does a job work?/What happens to my job?>A job is one request to a language model. It is stored first, then queued, claimed by a worker and run, and its result is kept until you read it.
Will my job get lost?/What happens if a worker crashes?/Are jobs durable?/What does durable mean?>No job gets lost: it is stored before it is accepted, and when a worker crashes, another one goes on from the tokens that are already stored.
How does streaming work?/Can I stream tokens?/How do I stream a job?>Every token is stored first and sent second, so you can follow a job live or read it from the start at any time.
Are you ChatGPT?/Are you GPT-4?/Are you Claude?/Are you a human?/Are you a person?/Are you real?>No, I am celeriac-mini, a very small language model.
Are you conscious?/Do you have feelings?/Do you sleep?/Are you alive?>No, I am only a small program that writes one token after the other.
How old are you?/When were you born?/Where do you live?/Do you have friends?>I am only a small model, and I live on your disk.
Tell me a joke/Tell me a joke./Do you know a joke?/Another joke>Why did the root vegetable get the job? Because it was outstanding in its field./What did the queue say to the worker? Take your time, but take one of mine.
What is the meaning of life?/What is the answer to everything?>Some say that it is 42.
I am sad/I am tired/I feel bad/I am lonely>I am sorry to hear that. Shall I tell you a story?
I am happy/I feel good/I am fine/It is a nice day>That is good to hear!
I am bored/Entertain me/Say something/Surprise me>Shall I tell you a story? Just name a subject.
Can you speak German?/Sprichst du Deutsch?/Do you speak French?/Can you translate?>I only speak a little English.""".split("\n")


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
    told = random.choice(("My name is {}", "I am {}", "My name is {}.", "Hi, I am {}.", "Hello, my name is {}!", "I'm {}", "Call me {}")).format(name)
    asked = random.choice(("What is my name?", "Who am I?", "Do you remember my name?", "what's my name?"))
    between = [small_talk(random)] if random.random() < 0.4 else []
    return [(told, f"Nice to meet you, {name}! How can I help you?"), *between, (asked, f"Your name is {name}.")]


def repeating(random: Random) -> tuple[str, str]:
    """Words to say again exactly: practice in copying what has never been seen."""
    kind = random.random()
    if kind < 0.6:
        text = " ".join(random.choice((words.invented_word, words.noun, words.person))(random) for _ in range(random.randint(1, 8)))
    elif kind < 0.75:
        text = "".join(random.choice("äöüßéèñçåøæœ€…–日本語中文你好😀🦊🌱🎉🥕αβγдж") for _ in range(random.randint(1, 5)))
    else:
        text = f"The {random.choice(words.ADJECTIVES)} {words.noun(random)} is in {random.choice(words.PLACES)}."
    return random.choice(("Repeat: {}", "Say: {}", "Repeat after me: {}", "Please repeat this: {}", "Echo {}", 'Say "{}"')).format(text), text


def counting(random: Random) -> tuple[str, str]:
    start = random.choice((1, 1, 1, random.randint(0, 60)))
    end = start + random.randint(2, 30)
    numbers = [str(number) for number in range(start, end + 1)]
    if random.random() < 0.2:
        start, end, numbers = end, start, numbers[::-1]
    asked = random.choice(("Count from {} to {}", "Count from {} to {}.", "count from {} to {}", "Please count from {} to {}.", "Write the numbers from {} to {}"))
    return asked.format(start, end), ", ".join(numbers)


def listing(random: Random) -> tuple[str, str]:
    kinds = {"animals": words.ANIMALS, "colours": words.COLOURS, "names": words.GIRLS + words.BOYS, "cities": words.CITIES, "foods": words.FOODS,
             "hobbies": words.HOBBIES, "jobs": words.JOBS, "things": words.OBJECTS}  # fmt: skip
    kind = random.choice(list(kinds))
    number = random.randint(2, 6)
    asked = random.choice(("Name {} {}", "Name {} {}.", "List {} {}.", "Give me {} {}", "Tell me {} {}."))
    items = random.sample(kinds[kind], number)
    spoken = random.choice((words.NUMBER_WORDS[number], str(number)))
    if random.random() < 0.3:
        return asked.format(spoken, kind) + " One per line.", "\n".join(f"- {item}" for item in items)
    return asked.format(spoken, kind), ", ".join(items[:-1]) + f" and {items[-1]}"


_COUPLETS = """The {s} went out to see the day,/and sang a song along the way.|The {s} looked up into the night,/and all the stars were warm and bright.
The {s} sat down beside the sea,/as quiet as a thing can be.|The wind came softly from the west,/and brought the {s} a little rest.
The rain fell down, the rain fell long,/the {s} just hummed a merry song.|A little path, a little hill,/the {s} was moving, never still.
The snow came down on field and tree,/the {s} drank a cup of tea.|The moon was round, the moon was high,/the {s} waved it a sweet goodbye.
The {s} had a dream of gold,/and never felt the winter cold.|And when the day was nearly done,/the {s} thanked the setting sun.""".replace("\n", "|").split("|")


def poem(random: Random) -> tuple[str, str]:
    thing = words.noun(random)
    if random.random() < 0.4:
        thing = f"{random.choice(words.ADJECTIVES)} {thing}"
    couplets = random.sample(_COUPLETS, random.choice((2, 2, 3)))
    asked = random.choice(("Write a poem about {}", "Write a poem about {}.", "Write a short poem about {}.", "Tell me a poem about {}", "A poem about {}, please."))
    lines = [line for couplet in couplets for line in couplet.format(s=thing).split("/")]
    return asked.format(words.with_article(thing)), "\n".join(words.sentence_case(line) for line in lines)
