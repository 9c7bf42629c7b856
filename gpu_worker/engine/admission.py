"""From an AddJob frame to sequences: everything that can be checked is checked here, before the job touches a step."""

from collections.abc import Sequence as Rows
from dataclasses import dataclass

from pydantic import ValidationError
from tokenizers import Tokenizer

from domain.errors import ContextLengthExceeded, InvalidRequest
from domain.requests import SamplingParams
from gpu_worker.engine.detokenizer import TextStream
from gpu_worker.engine.grammar import Grammars
from gpu_worker.engine.sequence import EngineJob, Sequence
from gpu_worker.frames import AddJob


@dataclass(frozen=True, slots=True)
class ModelLimits:
    """What a job may ask of the model."""

    vocab_size: int
    max_model_len: int
    eos_token_ids: frozenset[int]


def make_job(
    command: AddJob, limits: ModelLimits, tokenizer: Tokenizer, grammars: Grammars, *, arrival: int
) -> EngineJob:
    """The job with its unfinished sequences, committed tokens replayed. Raises the CeleriacError that fits."""
    try:
        params = SamplingParams.model_validate(command.params)
    except ValidationError as exc:
        raise InvalidRequest(f"the sampling parameters are not valid: {exc}", param="params") from exc
    _check(command, params, limits)
    job = EngineJob(
        id=command.job_id,
        attempt=command.attempt,
        params=params,
        max_tokens=command.max_tokens,
        seed=command.seed,
        priority=command.priority,
        cache_salt=command.cache_salt,
        arrival=arrival,
        max_model_len=limits.max_model_len,
        end_token_ids=frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else limits.eos_token_ids),
        penalised_prompt_ids=frozenset(command.prompt_token_ids if params.repetition_penalty != 1.0 else ()),
        is_scored=command.has_prompt_logprobs,
    )
    indexes = [index for index in range(params.num_sequences) if index not in command.finished_indexes]
    job.sequences = [_make_sequence(job, command, tokenizer, grammars, index) for index in indexes]
    return job


def _make_sequence(job: EngineJob, command: AddJob, tokenizer: Tokenizer, grammars: Grammars, index: int) -> Sequence:
    """Replay the committed tokens as if they had just been drawn; what was already sent is not sent again."""
    prompt = command.prompt_token_ids
    stream = TextStream(tokenizer, prompt, job.params.stop)
    output = job.params.structured_output
    sequence = Sequence(
        job=job,
        index=index,
        token_ids=list(prompt),
        num_prompt_tokens=len(prompt),
        stream=stream,
        grammar=None if output is None else grammars.start(output),
    )
    for token_id in command.committed_token_ids[index]:
        if sequence.is_finished:
            break
        sequence.append(token_id)
    sequence.unsent_text = sequence.unsent_text[command.num_emitted_chars[index] :]
    return sequence


def _check(command: AddJob, params: SamplingParams, limits: ModelLimits) -> None:
    if not command.prompt_token_ids:
        raise InvalidRequest("the prompt has no tokens; give at least one", param="prompt")
    if len(command.prompt_token_ids) + min(1, command.max_tokens) > limits.max_model_len:
        raise ContextLengthExceeded(
            f"the prompt is {len(command.prompt_token_ids)} tokens and the model accepts {limits.max_model_len} with "
            "at least one to be generated; shorten it",
            param="prompt",
        )
    if not len(command.committed_token_ids) == len(command.num_emitted_chars) == params.num_sequences:
        raise InvalidRequest(
            f"n is {params.num_sequences} but the committed prefix is of {len(command.committed_token_ids)}"
        )
    _check_token_ids("prompt", command.prompt_token_ids, limits)
    _check_token_ids("logit_bias", list(params.logit_bias), limits)
    _check_token_ids("stop_token_ids", params.stop_token_ids, limits)
    _check_token_ids("bad_token_ids", params.bad_token_ids, limits)
    for token_ids in command.committed_token_ids:
        _check_token_ids("committed_token_ids", token_ids, limits)


def _check_token_ids(param: str, token_ids: Rows[int], limits: ModelLimits) -> None:
    if token_ids and not 0 <= min(token_ids) <= max(token_ids) < limits.vocab_size:
        wrong = next(token_id for token_id in token_ids if not 0 <= token_id < limits.vocab_size)
        raise InvalidRequest(f"{param} holds token {wrong}; the model knows 0 to {limits.vocab_size - 1}", param=param)
