"""Measures celeriac-mini on held-out data and writes the figures to `evaluation.json` and into the model card.

`python -m models.training.evaluate` takes a few minutes on two cores. Sums are of pairs that no training text shows;
the other prompts are drawn with a seed of their own, so their invented words, names and keys are new to the model.
"""

import argparse
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from rich.progress import track
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from models.training import arithmetic, facts, stories, structured, talk, texts
from models.training.tokenizer import MODEL_DIRECTORY

SEED = 20_000_003
MAX_NEW_TOKENS = 600
ROWS_AT_ONCE = 96
GREETINGS = texts.lines("evaluation", "greetings")
SUBJECTS = texts.lines("evaluation", "subjects")
FIGURES = re.compile(r"(?<=<!-- figures -->\n).*(?=<!-- end of figures -->)", re.DOTALL)


@dataclass(frozen=True)
class Answer:
    prompt: str
    text: str
    num_tokens: int
    has_stopped: bool


@dataclass(frozen=True)
class Student:
    """The model under test, with its tokenizer padding on the left as batched generation needs it."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @classmethod
    def load(cls, directory: Path, dtype: torch.dtype) -> "Student":
        tokenizer = AutoTokenizer.from_pretrained(directory, padding_side="left")
        return cls(AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval(), tokenizer)

    def chat_prompt(self, question: str) -> str:
        messages = [{"role": "user", "content": question}]
        return str(self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))

    def answers(self, prompts: Sequence[str], what: str, temperature: float = 0.0) -> list[Answer]:
        """One answer for each prompt, greedy at temperature 0."""
        starts = track(range(0, len(prompts), ROWS_AT_ONCE), description=f"{what:24}")
        return [
            answer for start in starts for answer in self.generate(prompts[start : start + ROWS_AT_ONCE], temperature)
        ]

    def generate(self, prompts: Sequence[str], temperature: float) -> Iterator[Answer]:
        inputs = self.tokenizer(list(prompts), return_tensors="pt", padding=True, return_token_type_ids=False)
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
        with torch.inference_mode():
            outputs = self.model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, **sampling)
        end_id = self.tokenizer.eos_token_id
        for prompt, token_ids in zip(prompts, outputs[:, inputs["input_ids"].shape[1] :].tolist(), strict=True):
            has_stopped = end_id in token_ids
            own_ids = token_ids[: token_ids.index(end_id)] if has_stopped else token_ids
            yield Answer(prompt, self.tokenizer.decode(own_ids), len(own_ids), has_stopped)


def share(flags: Sequence[bool]) -> float:
    return round(sum(flags) / len(flags), 4)


def measure_arithmetic(student: Student, random: Random) -> dict[str, float]:
    """Every held-out pair of two-digit numbers, asked once in chat (any phrasing) and once as a bare prompt."""
    problems = arithmetic.held_out_problems()
    asked = [arithmetic.question(random, problem) for problem in problems]
    chats = student.answers([student.chat_prompt(question) for question, _ in asked], "sums in chat")
    begun = [arithmetic.completion(random, problem) for problem in problems]
    bares = student.answers([prompt for prompt, _ in begun], "sums as bare prompts")
    is_right = [answer.text == expected for answer, (_, expected) in zip(chats, asked, strict=True)]
    is_right_bare = [answer.text == expected for answer, (_, expected) in zip(bares, begun, strict=True)]
    figures: dict[str, float] = {"held_out_problems": len(problems)}
    for name, operator in (("addition", "+"), ("subtraction", "-")):
        rows = [number for number, problem in enumerate(problems) if problem.operator == operator]
        figures[f"{name}_chat"] = share([is_right[row] for row in rows])
        figures[f"{name}_bare_prompt"] = share([is_right_bare[row] for row in rows])
    return figures


def parsed(text: str) -> dict[str, object] | None:
    try:
        document = json.loads(text)
    except json.JSONDecodeError:
        return None
    return document if isinstance(document, dict) else None


def measure_json(student: Student, random: Random, count: int) -> dict[str, float]:
    """Validity and keys over extraction and invention; values where the prompt determines them."""
    extractions = [structured.extraction(random) for _ in range(count)]
    inventions = [structured.invention(random) for _ in range(count)]
    asked = extractions + inventions
    answers = student.answers([student.chat_prompt(question) for question, _ in asked], "JSON")
    documents = [parsed(answer.text) for answer in answers]
    expected = [json.loads(text) for _, text in asked]
    pairs = list(zip(documents, expected, strict=True))
    return {
        "valid_json": share([document is not None for document in documents]),
        "exact_keys": share([document is not None and list(document) == list(wanted) for document, wanted in pairs]),
        "extracted_values": share([document == wanted for document, wanted in pairs[:count]]),
    }


def subject_words(subject: str) -> str:
    """What of a subject a story must say: without article, and without what follows who, called or and."""
    return re.split(r" (?:who|called|named|and) ", re.sub(r"^(?:an?|the) ", "", subject))[0].lower()


def measure_stories(student: Student, random: Random) -> dict[str, float]:
    subjects = SUBJECTS + [stories.subject(random).asked for _ in range(60)]
    short = student.answers(
        [student.chat_prompt(f"Tell me a story about {subject}") for subject in subjects], "short stories"
    )
    long = student.answers(
        [student.chat_prompt(f"Tell me a long story about {subject}") for subject in subjects], "long stories"
    )
    warm = student.answers([student.chat_prompt("Tell me a story about a fox")] * 40, "at temperature 0.8", 0.8)
    begun = student.answers(
        ["Once upon a time", "Once upon a time there was a", "In a small village", "There once was"], "beginnings"
    )
    sentences = [len(re.findall(r"[.!?](?:\s|$)", answer.text)) for answer in short]
    mentioned = [
        subject_words(subject) in answer.text.lower()
        for subject, answer in zip(subjects * 2, short + long, strict=True)
    ]
    return {
        "subject_mentioned": share(mentioned),
        "short_story_has_4_to_10_sentences": share([4 <= count <= 10 for count in sentences]),
        "short_story_mean_tokens": round(sum(answer.num_tokens for answer in short) / len(short), 1),
        "long_story_mean_tokens": round(sum(answer.num_tokens for answer in long) / len(long), 1),
        "stops_by_itself": share([answer.has_stopped for answer in short + long + warm + begun]),
        "distinct_of_40_at_temperature_0.8": len({answer.text for answer in warm}),
    }


def measure_talk(student: Student, random: Random, count: int) -> dict[str, float]:
    """Greetings, facts, refusals where nothing is known, and an end to every answer even at temperature 1."""
    greeted = student.answers([student.chat_prompt(greeting) for greeting in GREETINGS], "greetings")
    known = [facts.fact(random) for _ in range(count)]
    unknown = [facts.unknown(random)[0] for _ in range(count)]
    told = student.answers([student.chat_prompt(question) for question, _ in known], "facts")
    refused = student.answers([student.chat_prompt(question) for question in unknown], "unknown things")
    spoken = [talk.counting(random) for _ in range(count // 2)] + [talk.repeating(random) for _ in range(count // 2)]
    said = student.answers([student.chat_prompt(question) for question, _ in spoken], "counting and repeating")
    is_same = [answer.text == expected for answer, (_, expected) in zip(said, spoken, strict=True)]
    hot = student.answers([student.chat_prompt(question) for question in unknown], "at temperature 1", 1.0)
    return {
        "greets": share([answer.text.startswith(("Hello", "Hi", "I am fine", "I am very well")) for answer in greeted]),
        "facts": share([answer.text == expected for answer, (_, expected) in zip(told, known, strict=True)]),
        "says_that_it_does_not_know": share([answer.text in facts.NOT_KNOWN for answer in refused]),
        "counts_from_one_number_to_another": share(is_same[: count // 2]),
        "repeats_exactly": share(is_same[count // 2 :]),
        "answers_stop_by_themselves": share([answer.has_stopped for answer in greeted + told + refused + said + hot]),
    }


def table(figures: dict[str, dict[str, float]]) -> str:
    lines = ["| what | figure |", "|---|---|"]
    for group, values in figures.items():
        for name, value in values.items():
            shown = f"{value:.1%}" if isinstance(value, float) and value <= 1 else f"{value:,}"
            lines.append(f"| {group}: {name.replace('_', ' ')} | {shown} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--directory", type=Path, default=MODEL_DIRECTORY)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--count", type=int, default=200, help="JSON prompts of each sort, facts and unknown questions")
    parser.add_argument(
        "--no-write", action="store_true", help="print the figures and leave evaluation.json and the card alone"
    )
    options = parser.parse_args()
    torch.manual_seed(SEED)
    random = Random(SEED)
    student = Student.load(options.directory, getattr(torch, options.dtype))
    figures = {
        "arithmetic": measure_arithmetic(student, random),
        "JSON": measure_json(student, random, options.count),
        "stories": measure_stories(student, random),
        "talk": measure_talk(student, random, options.count),
    }
    print(table(figures))
    if options.no_write:
        return
    (options.directory / "evaluation.json").write_text(json.dumps(figures, indent=2) + "\n")
    card = options.directory / "README.md"
    if card.exists():
        card.write_text(FIGURES.sub(lambda _: table(figures), card.read_text()))


if __name__ == "__main__":
    main()
