"""A form that is read as it streams in: the same however it is cut into pieces, and bounded in all it has."""

import pytest

from api.errors import UnsupportedMediaType
from api.openai.files import MAX_FIELD_BYTES, MAX_PARTS, Form
from domain.errors import CeleriacError, InvalidRequest

KIND = 'multipart/form-data; boundary="a b"'
FILE = b'{"a": "\r\n--a"}\r\n--a \r\n\x00\xff'


def part(name: str, content: bytes, filename: str | None = None) -> bytes:
    named = f'name="{name}"' + ("" if filename is None else f'; filename="{filename}"')
    head = f"--a b\r\nContent-Disposition: form-data; {named}\r\nContent-Type: text/plain\r\n\r\n".encode()
    return head + content + b"\r\n"


WHOLE = part("purpose", b"batch") + part("file", FILE, "snow\u2603.jsonl") + part("x", b"") + b"--a b--\r\n"


def read(body: bytes, *, piece: int = 65_536) -> Form:
    form = Form(KIND)
    for start in range(0, len(body), piece):
        form.feed(body[start : start + piece])
    form.finish()
    return form


@pytest.mark.parametrize("piece", [1, 2, 3, 7, 64, 65_536])
def test_a_form_is_the_same_however_it_arrives(piece: int) -> None:
    form = read(WHOLE, piece=piece)
    assert (form.fields, form.filename, bytes(form.content)) == (
        {"purpose": "batch", "x": ""},
        "snow\u2603.jsonl",
        FILE,
    )


def test_what_has_arrived_of_a_file_can_be_taken_before_the_rest_is_there() -> None:
    form = Form(KIND)
    head = part("file", b"", "a")[:-2]
    form.feed(head + b"x" * 1_000_000)
    taken = len(form.content)
    assert taken > 999_000
    form.content.clear()
    form.feed(b"y" * 10 + b"\r\n--a b--")
    form.finish()
    assert bytes(form.content).endswith(b"y" * 10)
    assert len(form.content) + taken == 1_000_010


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (WHOLE[:-5], None),
        (b"", None),
        (b"nothing of the kind", None),
        (b"--a b\r\nbroken\r\n\r\n\r\n--a b--", None),
        (b"--a b\r\nContent-Disposition: form-data; name=x" + b"y" * 10_000, None),
        (b"--a b\r\n" + b"X-A: b\r\n" * 1_000, None),
        (b"".join(part(f"n{number}", b"") for number in range(MAX_PARTS + 1)), None),
        (part("purpose", b"batch") + b"--a b--", "file"),
        (part("purpose", b"x" * (MAX_FIELD_BYTES + 1)) + b"--a b--", "purpose"),
        (part("file", b"1", "a") + part("file", b"2", "b") + b"--a b--", "file"),
        (part("purpose", b"batch") * 2 + b"--a b--", "purpose"),
    ],
)
@pytest.mark.parametrize("piece", [5, 65_536])
def test_a_bad_form_is_refused_by_the_field_at_fault(body: bytes, param: str | None, piece: int) -> None:
    with pytest.raises(InvalidRequest) as refused:
        read(body, piece=piece)
    assert refused.value.param == param


@pytest.mark.parametrize(
    ("content_type", "error"),
    [
        ("", UnsupportedMediaType),
        ("application/json", UnsupportedMediaType),
        ("multipart/form-data", InvalidRequest),
        ("multipart/form-data; boundary=", InvalidRequest),
        ("multipart/form-data; boundary=" + "x" * 300, InvalidRequest),
    ],
)
def test_a_content_type_that_is_not_a_forms_is_refused(content_type: str, error: type[CeleriacError]) -> None:
    with pytest.raises(error):
        Form(content_type)
