"""Which of a worker's models are loaded: they share one memory, and the least recently used makes room.

`ModelMemory` decides for all runners of a worker, `Residence` tells it about one of them. Rules:

- At the start, models are loaded in the order in which they were named, as far as they fit.
- A model that is not loaded gets in line once a job waits for it that no other worker is about to take. The line is in
  the order of these jobs' ages, and nobody overtakes: a smaller model may not take the room that the first one needs.
- If there is no room, the least recently used model that has nothing to do leaves at once. A busy one may stay for as
  long as its load took, and for at least CELERIAC_MODEL_RESIDENCY_SECONDS; then it takes no more jobs, lets those that
  run come to their end for CELERIAC_DRAIN_SECONDS, and leaves. What has not ended goes on when it is loaded again. So
  at most half of the time goes into loading, and no model waits for ever. It gets in line behind those that waited
  before it left.
- A model alone on its worker is always loaded, whatever it needs. So is one that needs none of its memory, such as
  that of a remote server; it has no room to make.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from threading import Lock
from time import monotonic

from gpu_worker.commits import JobStorage
from gpu_worker.engine_process.supervisor import Supervisor
from gpu_worker.threads import Answer, StorageThread
from metrics import model_evictions_total, model_load_seconds, worker_models_memory_bytes

log = logging.getLogger(__name__)

LOOK_SECONDS = 0.5  # between two looks for jobs that wait for a model


@dataclass(frozen=True, slots=True)
class ModelUse:
    """What a runner says of its model. Times are from the monotonic clock."""

    is_allowed: bool = False  # False while an operator has unloaded it
    has_engine: bool = False  # an engine process exists and takes its memory
    is_ready: bool = False
    is_busy: bool = False  # jobs run or are being claimed
    waiting_since: float | None = None  # when the oldest job that waits for this worker was accepted

    @property
    def has_work(self) -> bool:
        return self.is_busy or self.waiting_since is not None


@dataclass(slots=True)
class _Model:
    """One model of the worker. It takes memory while it is wanted or has an engine."""

    id: str
    need_bytes: int
    use: ModelUse = ModelUse()
    is_wanted: bool = False
    used_at: float = 0.0
    left_at: float = 0.0  # when it last had to make room
    loading_since: float = 0.0
    ready_at: float = 0.0
    load_seconds: float | None = None  # of its last load

    @property
    def is_resident(self) -> bool:
        return self.is_wanted or self.use.has_engine

    @property
    def in_line_since(self) -> float | None:
        if self.is_wanted or not self.use.is_allowed or self.use.waiting_since is None:
            return None
        return max(self.use.waiting_since, self.left_at)


class ModelMemory:
    """The memory of one worker. Thread-safe."""

    def __init__(
        self, need_bytes_by_model: Mapping[str, int], *, budget_bytes: int = 0, residency_seconds: float = 0.0
    ) -> None:
        """`need_bytes_by_model` are estimates; a model's own is replaced by what its engine measures, if that is
        more."""
        self._lock = Lock()
        self._budget_bytes = budget_bytes
        self._residency_seconds = residency_seconds
        self._models = {model: _Model(model, need) for model, need in need_bytes_by_model.items()}
        self.is_shared = len(self._models) > 1
        for model in self._models.values():
            model.is_wanted = self._shortage(model) <= 0

    def update(self, model_id: str, use: ModelUse, now: float) -> bool:
        """Take note of this, and decide for all models. Returns whether this one should be loaded."""
        with self._lock:
            model = self._models[model_id]
            self._note(model, use, now)
            self._decide(now)
            worker_models_memory_bytes.set(sum(each.need_bytes for each in self._models.values() if each.is_resident))
            return model.is_wanted

    def measure(self, model_id: str, num_bytes: int) -> None:
        """The loaded model takes this much, by its engine's own account."""
        with self._lock:
            model = self._models[model_id]
            model.need_bytes = max(model.need_bytes, num_bytes)

    def seconds_until_ready(self, model_id: str, now: float) -> float | None:
        """An estimate of when the model will be loaded if nothing but loads and residencies delays it; None if no load
        has been measured."""
        with self._lock:
            model = self._models[model_id]
            if model.use.is_ready and model.is_wanted:
                return 0.0
            load_seconds = self._expected_load_seconds(model)
            if load_seconds is None:
                return None
            if model.use.has_engine and model.is_wanted:
                return max(0.0, model.loading_since + load_seconds - now)
            return self._seconds_until_room(model, now) + load_seconds

    def _note(self, model: _Model, use: ModelUse, now: float) -> None:
        before, model.use = model.use, use
        if use.is_busy:
            model.used_at = now
        if use.has_engine and not before.has_engine:
            model.loading_since = now
        if use.is_ready and not before.is_ready:
            model.ready_at = model.used_at = now
            model.load_seconds = now - model.loading_since
            model_load_seconds.labels(model.id).observe(model.load_seconds)
        if before.has_engine and not use.has_engine and use.is_allowed and not model.is_wanted:
            model_evictions_total.labels(model.id).inc()
            log.info("unloaded a model to make room", extra={"model": model.id})
        if not use.is_allowed:
            model.is_wanted = False
        elif not before.is_allowed and not model.is_wanted:  # an operator has it loaded again
            model.is_wanted = self._shortage(model) <= 0

    def _decide(self, now: float) -> None:
        while (first := self._first_in_line()) is not None:
            shortage = self._shortage(first)
            if shortage > 0:
                for model in self._leavers(first, shortage, now):
                    model.is_wanted, model.left_at = False, now
                    log.info("a model makes room for another", extra={"model": model.id, "for_model": first.id})
                return
            first.is_wanted = True

    def _first_in_line(self) -> _Model | None:
        line = [(since, model) for model in self._models.values() if (since := model.in_line_since) is not None]
        return min(line, key=lambda entry: entry[0])[1] if line else None

    def _shortage(self, model: _Model) -> int:
        """How many bytes are missing for this model. One that needs more than there is must at least be alone."""
        if not model.need_bytes:
            return 0
        taken = sum(other.need_bytes for other in self._models.values() if other is not model and other.is_resident)
        return min(model.need_bytes, self._budget_bytes) + taken - self._budget_bytes

    def _leavers(self, first: _Model, shortage: int, now: float) -> list[_Model]:
        """The models that should make room now; none if those that may leave do not suffice, or others already do."""
        others = [model for model in self._models.values() if model is not first]
        missing = shortage - sum(model.need_bytes for model in others if model.is_resident and not model.is_wanted)
        settled = [model for model in others if model.is_wanted and model.use.is_ready and model.need_bytes]
        may_leave = [model for model in settled if self._seconds_protected(model, now) == 0.0]
        leavers = []
        for model in sorted(may_leave, key=lambda model: (model.use.has_work, model.used_at)):
            if missing <= 0:
                break
            leavers.append(model)
            missing -= model.need_bytes
        return leavers if missing <= 0 else []

    def _seconds_protected(self, model: _Model, now: float) -> float:
        """How long the model may stay at least, if it is not idle: its residency, which begins when it is loaded."""
        if model.use.is_ready and not model.use.has_work:
            return 0.0
        begins_at = model.ready_at if model.use.is_ready else now + (self._expected_load_seconds(model) or 0.0)
        return max(0.0, begins_at + max(self._residency_seconds, model.load_seconds or 0.0) - now)

    def _seconds_until_room(self, model: _Model, now: float) -> float:
        if model.is_wanted or self._shortage(model) <= 0:
            return 0.0
        others = [each for each in self._models.values() if each is not model and each.is_wanted and each.need_bytes]
        return min((self._seconds_protected(other, now) for other in others), default=0.0)

    def _expected_load_seconds(self, model: _Model) -> float | None:
        """The time that its last load took; before the first one, by the speed of the other models' loads."""
        if model.load_seconds is not None:
            return model.load_seconds
        measured = [(each.load_seconds, each.need_bytes) for each in self._models.values() if each.load_seconds]
        num_bytes = sum(need for _, need in measured)
        return model.need_bytes * sum(seconds for seconds, _ in measured) / num_bytes if num_bytes else None


class Residence:
    """The place of one model in its worker's memory. Used only by the runner's thread."""

    def __init__(self, memory: ModelMemory, model: str, storage: JobStorage, thread: StorageThread) -> None:
        self._memory = memory
        self._model = model
        self._storage = storage
        self._storage_thread = thread
        self._looked_at = float("-inf")
        self._is_looking = False
        self._waiting_since: float | None = None
        self.is_wanted = True  # whether the model should be loaded; if not, its jobs end and then its engine does
        model_load_seconds.labels(model)  # so that both metrics exist before they count anything
        model_evictions_total.labels(model)

    def update(self, now: float, *, is_allowed: bool, engine: Supervisor, is_busy: bool, is_draining: bool) -> None:
        """Tell how things are, and hear whether the model should be loaded. A draining worker loads nothing."""
        self._look(now)
        waiting_since = None if is_draining else self._waiting_since
        use = ModelUse(is_allowed, engine.has_engine, engine.ready is not None, is_busy, waiting_since)
        self.is_wanted = self._memory.update(self._model, use, now)

    def measure(self, num_bytes: int) -> None:
        self._memory.measure(self._model, num_bytes)

    def leave(self) -> None:
        """The model cannot be served here any more."""
        self._memory.update(self._model, ModelUse(), monotonic())

    def seconds_until_ready(self, now: float) -> float | None:
        return self._memory.seconds_until_ready(self._model, now)

    def _look(self, now: float) -> None:
        """If there are other models, ask now and then how long jobs have been waiting for this one."""
        if not self._memory.is_shared or self._is_looking or now < self._looked_at + LOOK_SECONDS:
            return
        self._is_looking, self._looked_at = True, now

        def on_done(answer: Answer[float | None]) -> None:
            self._is_looking = False
            self._waiting_since = None if answer.value is None else answer.sent_at - answer.value

        def on_error(exc: Exception) -> None:
            self._is_looking = False
            log.error("could not look for jobs that wait for a model", exc_info=exc, extra={"model": self._model})

        self._storage_thread.submit(lambda is_repeated: self._storage.longest_wait_seconds(), on_done, on_error)
