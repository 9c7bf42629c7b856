"""Random concurrent traces, and the oracle that judges them: each request must get the tokens of its solo run.

A trace is a handful of jobs with mixed parameters that arrive, are cancelled, are moved and resumed, fail, and share
prefixes, on an engine whose cache is either large or so small that they preempt one another.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import msgspec
import torch
from torch import Tensor

from gpu_worker.engine.engine import Engine
from gpu_worker.engine.sampling import sample
from gpu_worker.engine.scheduler import ModelLimits, make_engine_job
from gpu_worker.engine.sequence import Grammars
from gpu_worker.engine_process.frames import AddJob
from tests.engine_driver import (
    EOS_TOKEN_ID,
    VOCAB_SIZE,
    Collected,
    Finished,
    gumbel_noise,
    make_add,
    make_another,
    make_engine,
    num_sequences,
    run,
    step,
    tiny_model,
)
from tests.engine_parts import TOKENIZER

TRAP_TOKEN = 300  # a forward pass with it raises
POISON_TOKEN = 302  # its embedding is infinite
NUM_DISTINCT_JOBS = 40  # each runs alone once, and then in many traces
TIE = 1e-4

ENGINES: tuple[dict[str, Any], ...] = (
    {"kv_cache_tokens": 2048, "max_num_seqs": 16, "max_num_batched_tokens": 256},
    {"kv_cache_tokens": 256, "max_num_seqs": 8, "max_num_batched_tokens": 64},
    {"kv_cache_tokens": 256, "max_num_seqs": 5, "max_num_batched_tokens": 16},
    {"kv_cache_tokens": 320, "max_num_seqs": 12, "max_num_batched_tokens": 24},
)


class TrapSprung(Exception):
    """Raised by a forward pass with the trap token."""


def poisoned_model() -> Any:
    model = tiny_model(seed=5)
    with torch.no_grad():
        model.model.embed_tokens.weight[POISON_TOKEN] = float("inf")
    return model


def trapped(engine: Engine) -> Engine:
    """The engine, with a forward pass that fails whenever the trap token is among the inputs."""
    runner: Any = engine._runner
    forward = runner._model

    def guarded(input_ids: Tensor, **arguments: Any) -> Any:
        if (input_ids == TRAP_TOKEN).any():
            raise TrapSprung
        return forward(input_ids=input_ids, **arguments)

    runner._model = guarded
    return engine


def random_params(rng: random.Random) -> dict[str, Any]:
    params: dict[str, Any] = {"temperature": rng.choice([0.0, 0.0, 0.7, 1.0, 2.0]), "n": rng.choice([1, 1, 1, 2, 3])}
    options: dict[str, list[Any]] = {
        "top_p": [0.5, 0.95],
        "top_k": [1, 5, 300],
        "min_p": [0.05],
        "repetition_penalty": [1.3],
        "presence_penalty": [1.0, -1.0],
        "frequency_penalty": [0.7],
        "min_tokens": [5],
        "ignore_eos": [True],
        "stop": [["a"], ["e", "\n"]],
        "stop_token_ids": [[7, 8, 9, 10, 11]],
        "bad_token_ids": [list(range(40, 120))],
        "logprobs": [0, 4],
        "prompt_logprobs": [0, 3],
        "best_of": [3, 4],
        "logit_bias": [{str(token): rng.uniform(-8, 8) for token in range(1, 200, 3)}],
    }
    return params | {name: rng.choice(values) for name, values in options.items() if rng.random() < 0.2}


def random_jobs(rng: random.Random, num_jobs: int) -> list[AddJob]:
    """Jobs whose prompts often share a prefix. Trap and poison tokens are only in prompts, and these jobs must fail."""
    stems = [[rng.randrange(1, 257) for _ in range(rng.choice([20, 48, 90]))] for _ in range(4)]
    jobs = []
    for number in range(num_jobs):
        stem = rng.choice([*stems, []])
        prompt = stem + [rng.randrange(1, 257) for _ in range(rng.randrange(1, 30))]
        if number % 16 == 5:
            prompt[rng.randrange(len(prompt))] = rng.choice([TRAP_TOKEN, POISON_TOKEN])
        params = {"max_tokens": rng.choice([2, 10, 20, 40, 90]), "seed": rng.randrange(1000), **random_params(rng)}
        if rng.random() < 0.1:
            params |= {"max_tokens": 0, "prompt_logprobs": 2, "n": 1, "best_of": None, "min_tokens": 0}
        # Trap and poison are never drawn, so a job fails at its start or never.
        params["logit_bias"] = {**params.get("logit_bias", {}), str(TRAP_TOKEN): -100.0, str(POISON_TOKEN): -100.0}
        salt = rng.choice(["", "", "another tenant"])
        jobs.append(make_add(str(number), prompt, priority=rng.choice([0, 0, 1]), cache_salt=salt, **params))
    return jobs


@dataclass(slots=True)
class Report:
    num_traces: int = 0
    num_sequences: int = 0
    num_cancelled: int = 0
    num_resumed: int = 0
    num_failed: int = 0
    num_preemptions: int = 0
    num_cached_tokens: int = 0
    num_ties: int = 0
    contaminated: list[str] = field(default_factory=list)


class Oracle:
    """Runs traces on engines that are kept from trace to trace, with their prefix caches. `make` makes these from a
    model and spec changes; solo runs always use the plain engine."""

    def __init__(self, seed: int, make: Callable[..., Engine], num_jobs: int) -> None:
        self._rng = random.Random(seed)
        self._model = poisoned_model()
        self._plain = trapped(make_engine(self._model))
        self._jobs = random_jobs(self._rng, num_jobs)
        judged = poisoned_model()
        self._engines = [trapped(make(judged, **changes)) for changes in ENGINES]
        self._solo: dict[str, Collected] = {}
        self.report = Report()

    def run_trace(self) -> None:
        engine = self._rng.choice(self._engines)
        trace = Trace(engine, self._rng, self._rng.sample(self._jobs, self._rng.randrange(2, 12)), self.report)
        collected = trace.run()
        for command in trace.jobs:
            self._judge(command, collected, is_cancelled=command.job_id in trace.cancelled)
        self.report.num_traces += 1
        self.report.num_preemptions = sum(engine.stats().num_preemptions for engine in self._engines)
        self.report.num_cached_tokens = sum(engine.stats().num_prefix_cache_hits for engine in self._engines)

    def _solo_run(self, command: AddJob) -> Collected:
        """Run each sequence in an engine of its own: no siblings, no cache, no chunks."""
        if command.job_id not in self._solo:
            n = num_sequences(command.params)
            collected = Collected()
            for index in range(n):
                others = [other for other in range(n) if other != index]
                alone = run(
                    make_another(self._plain, max_num_batched_tokens=1024),
                    [msgspec.structs.replace(command, finished_indexes=others)],
                )
                collected.sequences |= alone.sequences
                collected.failures |= alone.failures
            self._solo[command.job_id] = collected
        return self._solo[command.job_id]

    def _judge(self, command: AddJob, collected: Collected, *, is_cancelled: bool) -> None:
        solo = self._solo_run(command)
        if solo.failures:
            self.report.num_failed += 1
            if not is_cancelled and command.job_id not in collected.failures:
                self.report.contaminated.append(f"job {command.job_id} fails alone but not here")
            return
        if command.job_id in collected.failures:
            self.report.contaminated.append(f"job {command.job_id}: {collected.failures[command.job_id].message}")
            return
        if not _has_same_scores(command, collected, solo, is_cancelled=is_cancelled):
            self.report.contaminated.append(f"job {command.job_id}: its prompt's logprobs differ")
        for (job_id, index), expected in solo.sequences.items():
            self.report.num_sequences += 1
            actual = collected.sequences.get((job_id, index), Finished())
            if not _agrees(actual, expected, is_cancelled=is_cancelled):
                self._judge_difference(command, index, actual, expected)

    def _judge_difference(self, command: AddJob, index: int, actual: Finished, expected: Finished) -> None:
        """A difference is a tie if the solo logits of the two tokens are almost equal."""
        pairs = zip(actual.token_ids, expected.token_ids, strict=False)
        position = next((at for at, (one, other) in enumerate(pairs) if one != other), None)
        if position is not None:
            scores = self._solo_scores(command, index, expected.token_ids[:position])
            if abs(scores[actual.token_ids[position]] - scores[expected.token_ids[position]]).item() <= TIE:
                self.report.num_ties += 1
                return
        self.report.contaminated.append(
            f"job {command.job_id}.{index} {command.params}: {actual} differs at {position} from {expected}"
        )

    @torch.inference_mode()
    def _solo_scores(self, command: AddJob, index: int, output: list[int]) -> Tensor:
        """The sum that the draw after `output` maximises: scaled logits and noise, by transformers' forward pass."""
        n = num_sequences(command.params)
        again = msgspec.structs.replace(
            command, finished_indexes=[], committed_token_ids=[output] * n, num_emitted_chars=[0] * n
        )
        limits = ModelLimits(VOCAB_SIZE, 256, frozenset({EOS_TOKEN_ID}))
        grammars = Grammars(TOKENIZER, VOCAB_SIZE, {EOS_TOKEN_ID})
        sequence = make_engine_job(again, limits, TOKENIZER, grammars, arrival=0).sequences[index]
        self._model.set_attn_implementation("eager")
        logits = self._model(input_ids=torch.tensor([sequence.token_ids])).logits[:, -1].clone()
        self._model.set_attn_implementation("celeriac")
        sample(logits.numpy(), [sequence])  # applies bias, penalties and bans in place
        temperature = sequence.job.params.temperature
        scores: Tensor = logits[0]
        if not temperature:
            return scores
        return scores / temperature + gumbel_noise(torch.arange(VOCAB_SIZE, dtype=torch.int32)[None], [sequence])[0]


def _agrees(actual: Finished, expected: Finished, *, is_cancelled: bool) -> bool:
    if is_cancelled and actual.finish_reason in (None, "cancelled"):
        count = len(actual.token_ids)
        return actual.token_ids == expected.token_ids[:count] and expected.text.startswith(
            actual.text[: max(0, len(actual.text) - 8)]
        )
    same = (actual.token_ids, actual.text, actual.finish_reason) == (
        expected.token_ids,
        expected.text,
        expected.finish_reason,
    )
    sums = zip(actual.sum_logprobs, expected.sum_logprobs, strict=True) if same else ()
    return (
        same
        and all(_is_close(a, b) for a, b in zip(actual.logprobs, expected.logprobs, strict=False))
        and all(abs(a - b) <= 1e-3 for a, b in sums)
    )


def _has_same_scores(command: AddJob, collected: Collected, solo: Collected, *, is_cancelled: bool) -> bool:
    actual, expected = collected.prompt_logprobs(command.job_id), solo.prompt_logprobs(command.job_id)
    if expected is None or actual is None:
        return actual is None and (expected is None or is_cancelled)
    return len(actual) == len(command.prompt_token_ids) and all(
        one is None or _is_close(one, other or {}) for one, other in zip(actual, expected, strict=True)
    )


def _is_close(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return bool(one["token_id"] == other["token_id"]) and abs(float(one["logprob"]) - float(other["logprob"])) <= 1e-3


class Trace:
    """One random schedule: which jobs join when, are cancelled, or are removed in mid-text and resumed."""

    def __init__(self, engine: Engine, rng: random.Random, jobs: list[AddJob], report: Report) -> None:
        self.jobs = jobs
        self.cancelled: set[str] = set()
        self._engine = engine
        self._rng = rng
        self._report = report
        self._arriving = sorted(((rng.randrange(25), job) for job in jobs), key=lambda pair: pair[0])
        self._running: dict[str, AddJob] = {}
        self._collected = Collected()

    def run(self) -> Collected:
        time = 0
        while self._arriving or self._engine.has_work:
            while self._arriving and self._arriving[0][0] <= time:
                self._join(self._arriving.pop(0)[1])
            for job in list(self._running.values()):
                self._disturb(job)
            self._collected.take(step(self._engine))
            self._forget_finished()
            time += 1
        return self._collected

    def _join(self, job: AddJob) -> None:
        self._running[job.job_id] = job
        self._engine.add(job)

    def _disturb(self, job: AddJob) -> None:
        chance = self._rng.random()
        if chance < 0.004:
            self.cancelled.add(job.job_id)
            self._report.num_cancelled += 1
            self._engine.abort(job.job_id, job.attempt, "cancelled")
            del self._running[job.job_id]
        elif chance < 0.02:
            self._report.num_resumed += 1
            self._engine.abort(job.job_id, job.attempt, "")
            self._join(self._successor(job))

    def _successor(self, job: AddJob) -> AddJob:
        """The job as another worker would get it: part of the output was committed, the rest is generated again."""
        committed, emitted, finished = [], [], []
        for index in range(num_sequences(job.params)):
            sequence = self._collected.sequences.setdefault((job.job_id, index), Finished())
            if sequence.finish_reason is None and self._rng.random() < 0.5:
                _lose_tail(sequence, self._rng.randrange(0, 4))
            if sequence.finish_reason is not None:
                finished.append(index)
            committed.append(list(sequence.token_ids))
            emitted.append(len(sequence.text))
        return msgspec.structs.replace(
            job,
            attempt=job.attempt + 1,
            committed_token_ids=committed,
            num_emitted_chars=emitted,
            finished_indexes=finished,
            has_prompt_logprobs=self._collected.prompt_logprobs(job.job_id) is not None,
        )

    def _forget_finished(self) -> None:
        for job_id, job in list(self._running.items()):
            indexes = range(num_sequences(job.params))
            ends = [self._collected.sequences.get((job_id, index), Finished()).finish_reason for index in indexes]
            if all(ends) or job_id in self._collected.failures:
                del self._running[job_id]


def _lose_tail(sequence: Finished, num_tokens: int) -> None:
    """Drop the last tokens, and more than their text, so that some text is sent again."""
    if num_tokens:
        del sequence.token_ids[-num_tokens:]
        del sequence.logprobs[-num_tokens:]
        del sequence.sum_logprobs[-num_tokens:]
        sequence.text = sequence.text[: max(0, len(sequence.text) - 4 * num_tokens)]


def run_traces(
    seed: int, num_traces: int, make: Callable[..., Engine] = make_engine, *, num_jobs: int = NUM_DISTINCT_JOBS
) -> Iterator[Report]:
    """Yields the report after each trace."""
    oracle = Oracle(seed, make, num_jobs)
    for _ in range(num_traces):
        oracle.run_trace()
        yield oracle.report
