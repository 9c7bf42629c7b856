"""The back end that has an OpenAI-compatible server run the model; see docs/engines.md.

Each sequence is a streamed completion of its own. A sequence whose request has no answer, or only part of one, asks
again for what is missing: its prompt followed by the tokens that it has. The server's absence is no failure of a job.
"""

import logging
from collections import Counter
from collections.abc import Sequence as Rows
from dataclasses import dataclass, field
from time import monotonic
from urllib.parse import urlsplit

import msgspec
from tokenizers import Tokenizer

from domain.catalog import ModelSpec
from domain.errors import EngineError, InvalidRequest, UnsupportedParameter
from domain.jobs import FinishReason
from domain.requests import GenerationRequest
from gpu_worker.engine.backends import LoadedModel, RecordStep, StepMember
from gpu_worker.engine.detokenizer import with_visible_reasoning
from gpu_worker.engine.families import turn_end_token_ids
from gpu_worker.engine.remote.answers import Delta, Fault, ScoredToken, ServerFailure
from gpu_worker.engine.remote.bodies import TextTokens, completion_body
from gpu_worker.engine.remote.chat import ChatReader, chat_body
from gpu_worker.engine.remote.connection import Begun, Broken, Call, Connection, Grown, News, Probed
from gpu_worker.engine.remote.gate import FIRST_WAIT_SECONDS, MAX_WAIT_SECONDS, Gate
from gpu_worker.engine.sampling import Drawn, describe
from gpu_worker.engine.scheduler import ModelLimits, make_engine_job
from gpu_worker.engine.sequence import EngineJob, Sequence
from gpu_worker.engine_process.frames import (
    AddJob,
    EmbedJob,
    EngineStats,
    JobFailed,
    JobReturned,
    SequenceOutput,
    StepDone,
)
from text.model_files import eos_token_ids, model_folder, read_json_file, vocabulary_size
from text.tokenizers import load_tokenizer, special_tokens_of, token_table_of

log = logging.getLogger(__name__)

STEP_SECONDS = 0.02  # the longest wait for the server within a step, and so before an abort is applied
IDLE_STEP_SECONDS = 0.2  # the same while there is no job, but the server is away
FIRST_PROBE_SECONDS = 2.0  # how long loading waits for the server
RETURN_SECONDS = 20.0  # without a request under way before a job goes back to the queue; less than a stall
MAX_BROKEN = 6  # requests of a sequence in a row that the server accepted and then broke off without a token


@dataclass(slots=True, eq=False)
class RemoteSequence:
    """A sequence that has not ended, and its request."""

    sequence: Sequence
    call: Call | None = None  # under way
    has_begun: bool = False  # whether the server has accepted it
    num_broken: int = 0
    not_before: float = 0.0  # monotonic time of its next request
    waits_since: float = field(default_factory=monotonic)  # when it was added, or last left the server
    has_grown: bool = False  # whether it has gained any token here
    request: GenerationRequest | None = None  # whose messages are sent; None for a prompt


@dataclass(slots=True)
class Gain:
    """What a sequence has gained within a step."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[str, object]] = field(default_factory=list)
    sum_logprobs: float | None = None


class RemoteBackend:
    def __init__(self, spec: ModelSpec) -> None:
        assert spec.remote is not None
        self._spec = spec
        self._remote = spec.remote
        self._place = urlsplit(spec.remote.url).netloc
        self._tokenizer, self._limits = _read_files(spec)
        self._tokens = token_table_of(self._tokenizer)
        self._text_tokens = None if spec.remote.mode == "tokens" else TextTokens(self._tokenizer)
        self._jobs: dict[tuple[str, int], EngineJob] = {}
        self._waiting: list[RemoteSequence] = []  # without a request
        self._by_call: dict[Call, RemoteSequence] = {}
        self._gains: dict[Sequence, Gain] = {}  # of the next StepDone
        self._failures: list[JobFailed] = []
        self._returned: list[JobReturned] = []
        self._num_interrupted: Counter[str] = Counter()  # by job, since a text of its began
        self._num_jobs = self._num_steps = self._num_generation_tokens = self._num_prompt_tokens = 0
        self._step_seconds = 0.0
        self._gate = Gate()
        self._is_probing = False
        self._connection = Connection(spec.remote, spec.remote.model or spec.id, max_calls=spec.max_num_seqs)
        self._gate.close(ServerFailure(Fault.AWAY, "it has not answered yet"), monotonic(), sent_at=monotonic())
        self._probe()
        self._hear_all(self._connection.take(FIRST_PROBE_SECONDS))

    @property
    def loaded(self) -> LoadedModel:
        return LoadedModel(device=f"remote: {self._place}"[:100], num_cache_tokens=0)

    def close(self) -> None:
        """End the connection's thread."""
        self._connection.close()

    def add(self, command: AddJob) -> None:
        request = _request_of(self._spec, command)
        if request is not None:  # the server sees to the form of the output
            command = msgspec.structs.replace(command, params=command.params | {"structured_output": None})
        job = make_engine_job(command, self._limits, self._tokenizer, None, arrival=self._num_jobs)
        _refuse_lacking(self._spec, job)
        self._num_jobs += 1
        self._jobs[job.id, job.attempt] = job
        for sequence in job.sequences:
            if sequence.is_finished:
                self._gains[sequence] = Gain()
            else:
                self._waiting.append(RemoteSequence(sequence, request=request))
        self._waiting.sort(key=lambda one: one.sequence.rank)
        self._forget_if_done(job)

    def embed(self, command: EmbedJob) -> None:
        raise UnsupportedParameter("backend remote does not support embeddings", param="model")

    def abort(self, job_id: str, attempt: int, reason: str) -> None:
        job = self._jobs.pop((job_id, attempt), None)
        if job is None:
            return
        self._leave(job)
        for sequence in job.sequences:
            if not reason:
                self._gains.pop(sequence, None)
            elif not sequence.is_finished:
                sequence.finish(FinishReason(reason))
                self._gains.setdefault(sequence, Gain())

    @property
    def has_work(self) -> bool:
        """True also while the server is away, as only steps find out when it is back."""
        return bool(self._jobs or self._gains or self._failures or self._returned or self._gate.is_away)

    def step(self, record: RecordStep) -> StepDone:
        started_at = monotonic()
        if self._gate.is_away and started_at >= self._gate.opens_at and not self._is_probing:
            self._probe()
        returned, self._returned = self._returned + self._return_waiting(started_at), []
        self._send(started_at)
        record(self._members())
        has_news_already = bool(self._gains or self._failures or returned)
        news = self._connection.take(0.0 if has_news_already else STEP_SECONDS if self._jobs else IDLE_STEP_SECONDS)
        self._hear_all(news)
        record(self._members())
        gains, self._gains = self._gains, {}
        failures, self._failures = self._failures, []
        self._num_steps += 1
        for sequence in gains:
            self._forget_if_done(sequence.job)
        self._step_seconds = monotonic() - started_at
        outputs = [self._output(sequence, gain) for sequence, gain in gains.items()]
        return StepDone(outputs=outputs, failures=failures, stats=self.stats(), returned=returned)

    def stats(self) -> EngineStats:
        return EngineStats(
            num_steps=self._num_steps,
            num_running=len(self._by_call),
            num_waiting=len(self._waiting),
            num_generation_tokens=self._num_generation_tokens,
            num_prompt_tokens=self._num_prompt_tokens,
            step_seconds=self._step_seconds,
            is_full=self._is_full,
            waiting_for=f"server {self._place}: {self._gate.reason}" if self._gate.is_away else "",
        )

    @property
    def _is_full(self) -> bool:
        gate = self._gate
        is_shut = not gate.is_open and (gate.is_away or bool(self._waiting) or monotonic() < gate.opens_at)
        return is_shut or self._connection.num_waiting_there > 0

    def _return_waiting(self, now: float) -> list[JobReturned]:
        """Remove the jobs that have waited for long with a shut gate: in the queue they count as waiting, while here
        they would seem to be stuck. Output that has not been reported yet stays for the step's outputs."""
        if self._gate.is_open:
            return []
        busy = {one.sequence.job for one in self._by_call.values()} | {sequence.job for sequence in self._gains}
        stale = {one.sequence.job for one in self._waiting if now - one.waits_since > RETURN_SECONDS} - busy
        for job in stale:
            del self._jobs[job.id, job.attempt]
            self._leave(job)
        return [JobReturned(job.id, job.attempt) for job in stale]

    # Requests

    def _send(self, now: float) -> None:
        """Send the requests of waiting sequences, in order of rank, as far as there is room."""
        room = self._spec.max_num_seqs - len(self._by_call)
        num_under_way = sum(not one.has_begun for one in self._by_call.values())
        room_at_gate = self._gate.room(now, num_under_way=num_under_way)
        if room_at_gate is not None:
            room = min(room, room_at_gate)
        if self._by_call and self._connection.num_waiting_there > 0:
            room = 0
        due = [one for one in self._waiting if now >= one.not_before][: max(0, room)]
        for one in due:
            self._waiting.remove(one)
            one.call, one.has_begun = self._make_call(one), False
            self._by_call[one.call] = one
            self._connection.start(one.call)

    def _make_call(self, one: RemoteSequence) -> Call:
        if one.request is None:
            body = completion_body(one.sequence, self._spec, self._tokenizer)
            return Call(body, max_tokens=body["max_tokens"])
        body = chat_body(one.sequence, self._spec, one.request)
        return Call(body, max_tokens=body["max_tokens"], path="chat/completions", read=ChatReader().read)

    def _probe(self) -> None:
        self._is_probing = True
        self._connection.probe()

    def _leave(self, job: EngineJob) -> None:
        """Close the job's requests."""
        self._waiting = [one for one in self._waiting if one.sequence.job is not job]
        for call in [call for call, one in self._by_call.items() if one.sequence.job is job]:
            del self._by_call[call]
            self._connection.cancel(call)

    # News

    def _hear_all(self, news: Rows[News]) -> None:
        for piece in news:
            match piece:
                case Probed():
                    self._hear_probe(piece)
                case Begun(call):
                    self._open_gate()
                    if one := self._by_call.get(call):
                        one.has_begun = True
                case Grown(call, delta):
                    if one := self._by_call.get(call):
                        self._grow(one, call, delta)
                case Broken(call, failure):
                    if one := self._by_call.pop(call, None):
                        self._hear_failure(one, call, failure)

    def _hear_probe(self, probed: Probed) -> None:
        self._is_probing = False
        if probed.failure is None:
            if self._gate.is_away:
                log.info("the remote server answers", extra={"server": self._place})
            self._gate.note_answer(monotonic())
        else:
            self._close_gate(probed.failure, sent_at=monotonic())

    def _open_gate(self) -> None:
        if not self._gate.is_open:
            log.info("the remote server takes requests again", extra={"server": self._place})
        self._gate.open()

    def _close_gate(self, failure: ServerFailure, *, sent_at: float) -> None:
        if self._gate.close(failure, monotonic(), sent_at=sent_at):
            log.warning(
                "the remote server takes no requests; jobs wait", extra={"server": self._place, "reason": failure.what}
            )

    def _hear_failure(self, one: RemoteSequence, call: Call, failure: ServerFailure) -> None:
        now = monotonic()
        one.call = None
        if one.has_begun:
            one.has_begun, one.waits_since = False, now
        if failure.fault is Fault.REFUSED:
            self._fail(one.sequence.job, InvalidRequest.code, failure.message)
            return
        if failure.fault is Fault.BROKEN:
            one.num_broken += 1
            one.not_before = now + min(FIRST_WAIT_SECONDS * 2 ** (one.num_broken - 1), MAX_WAIT_SECONDS)
            if one.num_broken >= MAX_BROKEN:
                times = f"{one.num_broken} times in a row, and now {failure.message}"
                self._fail(one.sequence.job, EngineError.code, f"it broke off this job's request {times}")
                return
            log.warning(
                "the remote server broke off a request; it will be sent again",
                extra={"server": self._place, "reason": failure.what, "job_id": one.sequence.job.id},
            )
        else:
            self._close_gate(failure, sent_at=call.started_at)
        if one.request is not None and one.has_grown:
            self._interrupt(one.sequence.job, failure)
            return
        self._waiting.append(one)
        self._waiting.sort(key=lambda one: one.sequence.rank)

    def _interrupt(self, job: EngineJob, failure: ServerFailure) -> None:
        """A server that takes messages cannot continue an answer: the job goes back, and its worker does with it what
        the entry says. One that is interrupted again and again fails."""
        self._num_interrupted[job.id] += 1
        if self._num_interrupted[job.id] >= MAX_BROKEN:
            times = f"{MAX_BROKEN} times after its first text, and now {failure.message}"
            self._fail(job, EngineError.code, f"it broke off this job's answer {times}")
            return
        self._jobs.pop((job.id, job.attempt), None)
        self._leave(job)
        self._returned.append(JobReturned(job.id, job.attempt))

    def _fail(self, job: EngineJob, code: str, message: str) -> None:
        self._jobs.pop((job.id, job.attempt), None)
        self._leave(job)
        for sequence in job.sequences:
            self._gains.pop(sequence, None)
        self._failures.append(
            JobFailed(job.id, job.attempt, code, f"the server {self._place} runs this model: {message}")
        )

    def _grow(self, one: RemoteSequence, call: Call, delta: Delta) -> None:
        sequence = one.sequence
        token_ids = delta.token_ids
        if self._text_tokens is not None:
            token_ids = self._text_tokens.encode(delta.text)
        elif token_ids is None and (delta.text or delta.scores):
            lacks = 'it returned no token ids, as vLLM does for return_token_ids; set mode = "text" for such a server'
            self._fail(sequence.job, EngineError.code, lacks)
            return
        if not self._may_take(sequence, token_ids or [], delta.scores):
            self._fail(sequence.job, EngineError.code, "it returned tokens that are not of this model or not as asked")
            return
        self._append(one, token_ids or [], delta.scores)
        if not sequence.is_finished and delta.finish_reason is not None:
            self._end_there(one, call, delta.finish_reason)
        if sequence.is_finished:
            del self._by_call[call]
            if delta.finish_reason is None:
                self._connection.cancel(call)

    def _may_take(self, sequence: Sequence, token_ids: Rows[int], scores: Rows[ScoredToken] | None) -> bool:
        is_known = all(0 <= token_id < self._limits.vocab_size for token_id in token_ids)
        params = sequence.job.params
        has_scores = params.logprobs is not None or params.best_of is not None
        return is_known and (not has_scores or len(scores or []) == len(token_ids))

    def _append(self, one: RemoteSequence, token_ids: Rows[int], scores: Rows[ScoredToken] | None) -> None:
        sequence, params = one.sequence, one.sequence.job.params
        if not token_ids:
            return
        gain = self._gains.setdefault(sequence, Gain())
        if not one.has_grown:
            self._num_prompt_tokens += sequence.num_prompt_tokens
        one.has_grown, one.num_broken = True, 0
        for number, token_id in enumerate(token_ids):
            if sequence.is_finished:
                return
            sequence.append(token_id)
            gain.token_ids.append(token_id)
            self._num_generation_tokens += 1
            score = scores[number] if scores else None
            if score is not None and params.logprobs is not None:
                drawn = Drawn(token_id, score.logprob, score.top[: params.logprobs])
                gain.logprobs.append(describe(self._tokens, sequence, len(sequence.token_ids) - 1, drawn))
            if score is not None and params.best_of is not None:
                gain.sum_logprobs = (gain.sum_logprobs or 0.0) + score.logprob

    def _end_there(self, one: RemoteSequence, call: Call, reason: str) -> None:
        """The server has ended a sequence that goes on by our own rules."""
        if reason in ("stop", "length"):
            one.sequence.finish(FinishReason(reason))
            self._gains.setdefault(one.sequence, Gain())
        else:  # as at its shutdown: "abort"
            del self._by_call[call]
            self._hear_failure(one, call, ServerFailure(Fault.BROKEN, "it aborted the request"))

    # Outputs

    def _members(self) -> list[StepMember]:
        grown = {one.sequence.job for one in self._by_call.values() if one.has_grown}
        grown |= {sequence.job for sequence in self._gains}
        jobs = {one.sequence.job for one in [*self._by_call.values(), *self._waiting]} | grown
        return [StepMember(job.id, job.attempt, "decode" if job in grown else "prefill") for job in jobs]

    def _forget_if_done(self, job: EngineJob) -> None:
        if all(sequence.is_finished for sequence in job.sequences):
            self._jobs.pop((job.id, job.attempt), None)

    def _output(self, sequence: Sequence, gain: Gain) -> SequenceOutput:
        return SequenceOutput(
            job_id=sequence.job.id,
            attempt=sequence.job.attempt,
            index=sequence.index,
            token_ids=gain.token_ids,
            text=sequence.take_text(),
            finish_reason=sequence.finish_reason,
            logprobs=None if sequence.job.params.logprobs is None else gain.logprobs,
            sum_logprobs=gain.sum_logprobs,
            num_reasoning_tokens=sequence.num_reasoning_tokens,
            stop_string=sequence.stream.stop_string,
        )


def _refuse_lacking(spec: ModelSpec, job: EngineJob) -> None:
    """A job that was accepted before its entry was changed."""
    if job.params.structured_output is not None or job.params.prompt_logprobs is not None:
        raise UnsupportedParameter(f"the remote server of {spec.id} has no such output; see docs/engines.md")


def _request_of(spec: ModelSpec, command: AddJob) -> GenerationRequest | None:
    """The request whose messages are sent. Raises UnsupportedParameter for a job that was accepted with a prompt."""
    if not spec.passes_messages:
        return None
    request = None if command.conversation is None else GenerationRequest.model_validate_json(command.conversation)
    if request is None or request.messages is None:
        raise UnsupportedParameter(f"the remote server of {spec.id} takes only messages; see docs/engines.md")
    return request


def _read_files(spec: ModelSpec) -> tuple[Tokenizer, ModelLimits]:
    """The tokenizer as the API loads it, since the API turns text into token ids and this process turns them back."""
    folder = model_folder(spec)
    config = read_json_file(folder / "config.json")
    tokenizer_config = read_json_file(folder / "tokenizer_config.json")
    special_tokens = special_tokens_of(read_json_file(folder / "special_tokens_map.json") | tokenizer_config)
    tokenizer = load_tokenizer(folder, tokenizer_config, special_tokens)
    named = eos_token_ids(read_json_file(folder / "generation_config.json"), config)
    ends = frozenset(named) | turn_end_token_ids(str(config.get("model_type")), tokenizer)
    vocab_size = vocabulary_size(config, default=tokenizer.get_vocab_size())
    return with_visible_reasoning(tokenizer), ModelLimits(vocab_size, spec.max_model_len, ends)
