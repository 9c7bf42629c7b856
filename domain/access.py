"""What an API key may do, and how much: scopes, and the limits of a key or tenant."""

import re
from enum import StrEnum
from typing import Annotated

from pydantic import ConfigDict, Field

from domain.jobs import FirstErrorModel


class Scope(StrEnum):
    """What a route is for, and what a key may be used for."""

    SUBMIT = "submit"  # make and change what belongs to the tenant: jobs, files, batches, conversations, webhooks
    READ = "read"  # read it
    CANCEL = "cancel"  # stop and delete it
    METRICS = "metrics"  # read /metrics, the figures of the installation
    ADMIN = "admin"  # administer the installation: /v1/admin


OWN_SCOPES = (Scope.SUBMIT, Scope.READ, Scope.CANCEL)  # of a key that is made without naming any


def opened_by(scopes: frozenset[Scope]) -> frozenset[Scope]:
    """The scopes of the routes that a key with `scopes` opens: these, and with `admin` also `metrics`."""
    return scopes | {Scope.METRICS} if Scope.ADMIN in scopes else scopes


TENANT_NAME = r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}"  # of new tenants, so that it can be part of a path


def is_tenant_name(text: str) -> bool:
    return re.fullmatch(TENANT_NAME, text) is not None


MIN_RETENTION_SECONDS, MAX_RETENTION_SECONDS = 60, 315_360_000  # ten years, longer than any job asks for

MAX_LIMIT = 2**53

MAX_QUEUED_JOBS = 2**31 - 1  # PostgreSQL's integer, as tenants.max_queued is one

_Limit = Annotated[int | None, Field(ge=1, le=MAX_LIMIT)]


class Limits(FirstErrorModel):
    """The limits of one tenant, or of one of its keys. None: no limit."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    requests_per_minute: _Limit = None
    tokens_per_minute: _Limit = None
    queued_jobs: Annotated[int | None, Field(ge=1, le=MAX_QUEUED_JOBS)] = None
    unfinished_jobs: _Limit = None  # queued and running
    queued_tokens: _Limit = None
    streams: _Limit = None
    tokens_per_day: _Limit = None
    tokens_per_month: _Limit = None


NO_LIMITS = Limits()

LIMIT_NAMES = tuple(Limits.model_fields)
