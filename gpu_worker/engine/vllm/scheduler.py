"""vLLM's scheduler, which also tells who takes part in a step before the model runs."""

from collections.abc import Callable
from typing import Any

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler

#: Gets, by request id, whether each request of the step about to run is still reading its prompt.
OnSchedule = Callable[[dict[str, bool]], None]


class RecordingScheduler(Scheduler):
    """`on_schedule` is called with each step that has requests."""

    on_schedule: OnSchedule | None = None
    num_preempted = 0

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        output = super().schedule(*args, **kwargs)
        self.num_preempted += len(output.preempted_req_ids or ())
        if self.on_schedule is not None and output.num_scheduled_tokens:
            self.on_schedule({name: self._is_prompt(name, num) for name, num in output.num_scheduled_tokens.items()})
        return output

    def _is_prompt(self, name: str, num_new_tokens: int) -> bool:
        request = self.requests[name]  # already advanced by the step's tokens
        return bool(request.num_computed_tokens - num_new_tokens < request.num_prompt_tokens)
