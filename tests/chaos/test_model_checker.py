"""The protocol is sound within the bounds given here, and is so no more when any one of its rules is taken away.

Whatever goes wrong meets whatever else goes wrong, in pairs, which is what every mutant below takes to
show; `make thorough` has three kinds at once.
"""

from typing import Any

import pytest

from tests.chaos.model import Budget, Protocol
from tests.chaos.model_checker import check
from tests.thorough import IS_THOROUGH

NO_FAULTS = Budget(**dict.fromkeys(Budget._fields, 0))


PAIRS = [
    pytest.param(Protocol(), {"kills": 1, "lapses": 1}, 9_000, id="kills and lapses"),
    pytest.param(Protocol(), {"kills": 1, "lost_answers": 1}, 5_000, id="kills and lost answers"),
    pytest.param(Protocol(), {"lapses": 1, "lost_answers": 1}, 9_000, id="lapses and lost answers"),
    pytest.param(Protocol(), {"upgrades": 2, "kills": 1}, 9_000, id="upgrades and kills"),
    pytest.param(Protocol(), {"upgrades": 2, "lapses": 1}, 15_000, id="upgrades and lapses"),
]
MORE = [
    pytest.param(Protocol(), {"kills": 1, "lapses": 1, "lost_answers": 1}, 30_000, id="workers"),
    pytest.param(Protocol(), {"upgrades": 2, "kills": 1, "lapses": 1}, 30_000, id="upgrades"),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("protocol", "faults", "min_states"),
    [
        *(MORE if IS_THOROUGH else PAIRS),
        pytest.param(Protocol(), {"api_kills": 1, "lapses": 1, "flushes": 1}, 9_000, id="clients"),
        pytest.param(Protocol(), {"cancels": 1, "errors": 1, "releases": 1}, 3_000, id="ends"),
        pytest.param(Protocol(max_failures=1), {"kills": 2, "lapses": 1}, 12_000, id="failures"),
        pytest.param(Protocol(polls=True, sends_missing=False), {"flushes": 1, "lapses": 1}, 2_000, id="polling"),
    ],
)
def test_no_state_is_unsafe_and_none_is_stuck(protocol: Protocol, faults: dict[str, int], min_states: int) -> None:
    verdict = check(protocol, NO_FAULTS._replace(**faults))
    assert verdict.unsafe is None
    assert verdict.stuck is None
    assert verdict.num_states >= min_states  # else the bound has become so small that it says nothing
    assert "completed" in verdict.statuses


@pytest.mark.parametrize(
    ("mutant", "faults", "what"),
    [
        ({"checks_attempt": False}, {"lapses": 1}, "another than the holder wrote a chunk"),
        ({"checks_attempt": False}, {"lapses": 1, "errors": 1}, "an attempt was ended under its holder"),
        ({"checks_sequence_number": False}, {"lost_answers": 1}, "two attempts made one text"),
        ({"rescues_on_locked_row": False}, {"lapses": 1}, "an attempt was ended under its holder"),
        ({"commits_before_publishing": False}, {"kills": 1}, "the client saw what is not committed"),
        ({"continues_committed_text": False}, {"kills": 1}, "two attempts made one text"),
        ({"fills_gaps": False}, {}, "the client saw what is not committed"),
        ({"pins_revision": False}, {"upgrades": 1, "kills": 1}, "two revisions made one text"),
        ({"writes_revision": False}, {"upgrades": 2, "kills": 1}, "two revisions made one text"),
        ({"restarts": False}, {"upgrades": 1, "kills": 1}, "job or client cannot finish any more"),
        ({"sends_missing": False}, {"flushes": 1}, "job or client cannot finish any more"),
        ({"sends_missing": False}, {"api_kills": 1}, "job or client cannot finish any more"),
    ],
)
def test_a_protocol_without_one_of_its_rules_is_caught(
    mutant: dict[str, Any], faults: dict[str, int], what: str
) -> None:
    verdict = check(Protocol(**mutant), NO_FAULTS._replace(**faults))
    violation = verdict.unsafe or verdict.stuck
    assert violation is not None
    assert violation.what == what
    assert violation.trace[0].startswith("accept")
