"""What a terminal would obey is shown on it instead, whoever has written it."""

from io import StringIO

from celeriac.client import JobSnapshot, StreamEvent
from celeriac.consoles import VisibleConsole
from celeriac.tables import dead_letters_table
from celeriac.terminal import JobPrinter

EVIL = "\x1b]0;owned\x07 \x9b2J\r"
ERROR = {"code": "engine_error", "message": f"the engine said {EVIL}"}
JOB = JobSnapshot.of({"id": "job_1", "status": "failed", "model": EVIL, "error": ERROR})
END = StreamEvent(id="1", name="job.failed", data={"id": "job_1", "error": ERROR, "finish_reason": EVIL})


def printed(*, on_terminal: bool) -> str:
    """A job's end and the table of dead letters."""
    console = VisibleConsole(file=StringIO(), force_terminal=on_terminal, color_system=None, width=300)
    JobPrinter(console, console).print_all([END])
    console.print(dead_letters_table([JOB]))
    written = console.file
    assert isinstance(written, StringIO)
    return written.getvalue()


def test_nothing_that_others_wrote_commands_a_terminal() -> None:
    seen = printed(on_terminal=True)
    assert not set(seen) & {"\x1b", "\x07", "\x9b", "\r"}
    assert seen.count("\N{REPLACEMENT CHARACTER}]0;owned") == 4


def test_a_pipe_gets_it_as_it_is() -> None:
    assert "\x1b]0;owned" in printed(on_terminal=False)
