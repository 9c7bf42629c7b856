"""Sums and differences of numbers below 100 in many phrasings, and a held-out set of pairs that none of them shows."""

import zlib
from random import Random
from typing import Literal, NamedTuple

from models.training import texts, words

HELD_OUT_PERCENT = 15

Operator = Literal["+", "-"]


class Problem(NamedTuple):
    left: int
    operator: Operator
    right: int

    @property
    def result(self) -> int:
        return self.left + self.right if self.operator == "+" else self.left - self.right


def is_held_out(left: int, right: int) -> bool:
    """Whether this pair is kept for evaluation; both orders and both operators go the same way."""
    low, high = sorted((left, right))
    return zlib.crc32(f"{low},{high}".encode()) % 100 < HELD_OUT_PERCENT


def training_problem(random: Random) -> Problem:
    while True:
        left, right = random.randint(0, 99), random.randint(0, 99)
        # Numbers below 10 are easy and few: most problems should have two digits on both sides.
        if is_held_out(left, right) or (min(left, right) < 10 and random.random() < 0.4):
            continue
        return Problem(left, random.choice(("+", "-")), right)


def held_out_problems() -> list[Problem]:
    """Every held-out pair of two-digit numbers, with both operators."""
    pairs = [(left, right) for left in range(10, 100) for right in range(10, 100) if is_held_out(left, right)]
    operators: tuple[Operator, Operator] = ("+", "-")
    return [Problem(left, operator, right) for left, right in pairs for operator in operators]


def equation(problem: Problem) -> str:
    return f"{problem.left} {problem.operator} {problem.right} = {problem.result}"


FULL_PHRASINGS = {"+": texts.lines("arithmetic", "addition"), "-": texts.lines("arithmetic", "subtraction")}
SHORT_PHRASINGS = texts.lines("arithmetic", "number only")


def question(random: Random, problem: Problem) -> tuple[str, str]:
    """A chat question and its answer: the full equation, or the bare number where the phrasing asks for it."""
    if random.random() < 0.4:
        template, answer = random.choice(SHORT_PHRASINGS), str(problem.result)
    else:
        template, answer = random.choice(FULL_PHRASINGS[problem.operator]), equation(problem)
    return template.format(a=problem.left, b=problem.right, o=problem.operator), answer


def bare_difference(random: Random) -> tuple[str, str]:
    """A chat question for nothing but the number, and mostly a difference: the hardest of all."""
    problem = training_problem(random)
    if random.random() < 0.6:
        problem = problem._replace(operator="-")
    template = random.choice(SHORT_PHRASINGS)
    return template.format(a=problem.left, b=problem.right, o=problem.operator), str(problem.result)


def completion(random: Random, problem: Problem) -> tuple[str, str]:
    """A bare prompt and its continuation; a space goes before the number where the prompt is spaced."""
    template, separator = random.choice(
        (
            ("{a}{o}{b}=", ""),
            ("{a} {o} {b} =", " "),
            ("Q: What is {a} {o} {b}?\nA:", " "),
            ("The answer to {a} {o} {b} is", " "),
        )
    )
    prompt = template.format(a=problem.left, b=problem.right, o=problem.operator)
    return prompt, f"{separator}{problem.result}"


def exercise_sheet(random: Random) -> tuple[str, str]:
    """Several problems in one question: the cheapest arithmetic practice per token."""
    problems = [training_problem(random) for _ in range(random.randint(2, 10))]
    separator = random.choice((", ", "; ", "\n", " and "))
    asked = separator.join(f"{p.left}{p.operator}{p.right}" for p in problems)
    lead = random.choice(("Solve these: ", "Calculate: ", "What are ", "Please solve ", ""))
    return lead + asked, "\n".join(equation(problem) for problem in problems)


def word_problem(random: Random) -> tuple[str, str]:
    problem = training_problem(random)
    while problem.left < 2 or problem.right < 2 or problem.result < 2:
        problem = training_problem(random)
    name, things = words.person(random), random.choice(words.FRUITS)
    verbs = {"+": ("finds", "buys", "gets", "picks"), "-": ("loses", "sells", "gives away", "uses")}
    more = " more" if problem.operator == "+" else ""
    asked = (
        f"{name} has {problem.left} {things} and {random.choice(verbs[problem.operator])} {problem.right}{more}. "
        f"How many {things} does {name} have now?"
    )
    return asked, f"{equation(problem)}, so {name} has {problem.result} {things}."


def beyond_reach(random: Random) -> tuple[str, str]:
    """Arithmetic that the model does not learn, and a polite refusal."""
    a, b = random.randint(2, 9999), random.randint(2, 99)
    kinds = (
        f"{a} times {b}",
        f"{a} * {b}",
        f"{a} / {b}",
        f"{a} divided by {b}",
        f"{100 + a} + {100 + b}",
        f"{100 + a} - {100 + b}",
    )
    lead = random.choice(("What is ", "Calculate ", "How much is ", ""))
    reply = random.choice(
        ("I can only add and subtract numbers below 100.", "Sorry, I only add and subtract numbers below 100.")
    )
    return lead + random.choice(kinds) + random.choice(("?", "", ".")), reply
