"""The one error shape: complete over the exception tree, steering retries, silent about what is private."""

from collections.abc import Iterator

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from api.errors import error_response, jittered_retry_after
from dialects.errors import HTTP_BY_CODE
from domain.errors import (
    AuthenticationFailed,
    CeleriacError,
    DeadlineExceeded,
    DeadlineUnattainable,
    IdempotencyKeyReused,
    InvalidRequest,
    ServerOverloaded,
    TooManyQueuedJobs,
)


def subclasses_of(cls: type[CeleriacError]) -> Iterator[type[CeleriacError]]:
    """Without those of the worker, of which only the code comes here."""
    yield cls
    for subclass in cls.__subclasses__():
        if not subclass.__module__.startswith("gpu_worker"):
            yield from subclasses_of(subclass)


ALL_ERRORS = sorted(set(subclasses_of(CeleriacError)), key=lambda cls: cls.__name__)


@pytest.mark.parametrize("cls", ALL_ERRORS, ids=lambda cls: cls.__name__)
def test_every_error_of_the_tree_has_a_status_and_the_one_shape(cls: type[CeleriacError]) -> None:
    response = error_response(cls("what happened", param="field"))
    answer = orjson.loads(response.body)
    http = HTTP_BY_CODE[cls.code]
    assert response.status_code == http.status
    assert answer["error"] == {"message": "what happened", "type": http.type, "param": "field", "code": cls.code}
    told = {"predicted_wait_seconds"} if cls is DeadlineUnattainable else set()
    assert set(answer) == {"error", "request_id"} | told


@pytest.mark.parametrize("cls", ALL_ERRORS, ids=lambda cls: cls.__name__)
def test_only_what_a_retry_can_mend_has_a_status_that_clients_retry(cls: type[CeleriacError]) -> None:
    retried_by_clients = HTTP_BY_CODE[cls.code].status in (408, 409, 429) or HTTP_BY_CODE[cls.code].status >= 500
    assert retried_by_clients or not cls.retryable
    assert HTTP_BY_CODE[cls.code].status != 409


def test_no_code_of_the_table_is_without_its_class() -> None:
    assert set(HTTP_BY_CODE) == {cls.code for cls in ALL_ERRORS}


@pytest.mark.parametrize("cls", [TooManyQueuedJobs, ServerOverloaded])
def test_overload_says_when_to_come_back(cls: type[CeleriacError]) -> None:
    assert 1 <= int(error_response(cls("full")).headers["retry-after"]) <= 60


@given(st.floats(min_value=0, max_value=1e9))
def test_the_advice_stays_within_what_clients_honour(seconds: float) -> None:
    assert 1 <= jittered_retry_after(seconds) <= 60


def test_clients_refused_together_do_not_come_back_together() -> None:
    assert len({jittered_retry_after(30) for _ in range(100)}) > 5


def test_lasting_refusals_tell_clients_not_to_retry() -> None:
    assert error_response(DeadlineExceeded("too late")).headers["x-should-retry"] == "false"
    assert error_response(IdempotencyKeyReused("other body")).status_code == 422


def test_a_missing_key_names_the_scheme() -> None:
    assert error_response(AuthenticationFailed("no key")).headers["www-authenticate"] == "Bearer"


def test_messages_survive_as_json_whatever_they_hold() -> None:
    message = 'quote " backslash \\ newline \n emoji 🙂'
    assert orjson.loads(error_response(InvalidRequest(message)).body)["error"]["message"] == message
