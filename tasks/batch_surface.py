"""What batches need to know of the routes whose bodies their lines are; `api/openai/batch_lines.py` tells them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from domain.batches import LineRefusal
from domain.errors import CeleriacError
from domain.kinds import JobRequest
from storage.job_queries import JobRecord


@dataclass(frozen=True, slots=True)
class LineRequest:
    """A line that its route understands. `in_words` spells a refusal of the request as the body does, and returns it;
    `answer` makes the route's answer of the finished job, or raises the CeleriacError that says why there is none."""

    custom_id: str
    request: JobRequest
    metadata: Mapping[str, str]
    in_words: Callable[[CeleriacError], CeleriacError]
    answer: Callable[[JobRecord], Mapping[str, object]]


@dataclass(frozen=True, slots=True)
class BatchSurface:
    """`read_line(line, url)` raises CeleriacError, `refuse_unfinished(record)` the one that a job ended with, and
    `refusal_of` is such an error as a route would answer it."""

    read_line: Callable[[bytes, str], LineRequest]
    refuse_unfinished: Callable[[JobRecord], None]
    refusal_of: Callable[[CeleriacError], LineRefusal]
