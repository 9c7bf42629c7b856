"""An upload as it streams in: a form whose file goes to SQL piece by piece, and is never whole in memory."""

import asyncio
import time
from collections.abc import AsyncIterator
from uuid import UUID

from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import ClientDisconnect, Request

from api.errors import RequestTimeout, UnsupportedMediaType
from api.services import Services
from domain.batches import PIECE_BYTES
from domain.errors import CeleriacError, InvalidRequest, RequestTooLarge
from storage import files
from storage.batch_tables import File

FORM_BYTES = 65_536  # what a form may have around its file
MAX_PARTS = 16
MAX_FIELD_BYTES = 1_024
SILENCE_SECONDS = 30.0
GRACE_SECONDS = 30.0  # before a rate is asked for
MIN_BYTES_PER_SECOND = 32_768  # averaged from the start; what is slower keeps a place from others
MAX_BOUNDARY_CHARS = 200


class Form:
    """A form that is being read: its fields, and what has arrived of its file since it was last taken."""

    def __init__(self, content_type: str) -> None:
        """Raises UnsupportedMediaType or InvalidRequest."""
        kind, options = parse_options_header(content_type)
        if kind != b"multipart/form-data":
            raise UnsupportedMediaType(f"Content-Type is {content_type[:64]!r}; send the file as multipart/form-data")
        boundary = options.get(b"boundary", b"")
        if not 0 < len(boundary) <= MAX_BOUNDARY_CHARS:
            raise InvalidRequest("the form's Content-Type names no boundary; let your HTTP client write it")
        self.fields: dict[str, str] = {}
        self.filename: str | None = None
        self.content = bytearray()
        self.is_whole = False
        self._num_parts = 0
        self._header = [b"", b""]
        self._disposition = b""
        self._name: str | None = None
        self._value = bytearray()
        self._is_in_file = False
        self._parser = MultipartParser(boundary, self._callbacks())  # type: ignore[arg-type]

    def feed(self, data: bytes) -> None:
        """Raises InvalidRequest."""
        try:
            self._parser.write(data)
        except MultipartParseError:
            raise InvalidRequest("the body is no multipart form; let your HTTP client write it") from None

    def _callbacks(self) -> dict[str, object]:
        return {
            "on_part_begin": self._begin_part,
            "on_header_field": lambda data, start, end: self._add_to_header(0, data[start:end]),
            "on_header_value": lambda data, start, end: self._add_to_header(1, data[start:end]),
            "on_header_end": self._end_header,
            "on_headers_finished": self._begin_content,
            "on_part_data": lambda data, start, end: self._take(data[start:end]),
            "on_part_end": self._end_part,
            "on_end": self._end,
        }

    def _begin_part(self) -> None:
        self._num_parts += 1
        if self._num_parts > MAX_PARTS:
            raise InvalidRequest(
                f"the form has more than {MAX_PARTS} parts; send file, purpose and expires_after alone"
            )
        self._disposition, self._value = b"", bytearray()

    def _add_to_header(self, place: int, data: bytes) -> None:
        self._header[place] += data

    def _end_header(self) -> None:
        name, value = self._header
        if name.lower() == b"content-disposition":
            self._disposition = value
        self._header = [b"", b""]

    def _begin_content(self) -> None:
        _, options = parse_options_header(self._disposition)
        self._name = options.get(b"name", b"").decode(errors="replace")
        self._is_in_file = self._name == "file"
        if self._is_in_file:
            if self.filename is not None:
                raise InvalidRequest("the form has more than one file; send one", param="file")
            self.filename = options.get(b"filename", b"upload").decode(errors="replace").replace("\0", "")[:255]
        elif self._name in self.fields:
            raise InvalidRequest(f"{self._name[:64]} appears more than once; send it once", param=self._name[:64])

    def _take(self, data: bytes) -> None:
        if self._is_in_file:
            self.content += data
            return
        self._value += data
        if len(self._value) > MAX_FIELD_BYTES:
            name = (self._name or "")[:64]
            raise InvalidRequest(f"{name} is longer than {MAX_FIELD_BYTES} bytes; shorten it", param=name)

    def _end_part(self) -> None:
        if not self._is_in_file and self._name is not None:
            self.fields[self._name] = self._value.decode(errors="replace")

    def _end(self) -> None:
        self.is_whole = True


class Upload:
    """One upload under way. What it wrote is discarded unless it is finished."""

    def __init__(self, services: Services, tenant_id: UUID) -> None:
        self._services = services
        self._tenant_id = tenant_id
        self._file_id: UUID | None = None
        self._num_pieces = 0
        self._num_bytes = 0

    async def receive(self, request: Request) -> Form:
        """Read the whole form and write its file. Raises CeleriacError; a client that sends what is not a form is
        heard to its end first, so that it reads our answer."""
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
        if not form.is_whole or form.filename is None:
            raise InvalidRequest("file is missing; send it as a part of the form", param="file")
        await self._write(form, 1)
        return form

    async def _write(self, form: Form, at_least: int) -> None:
        """All whole pieces; at the end, with `at_least` 1, the last one, too."""
        settings = self._services.settings
        while len(form.content) >= at_least:
            piece = bytes(form.content[:PIECE_BYTES])
            del form.content[:PIECE_BYTES]
            self._num_bytes += len(piece)
            if self._num_bytes > settings.max_file_bytes:
                raise RequestTooLarge(f"the file goes beyond {settings.max_file_bytes} bytes; split it", param="file")
            if self._file_id is None:
                self._file_id = await self._services.write(
                    files.begin_upload, self._tenant_id, max_bytes=settings.max_file_bytes_per_tenant
                )
            await self._services.write(files.append, self._file_id, self._num_pieces, piece)
            self._num_pieces += 1

    async def finish(self, *, filename: str, purpose: str, ttl_seconds: int) -> File:
        if self._file_id is None:
            raise InvalidRequest("file is empty; send some lines", param="file")
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
        """Nothing after `finish`. What cannot be discarded now is found by the janitor."""
        if self._file_id is not None:
            self._services.spawn(self._services.write(files.discard, self._file_id))


async def _stream(request: Request) -> AsyncIterator[bytes]:
    """Raises RequestTimeout for a client that falls silent or trickles, ClientDisconnect for one that goes. As every
    byte buys its share of a second, and bytes are bounded, so is the time."""
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
        f"{num_bytes} bytes came in {seconds:.0f} s; send the file without a pause, at {MIN_BYTES_PER_SECOND} bytes a "
        "second at least"
    )


async def receive_file(request: Request, services: Services, tenant_id: UUID) -> tuple[Form, Upload]:
    """Raises CeleriacError. On success the upload is whole and waits to be finished or discarded."""
    with services.uploads.hold(tenant_id):
        upload = Upload(services, tenant_id)
        try:
            return await upload.receive(request), upload
        except (CeleriacError, ClientDisconnect, asyncio.CancelledError):
            upload.discard()
            raise
