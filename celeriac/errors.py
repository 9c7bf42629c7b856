"""What users read of expected errors, in place of a traceback: what happened, and what to do about it."""

from typing import Any

#: Errors that explain themselves: shown as one line, without a traceback. By name, since importing them takes long.
EXPECTED_ERRORS = frozenset(
    {
        "AlreadyUp",
        "ApiError",
        "ApiUnreachable",
        "EmbeddedServerError",
        "MalformedKey",
        "MigrationRunning",
        "SharedSessions",
        "StartFailed",
        "UnknownSetting",
        "UnusableFolder",
    }
)


def explain(exc: Exception) -> str | None:
    """The message of an expected error; None if the error is a bug."""
    names = {kind.__name__ for kind in type(exc).__mro__}
    if names & EXPECTED_ERRORS:
        return str(exc)
    if "CeleriacError" in names:
        return str(exc)
    if "OperationalError" in names:
        return (
            f"the database does not answer: {str(exc).strip().splitlines()[0]}; "
            "start everything with `celeriac up`, or name a server in CELERIAC_DATABASE_URL"
        )
    if getattr(exc, "title", "") == "Settings":
        return "; ".join(explain_setting(error) for error in exc.errors(include_url=False))  # type: ignore[attr-defined]
    return None


def explain_setting(error: dict[str, Any]) -> str:
    """The message of one of Pydantic's errors. URLs and keys hold secrets, so their values are not shown."""
    name = "_".join(map(str, error["loc"]))
    is_secret = name.endswith(("_url", "_key"))
    value, reason = "wrong" if is_secret else repr(error["input"]), error["msg"].removeprefix("Value error, ")
    return f"CELERIAC_{name.upper()} is {value}: {reason}"
