"""The files of celeriac-mini load with public libraries, and its answers are worth showing."""

import json
import re
from pathlib import Path

import pytest
import torch
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from models.training import arithmetic, corpus
from models.training.evaluate import Answer, Student

DIRECTORY = Path(__file__).parents[2] / "models" / "celeriac-mini"
ANY_TEXT = "Zoë said: 47+38=85 🦊 \x00\t日本 naïve\r\n"


@pytest.fixture(scope="module")
def student() -> Student:
    return Student.load(DIRECTORY, torch.float32)


def ask(student: Student, *questions: str) -> list[Answer]:
    return list(student.generate([student.chat_prompt(question) for question in questions], temperature=0.0))


def test_the_weights_are_a_small_llama_with_tied_embeddings() -> None:
    model = AutoModelForCausalLM.from_pretrained(DIRECTORY)
    assert model.config.model_type == "llama"
    assert model.config.tie_word_embeddings
    assert 3_000_000 <= model.num_parameters() <= 10_000_000
    assert (DIRECTORY / "model.safetensors").stat().st_size <= 20_000_000


def test_every_text_survives_the_tokenizer() -> None:
    bare = Tokenizer.from_file(str(DIRECTORY / "tokenizer.json"))
    loaded = AutoTokenizer.from_pretrained(DIRECTORY)
    assert loaded.decode(loaded.encode(ANY_TEXT)) == ANY_TEXT
    assert bare.encode(ANY_TEXT).ids == loaded.encode(ANY_TEXT)
    assert all(bare.token_to_id(letter) is not None for letter in "0123456789")


def test_numbers_are_read_digit_by_digit() -> None:
    tokens = AutoTokenizer.from_pretrained(DIRECTORY).tokenize("1024")
    assert tokens == ["1", "0", "2", "4"]


def test_the_chat_template_writes_conversations_as_training_saw_them(student: Student) -> None:
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": [{"type": "text", "text": "Bye"}]},
        {"role": "assistant", "content": "Goodbye!"},
    ]
    seen = corpus.chat("talk", [("Hi", "Hello!"), ("Bye", "Goodbye!")], "Be kind.")
    written = "".join(segment.text for segment in seen.segments)
    assert student.tokenizer.apply_chat_template(messages, tokenize=False) == written
    template = json.loads((DIRECTORY / "tokenizer_config.json").read_text())["chat_template"]
    sandboxed = ImmutableSandboxedEnvironment().from_string(template)
    assert sandboxed.render(messages=messages) == written
    assert sandboxed.render(messages=messages[:2], add_generation_prompt=True).endswith("Hi<|end|><|assistant|>")


def test_no_training_text_shows_a_held_out_pair() -> None:
    text = "\n".join(corpus.texts(seed=7, num_samples=3_000))
    shown = re.findall(r"\b(\d+) ?(?:[+-]|plus|minus) ?(\d+)\b", text)
    shown += re.findall(r"(?:[Aa]dd|sum of|[Ss]ubtract|Take) (\d+) (?:and|to|from|away from) (\d+)", text)
    pairs = {(int(left), int(right)) for left, right in shown if int(left) < 100 and int(right) < 100}
    assert len(pairs) > 1_000
    assert not [pair for pair in pairs if arithmetic.is_held_out(*pair)]


def test_it_greets_and_stops(student: Student) -> None:
    (answer,) = ask(student, "Hello!")
    assert answer.text.startswith(("Hello", "Hi"))
    assert answer.has_stopped


def test_it_is_right_about_held_out_sums(student: Student) -> None:
    problems = arithmetic.held_out_problems()[100::400]
    answers = ask(student, *(f"What is {p.left} {p.operator} {p.right}?" for p in problems))
    assert [answer.text for answer in answers] == [arithmetic.equation(problem) for problem in problems]


def test_it_answers_with_the_json_keys_that_the_prompt_names(student: Student) -> None:
    request = 'Answer in JSON with the keys "name", "colour" and "age"'
    (answer,) = ask(student, f"{request}: Mia is 9 years old and likes the colour blue.")
    assert json.loads(answer.text) == {"name": "Mia", "colour": "blue", "age": 9}


def test_a_story_is_about_its_subject_and_ends(student: Student) -> None:
    subjects = ("fox", "brave little teapot", "zorbling gnarp")
    answers = ask(student, *(f"Tell me a story about a {subject}" for subject in subjects))
    for subject, answer in zip(subjects, answers, strict=True):
        assert subject in answer.text.lower()
        assert answer.has_stopped
        assert 50 <= answer.num_tokens <= 250


def test_a_bare_prompt_is_continued(student: Student) -> None:
    (answer,) = student.generate(["Once upon a time"], temperature=0.0)
    assert answer.text.startswith((" ", ","))
    assert answer.has_stopped
