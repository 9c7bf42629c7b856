"""Every output of a corpus of JSON schemas is valid as another implementation judges, and most come to their end."""

import json
import random
from typing import Any

import jsonschema
import pytest

from dialects.tools import (
    callable_tool,
)
from domain.structured_output import CallableTool, ToolCalls, ToolDefinition
from gpu_worker.engine_process.frames import AddJob
from tests.engine_driver import EOS_TOKEN_ID, Collected, make_add, make_engine, run
from tests.engine_parts import byte_tokenizer
from tests.schema_corpus import CORPUS
from tests.tool_schema_corpus import BY_GENERATOR, Case

CLOSING = {byte_tokenizer().encode(text).ids[0]: 12.0 for text in '"]}'} | {EOS_TOKEN_ID: 12.0}
MIN_FINISHED = 0.9  # the others are strings, numbers and lists without an end in a model that knows none
SEEDS = 5  # of each tool
CHECKER = jsonschema.Draft202012Validator.FORMAT_CHECKER


def make_job(number: int, **changes: Any) -> AddJob:
    return make_add(
        f"schema{number}",
        [number % 250 + 1, 7],
        structured_output={"json_schema": CORPUS[number]},
        temperature=1.0,
        seed=number,
        max_tokens=200,
        logit_bias=CLOSING,
        **changes,
    )


@pytest.fixture(scope="module")
def collected() -> Collected:
    """Of the whole corpus, run in the company of jobs that follow no grammar."""
    guided = [make_job(number) for number in range(len(CORPUS))]
    company = [make_add(f"company{number}", [number + 1, 3], temperature=1.0, max_tokens=60) for number in range(40)]
    jobs = [job for number, first in enumerate(guided) for job in (first, *company[number : number + 1])]
    return run(make_engine(max_num_seqs=16), jobs)


def test_the_corpus_is_of_two_hundred_different_schemas() -> None:
    assert len(CORPUS) == len({json.dumps(schema) for schema in CORPUS}) == 200


def test_every_output_that_finished_is_valid(collected: Collected) -> None:
    assert not collected.failures
    for number, schema in enumerate(CORPUS):
        finished = collected.sequences[f"schema{number}", 0]
        if finished.finish_reason == "stop":
            value = json.loads(finished.text)
            jsonschema.Draft202012Validator(schema, format_checker=CHECKER).validate(value)


def test_most_outputs_finish(collected: Collected) -> None:
    reasons = [collected.sequences[f"schema{number}", 0].finish_reason for number in range(len(CORPUS))]
    assert reasons.count("stop") >= MIN_FINISHED * len(CORPUS)


def test_outputs_cut_anywhere_and_resumed_are_the_same(collected: Collected) -> None:
    engine, rng = make_engine(max_num_seqs=16), random.Random(11)
    expected = {number: collected.tokens(f"schema{number}") for number in range(0, len(CORPUS), 5)}
    cuts = {number: rng.randrange(len(token_ids)) for number, token_ids in expected.items()}
    jobs = [make_job(number, committed_token_ids=[expected[number][:cut]]) for number, cut in cuts.items()]
    resumed = run(engine, jobs)
    for number, cut in cuts.items():
        assert resumed.tokens(f"schema{number}") == expected[number][cut:]


def tool_of(case: Case) -> CallableTool:
    return callable_tool(ToolDefinition(name="f", parameters=case.schema), place="parameters")


def make_call_job(name: str, case: Case, seed: int) -> AddJob:
    calls = ToolCalls(format="llama3", tools=(tool_of(case),), is_single=True)
    return make_add(
        name,
        [seed % 250 + 1, 7],
        structured_output={"calls": calls.model_dump(mode="json")},
        temperature=1.0,
        seed=seed,
        max_tokens=200,
        logit_bias=CLOSING,
    )


def test_calls_of_what_generators_write_are_valid_and_have_no_other_arguments() -> None:
    """The schema that is judged by here is the closed one; that it is closed, where, and as was asked is tested in
    tests/unit/test_tool_schemas.py."""
    cases = {f"call{number}": case for number, case in enumerate(BY_GENERATOR)}
    jobs = [make_call_job(f"{name}-{seed}", case, seed) for name, case in cases.items() for seed in range(SEEDS)]
    called = run(make_engine(max_num_seqs=16), jobs)
    assert not called.failures
    num_finished = 0
    for name, case in cases.items():
        validator = jsonschema.Draft202012Validator(tool_of(case).arguments)
        declared = set(case.schema.get("properties", {})) or {"name", "bark"}  # of the one that is spread over allOf
        declared |= set(case.schema.get("then", {}).get("properties", {}))
        for seed in range(SEEDS):
            finished = called.sequences[f"{name}-{seed}", 0]
            if finished.finish_reason == "length":
                continue
            num_finished += 1
            call = json.loads(finished.text)
            validator.validate(call["parameters"])
            assert set(call["parameters"]) <= declared, case.name
    assert num_finished >= MIN_FINISHED * len(jobs)
