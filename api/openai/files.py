"""/v1/files: the input and output files of batches.

An upload is a multipart form. Its file goes to the database in pieces as it arrives, and is never in memory as a whole.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Annotated, Literal, cast
from uuid import UUID

from multipart import MultipartError, MultipartSegment, PushMultipartParser, parse_options_header
from pydantic import Field, TypeAdapter, ValidationError
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from api.downloads import Download
from api.errors import RequestTimeout, UnsupportedMediaType, json_response
from api.inputs import PageQuery, list_page, listing, read_query
from api.openapi import BYTES
from api.services import Services, caller_of, private_router
from dialects.openai_views import DeletedView, PageView, View
from domain.errors import CeleriacError, FileNotFound, InvalidRequest, RequestTooLarge, UnsupportedParameter
from domain.jobs import PIECE_BYTES, FileStatus, external_id, parse_id_of_other
from storage import batches, files
from storage.files import Batch, File
from tasks.batch_files import AnsweredLine, read_ended, write_line
from text.models import ModelViews

FORM_BYTES = 65_536  # of a form, besides its file

FILE = "file"  # the field that has the file

MAX_PARTS = 16

MAX_FIELD_BYTES = 1_024

SILENCE_SECONDS = 30.0  # the longest pause in an upload

GRACE_SECONDS = 30.0  # before the minimum rate applies

MIN_BYTES_PER_SECOND = 32_768  # on average; slower uploads would keep their slot from others

MAX_BOUNDARY_CHARS = 200


class Form:
    """A multipart form as it arrives: its fields, and the part of its file that has not been stored yet."""

    def __init__(self, content_type: str) -> None:
        """Raises UnsupportedMediaType, or InvalidRequest without a boundary."""
        kind, options = parse_options_header(content_type)
        if kind != "multipart/form-data":
            raise UnsupportedMediaType(f"Content-Type is {content_type[:64]!r}; send the file as multipart/form-data")
        boundary = options.get("boundary", "")
        if not 0 < len(boundary) <= MAX_BOUNDARY_CHARS or not boundary.isascii():
            raise InvalidRequest("the Content-Type of the form has no valid boundary; let your HTTP client set it")
        self.fields: dict[str, str] = {}
        self.filename: str | None = None
        self.content = bytearray()
        self._num_parts = 0
        self._name = ""
        self._value = bytearray()
        self._parser = PushMultipartParser(boundary)

    def feed(self, data: bytes) -> None:
        """Parse the next bytes of the body. Raises InvalidRequest."""
        with _refuse_malformed():
            for event in self._parser.parse(data):
                if isinstance(event, MultipartSegment):
                    self._begin_part(event)
                elif event is not None:
                    self._take(event)
                elif self._name != FILE:
                    self.fields[self._name] = self._value.decode(errors="replace")

    def finish(self) -> None:
        """Raises InvalidRequest if the form or its file is incomplete."""
        with _refuse_malformed():
            self._parser.close()
        if self.filename is None:
            raise InvalidRequest("file is missing; send it as a field of the form", param=FILE)

    def _begin_part(self, part: MultipartSegment) -> None:
        self._num_parts += 1
        if self._num_parts > MAX_PARTS:
            raise InvalidRequest(
                f"the form has more than {MAX_PARTS} fields; send only file, purpose and expires_after"
            )
        self._name, self._value = str(part.name), bytearray()
        if self._name in self.fields or (self._name == FILE and self.filename is not None):
            name = self._name[:64]
            raise InvalidRequest(f"{name} appears more than once in the form; send it once", param=name)
        if self._name == FILE:
            self.filename = (part.filename or "upload").replace("\0", "")[:255]

    def _take(self, data: bytes) -> None:
        if self._name == FILE:
            self.content += data
            return
        self._value += data
        if len(self._value) > MAX_FIELD_BYTES:
            name = self._name[:64]
            raise InvalidRequest(f"{name} is longer than {MAX_FIELD_BYTES} bytes; shorten it", param=name)


@contextmanager
def _refuse_malformed() -> Iterator[None]:
    try:
        yield
    except MultipartError as exc:
        raise InvalidRequest(
            f"the body is not a valid multipart form ({exc}); let your HTTP client encode it"
        ) from None


class Upload:
    """An upload in progress. What it has stored must be finished or discarded."""

    def __init__(self, services: Services, tenant_id: UUID) -> None:
        self._services = services
        self._tenant_id = tenant_id
        self._file_id: UUID | None = None
        self._num_pieces = 0
        self._num_bytes = 0

    async def receive(self, request: Request) -> Form:
        """Read the whole form and store its file. Raises CeleriacError. A malformed form is still read to its end, so
        that the client gets to read the answer."""
        form = Form(request.headers.get("content-type", ""))
        problem: CeleriacError | None = None
        async for data in _stream(request):
            if problem is not None:
                continue
            try:
                form.feed(data)
            except CeleriacError as exc:
                problem = exc
                continue
            await self._write(form, PIECE_BYTES)
        if problem is not None:
            raise problem
        form.finish()
        await self._write(form, 1)
        return form

    async def _write(self, form: Form, at_least: int) -> None:
        """Store pieces of PIECE_BYTES while `form` has `at_least` bytes; 1 stores the last, smaller piece, too."""
        settings = self._services.settings
        while len(form.content) >= at_least:
            piece = bytes(form.content[:PIECE_BYTES])
            del form.content[:PIECE_BYTES]
            self._num_bytes += len(piece)
            if self._num_bytes > settings.max_file_bytes:
                raise RequestTooLarge(f"the file has more than {settings.max_file_bytes} bytes; split it", param="file")
            if self._file_id is None:
                self._file_id = await self._services.write(
                    files.begin_with, self._tenant_id, piece, max_bytes=settings.max_file_bytes_per_tenant
                )
            else:
                await self._services.write(files.append, self._file_id, self._num_pieces, piece)
            self._num_pieces += 1

    async def finish(self, *, filename: str, purpose: str, ttl_seconds: int) -> File:
        if self._file_id is None:
            raise InvalidRequest("file is empty; send at least one line", param="file")
        file = await self._services.write(
            files.finish_upload,
            self._file_id,
            self._tenant_id,
            filename=filename,
            purpose=purpose,
            ttl_seconds=ttl_seconds,
            max_bytes=self._services.settings.max_file_bytes_per_tenant,
        )
        self._file_id = None
        return file

    def discard(self) -> None:
        """Delete what was stored, in the background. Does nothing after `finish`. The janitor deletes what is left
        over."""
        if self._file_id is not None:
            self._services.spawn(self._services.write(files.discard, self._file_id))


async def _stream(request: Request) -> AsyncIterator[bytes]:
    """The body as it arrives. Raises RequestTimeout if the client pauses too long or is too slow, ClientDisconnect if
    it leaves. As the size is bounded and a minimum rate is enforced, so is the total time."""
    stream = request.stream()
    started, num_bytes = time.monotonic(), 0
    while True:
        left_seconds = started + GRACE_SECONDS + num_bytes / MIN_BYTES_PER_SECOND - time.monotonic()
        try:
            async with asyncio.timeout(min(SILENCE_SECONDS, left_seconds)):
                data = await anext(stream)
        except StopAsyncIteration:
            return
        except TimeoutError:
            raise _too_slow(num_bytes, time.monotonic() - started) from None
        num_bytes += len(data)
        yield data


def _too_slow(num_bytes: int, seconds: float) -> RequestTimeout:
    return RequestTimeout(
        f"only {num_bytes} bytes arrived in {seconds:.0f} s; send the file without pauses, at "
        f"{MIN_BYTES_PER_SECOND} bytes per second or more"
    )


async def receive_file(request: Request, services: Services, tenant_id: UUID) -> tuple[Form, Upload]:
    """Receive a form and its file. The caller must finish or discard the upload. Raises CeleriacError."""
    services.uploads.refuse_if_full()
    with services.uploads.hold():
        upload = Upload(services, tenant_id)
        try:
            return await upload.receive(request), upload
        except (CeleriacError, ClientDisconnect, asyncio.CancelledError):
            upload.discard()
            raise


router = private_router("OpenAI")

MIN_TTL_SECONDS, MAX_TTL_SECONDS = 3_600, 2_592_000

FIELDS = ("file", "purpose", "expires_after[anchor]", "expires_after[seconds]")

HEADERS = {"x-content-type-options": "nosniff"}  # untrusted text: no browser may render it as a page

Purpose = Literal["batch", "batch_output"]


class FilesQuery(PageQuery):
    purpose: Purpose | None = None
    limit: int = Field(default=10_000, ge=1, le=10_000)
    order: Literal["asc", "desc"] = "desc"


class FileView(View):
    id: str
    object: Literal["file"]
    bytes: int
    created_at: Annotated[int, Field(description="Seconds since 1970.")]
    filename: str
    purpose: Purpose
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
    """Upload a file of requests, one per line. The file appears, complete, when this succeeds; never in part."""
    services, tenant_id = caller_of(request)
    form, upload = await receive_file(request, services, tenant_id)
    try:
        ttl_seconds = _ttl_seconds(form, services.settings.file_ttl_seconds)
        purpose = _purpose(form)
        file = await upload.finish(filename=form.filename or "upload", purpose=purpose, ttl_seconds=ttl_seconds)
    finally:
        upload.discard()
    return json_response(file_object(file))


@router.get("/v1/files", **listing(FileListView, FilesQuery))
async def list_files(request: Request) -> Response:
    """The tenant's files, newest first. For the next page send `after` = `last_id`."""
    query = read_query(request, FilesQuery)
    return await list_page(
        request, query, files.list_files, file_object, prefix="file", purpose=query.purpose, order=query.order
    )


@router.get("/v1/files/{file_id}", responses={200: {"model": FileView}})
async def read_file(file_id: str, request: Request) -> Response:
    services, tenant_id = caller_of(request)
    return json_response(file_object(await find_file(services, tenant_id, file_id)))


@router.get("/v1/files/{file_id}/content", response_class=Response, responses={200: BYTES})
async def read_content(file_id: str, request: Request) -> Response:
    """The content of the file. While a batch runs, its output has the lines that are done so far."""
    services, tenant_id = caller_of(request)
    services.downloads.refuse_if_full()
    file = await find_file(services, tenant_id, file_id)
    if file.status is FileStatus.LIVE:
        batch = await services.read(batches.of_file, file.id)
        if batch is not None:
            live = _live_content(services, batch, is_output=batch.output_file_id == file.id)
            return Download(live, services.downloads, headers=HEADERS, media_type="application/octet-stream")
    headers = HEADERS | {"content-length": str(file.num_bytes)}
    content = content_of(services, file.id)
    return Download(content, services.downloads, headers=headers, media_type="application/octet-stream")


@router.delete("/v1/files/{file_id}", responses={200: {"model": DeletedView}})
async def delete_file(file_id: str, request: Request) -> Response:
    """Delete a file, unless an unfinished batch needs it."""
    services, tenant_id = caller_of(request)
    id_ = parse_file_id(file_id)
    if not await services.write(files.delete_file, id_, tenant_id):
        raise not_found(file_id)
    return json_response({"id": external_id(id_, "file"), "object": "file", "deleted": True})


async def content_of(services: Services, file_id: UUID) -> AsyncIterator[bytes]:
    number = 0
    # One at a time, as it is in memory until the client has taken it.
    while pieces := await services.read(files.read_pieces, file_id, first=number, num_pieces=1):
        number += len(pieces)
        for piece in pieces:
            yield piece


async def _live_content(services: Services, batch: Batch, *, is_output: bool) -> AsyncIterator[bytes]:
    after: int | None = 0
    while after is not None:
        lines = await services.read(read_ended, batch, after=after, is_completed=is_output)
        after = lines[-1].ended.line.line if lines else None
        yield await asyncio.to_thread(_written, batch, lines, services.views)


def _written(batch: Batch, lines: list[AnsweredLine], views: ModelViews) -> bytes:
    return b"".join(write_line(batch, line, views) for line in lines)


async def find_file(services: Services, tenant_id: UUID, file_id: str) -> File:
    """Raises FileNotFound, with the same message for a malformed id, an unknown one and one of another tenant."""
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
    return FileNotFound(f"there is no file {file_id[:64]!r}; check the id, as the file may have expired", param=param)


def file_object(file: File) -> FileView:
    return {
        "id": external_id(file.id, "file"),
        "object": "file",
        "bytes": file.num_bytes,
        "created_at": int(file.created_at.timestamp()),
        "filename": file.filename,
        "purpose": cast(Purpose, file.purpose),
        "status": "uploaded" if file.status is FileStatus.LIVE else "processed",
        "expires_at": None if file.expires_at is None else int(file.expires_at.timestamp()),
    }


def _purpose(form: Form) -> str:
    unknown = sorted(set(form.fields) - set(FIELDS))
    if unknown:
        known = ", ".join(FIELDS)
        raise InvalidRequest(
            f"{unknown[0][:64]} is not a field of this form; the fields are: {known}", param=unknown[0][:64]
        )
    purpose = form.fields.get("purpose")
    if purpose is None:
        raise InvalidRequest("purpose is missing; send 'batch'", param="purpose")
    if purpose != "batch":
        raise UnsupportedParameter(f"purpose is {purpose[:40]!r}; only 'batch' is supported", param="purpose")
    return purpose


def _ttl_seconds(form: Form, default: int) -> int:
    anchor, seconds = (form.fields.get("expires_after[anchor]"), form.fields.get("expires_after[seconds]"))
    if anchor is None and seconds is None:
        return default
    if anchor != "created_at":
        raise InvalidRequest(
            f"expires_after[anchor] is {(anchor or '')[:40]!r}; send 'created_at'", param="expires_after[anchor]"
        )
    try:
        number = TypeAdapter(int).validate_python(seconds)
    except ValidationError:
        number = 0
    return refuse_odd_ttl(number, "expires_after[seconds]")


def refuse_odd_ttl(seconds: int, param: str) -> int:
    """Returns `seconds`. Raises InvalidRequest if it is out of range."""
    if not MIN_TTL_SECONDS <= seconds <= MAX_TTL_SECONDS:
        raise InvalidRequest(
            f"{param} must be a number of seconds from {MIN_TTL_SECONDS} to {MAX_TTL_SECONDS}", param=param
        )
    return seconds
