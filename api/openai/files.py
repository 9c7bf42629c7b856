"""/v1/files: what batches read and write."""

import asyncio
from collections.abc import AsyncIterator
from functools import partial
from typing import Literal
from uuid import UUID

import orjson
from fastapi import Request
from pydantic import Field, TypeAdapter, ValidationError
from starlette.responses import Response, StreamingResponse

from api.deps import caller_of, private_router
from api.job_inputs import page_cursor
from api.openai.batch_lines import batch_surface
from api.openai.uploads import Form, receive_file
from api.openapi import BYTES
from api.queries import QueryModel, query_parameters, read_query
from api.services import Services
from api.views import DeletedView, PageView, View, page
from domain.batches import FileStatus
from domain.errors import FileNotFound, InvalidRequest, UnsupportedParameter
from domain.ids import external_id, parse_id_of_other
from storage import batches, files
from storage.batch_tables import Batch, File
from tasks.batch_files import AnsweredLine, read_ended, write_line
from tasks.batch_surface import BatchSurface

router = private_router()

MIN_TTL_SECONDS, MAX_TTL_SECONDS = 3_600, 2_592_000
FIELDS = ("file", "purpose", "expires_after[anchor]", "expires_after[seconds]")
HEADERS = {"x-content-type-options": "nosniff"}  # anybody's text: no browser may take it for a page


class FilesQuery(QueryModel):
    purpose: Literal["batch", "batch_output"] | None = None
    after: str | None = Field(default=None, description="The last id of the page before.")
    limit: int = Field(default=10_000, ge=1, le=10_000)
    order: Literal["asc", "desc"] = "desc"


class FileView(View):
    id: str
    object: Literal["file"]
    bytes: int
    created_at: int = Field(description="Seconds since 1970.")
    filename: str
    purpose: Literal["batch", "batch_output"]
    status: Literal["uploaded", "processed"]
    expires_at: int | None


class FileListView(PageView):
    data: list[FileView]


@router.post(
    "/v1/files",
    responses={200: {"model": FileView}},
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {
                "multipart/form-data": {
                    "schema": {
                        "type": "object",
                        "required": ["file", "purpose"],
                        "properties": {
                            "file": {"type": "string", "format": "binary"},
                            "purpose": {"type": "string", "enum": ["batch"]},
                            "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
                            "expires_after[seconds]": {"type": "integer"},
                        },
                    }
                }
            },
        }
    },
)
async def upload_file(request: Request) -> Response:
    """A file of requests, one a line. It is there once this answers, whole; before, it is not."""
    services, tenant_id = caller_of(request)
    form, upload = await receive_file(request, services, tenant_id)
    try:
        ttl_seconds = _ttl_seconds(form, services.settings.file_ttl_seconds)
        purpose = _purpose(form)
        file = await upload.finish(filename=form.filename or "upload", purpose=purpose, ttl_seconds=ttl_seconds)
    finally:
        upload.discard()
    return _json(file_object(file))


@router.get(
    "/v1/files",
    responses={200: {"model": FileListView}},
    openapi_extra={"parameters": query_parameters(FilesQuery)},
)
async def list_files(request: Request) -> Response:
    """Newest first. Go on with `after` = `last_id` while `has_more`."""
    services, tenant_id = caller_of(request)
    query = read_query(request, FilesQuery)
    found = await services.read(
        files.list_files,
        tenant_id,
        purpose=query.purpose,
        after=page_cursor(query.after, partial(parse_id_of_other, prefix="file")),
        limit=query.limit + 1,
        order=query.order,
    )
    return _json(page([file_object(file) for file in found], query.limit))


@router.get("/v1/files/{file_id}", responses={200: {"model": FileView}})
async def read_file(file_id: str, request: Request) -> Response:
    services, tenant_id = caller_of(request)
    return _json(file_object(await find_file(services, tenant_id, file_id)))


@router.get("/v1/files/{file_id}/content", response_class=Response, responses={200: BYTES})
async def read_content(file_id: str, request: Request) -> Response:
    """The file as it was sent. What a batch writes can be read while it runs: the lines that are done."""
    services, tenant_id = caller_of(request)
    file = await find_file(services, tenant_id, file_id)
    if file.status is FileStatus.LIVE:
        batch = await services.read(batches.of_file, file.id)
        if batch is not None:
            live = _live_content(services, batch, is_output=batch.output_file_id == file.id)
            return StreamingResponse(live, headers=HEADERS, media_type="application/octet-stream")
    headers = HEADERS | {"content-length": str(file.num_bytes)}
    return StreamingResponse(_content(services, file.id), headers=headers, media_type="application/octet-stream")


@router.delete("/v1/files/{file_id}", responses={200: {"model": DeletedView}})
async def delete_file(file_id: str, request: Request) -> Response:
    """One that an unfinished batch needs is refused."""
    services, tenant_id = caller_of(request)
    id_ = parse_file_id(file_id)
    if not await services.write(files.delete_file, id_, tenant_id):
        raise not_found(file_id)
    return _json({"id": external_id(id_, "file"), "object": "file", "deleted": True})


async def _content(services: Services, file_id: UUID) -> AsyncIterator[bytes]:
    number = 0
    while pieces := await services.read(files.read_pieces, file_id, first=number):
        number += len(pieces)
        for piece in pieces:
            yield piece


async def _live_content(services: Services, batch: Batch, *, is_output: bool) -> AsyncIterator[bytes]:
    surface = batch_surface(services.views)
    after: int | None = 0
    while after is not None:
        lines = await services.read(read_ended, batch, after=after, is_completed=is_output)
        after = lines[-1].ended.line.line if lines else None
        yield await asyncio.to_thread(_written, batch, lines, surface)


def _written(batch: Batch, lines: list[AnsweredLine], surface: BatchSurface) -> bytes:
    return b"".join(write_line(batch, line, surface) for line in lines)


async def find_file(services: Services, tenant_id: UUID, file_id: str) -> File:
    """Raises FileNotFound, the same for a malformed id, an unknown one and another tenant's."""
    file = await services.read(files.get, parse_file_id(file_id), tenant_id)
    if file is None:
        raise not_found(file_id)
    return file


def parse_file_id(file_id: str, param: str = "file_id") -> UUID:
    try:
        return parse_id_of_other(file_id, "file")
    except ValueError:
        raise not_found(file_id, param) from None


def not_found(file_id: str, param: str = "file_id") -> FileNotFound:
    return FileNotFound(f"there is no file {file_id[:64]!r}; check the id, or it may have expired", param=param)


def file_object(file: File) -> dict[str, object]:
    return {
        "id": external_id(file.id, "file"),
        "object": "file",
        "bytes": file.num_bytes,
        "created_at": int(file.created_at.timestamp()),
        "filename": file.filename,
        "purpose": file.purpose,
        "status": "uploaded" if file.status is FileStatus.LIVE else "processed",
        "expires_at": None if file.expires_at is None else int(file.expires_at.timestamp()),
    }


def _purpose(form: Form) -> str:
    unknown = sorted(set(form.fields) - set(FIELDS))
    if unknown:
        known = ", ".join(FIELDS)
        raise InvalidRequest(f"{unknown[0][:64]} is not a field here; known are: {known}", param=unknown[0][:64])
    purpose = form.fields.get("purpose")
    if purpose is None:
        raise InvalidRequest("purpose is missing; send 'batch'", param="purpose")
    if purpose != "batch":
        raise UnsupportedParameter(f"purpose is {purpose[:40]!r}; files are kept for 'batch' only", param="purpose")
    return purpose


def _ttl_seconds(form: Form, default: int) -> int:
    anchor, seconds = (form.fields.get("expires_after[anchor]"), form.fields.get("expires_after[seconds]"))
    if anchor is None and seconds is None:
        return default
    if anchor != "created_at":
        raise InvalidRequest("expires_after[anchor] must be 'created_at'", param="expires_after[anchor]")
    try:
        number = TypeAdapter(int).validate_python(seconds)
    except ValidationError:
        number = 0
    return refuse_odd_ttl(number, "expires_after[seconds]")


def refuse_odd_ttl(seconds: int, param: str) -> int:
    if not MIN_TTL_SECONDS <= seconds <= MAX_TTL_SECONDS:
        raise InvalidRequest(f"{param} must be a number from {MIN_TTL_SECONDS} to {MAX_TTL_SECONDS}", param=param)
    return seconds


def _json(answer: dict[str, object]) -> Response:
    return Response(orjson.dumps(answer), media_type="application/json")
