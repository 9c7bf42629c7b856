"""Reads known.toml, which lists the models that can be pulled by name."""

import tomllib
from functools import cache
from pathlib import Path

from pydantic import Field

from celeriac.store.sources import JoinedSource, Source, parse_source
from domain.jobs import Frozen


class KnownModel(Frozen):
    """One table of known.toml. `sha256` is the hash of its only weights file."""

    title: str
    sources: list[str] = Field(min_length=1)
    joined: str = ""  # the file that the sources are parts of, if they are
    num_bytes: int
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    licence: str
    must_accept: str = ""  # terms that the user must accept first

    @property
    def source(self) -> Source:
        parts = [parse_source(source) for source in self.sources]
        return JoinedSource(self.joined, parts) if self.joined else parts[0]


@cache
def known_models() -> dict[str, KnownModel]:
    """By name."""
    tables = tomllib.loads((Path(__file__).parent / "known.toml").read_text(encoding="utf-8"))
    return {name: KnownModel.model_validate(table) for name, table in tables.items()}
