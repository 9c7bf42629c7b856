"""What a step has produced, and how it is reported: as text, logprobs and usage. Free of torch.

Every back end whose sequences are ours reports them here, whatever has computed their tokens.
"""

from dataclasses import dataclass, field

from gpu_worker.engine.sampling import Drawn, describe
from gpu_worker.engine.sequence import Sequence
from gpu_worker.engine_process.frames import JobFailed, SequenceOutput
from text.tokenizers import TokenTable


@dataclass(slots=True)
class StepResult:
    """What a step has produced, by sequence; becomes its StepDone."""

    token_ids: dict[Sequence, list[int]] = field(default_factory=dict)
    logprobs: dict[Sequence, list[dict[str, object]]] = field(default_factory=dict)
    sum_logprobs: dict[Sequence, float] = field(default_factory=dict)
    prompt_logprobs: dict[Sequence, list[dict[str, object] | None]] = field(default_factory=dict)
    failures: list[JobFailed] = field(default_factory=list)

    def take(self, sequence: Sequence, drawn: Drawn, tokens: TokenTable) -> None:
        """Append the drawn token to its sequence and to this step's output. `drawn.token_id` must be set."""
        assert drawn.token_id is not None
        sequence.append(drawn.token_id)
        self.token_ids.setdefault(sequence, []).append(drawn.token_id)
        params = sequence.job.params
        if drawn.logprob is None:
            return
        if params.logprobs is not None:
            described = describe(tokens, sequence, len(sequence.token_ids) - 1, drawn)
            self.logprobs.setdefault(sequence, []).append(described)
        if params.best_of is not None:
            self.sum_logprobs[sequence] = self.sum_logprobs.get(sequence, 0.0) + drawn.logprob

    def forget(self, sequence: Sequence) -> None:
        """Report nothing of a sequence whose job has failed in this step."""
        for part in (self.token_ids, self.logprobs, self.sum_logprobs, self.prompt_logprobs):
            part.pop(sequence, None)

    def outputs(self) -> list[SequenceOutput]:
        """Takes the sequences' new text with it."""
        return [
            SequenceOutput(
                job_id=sequence.job.id,
                attempt=sequence.job.attempt,
                index=sequence.index,
                token_ids=token_ids,
                text=sequence.take_text(),
                finish_reason=sequence.finish_reason,
                logprobs=self.logprobs.get(sequence),
                num_cached_tokens=sequence.num_cached_tokens or 0,
                sum_logprobs=self.sum_logprobs.get(sequence),
                prompt_logprobs=self.prompt_logprobs.get(sequence),
                num_reasoning_tokens=sequence.num_reasoning_tokens,
                stop_string=sequence.stream.stop_string,
            )
            for sequence, token_ids in self.token_ids.items()
        ]
