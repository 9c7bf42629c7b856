"""Which jobs have an entry in their metadata: a row for each, so that those of one entry are found without the others.

A table, and no index of the metadata itself, since row-level security lets indexes serve only comparisons that cannot
leak what they compare, as `=`; those of JSON and arrays are not among them (ADR 69). The rows are kept by triggers on
`jobs` (migration 0041).
"""

from collections.abc import Mapping
from hashlib import md5
from uuid import UUID

from sqlalchemy import ColumnElement, and_
from sqlalchemy.orm import Mapped, aliased, mapped_column

from storage.tables import IS_PRUNED, Job, Row


class MetadataEntry(Row):
    """Without foreign keys: deleting by them would need one more index."""

    __tablename__ = "metadata_entries"
    __table_args__ = IS_PRUNED

    tenant_id: Mapped[UUID] = mapped_column(primary_key=True)
    entry: Mapped[UUID] = mapped_column(primary_key=True)
    job_id: Mapped[UUID] = mapped_column(primary_key=True)


def entry_of(name: str, value: str) -> UUID:
    """As the trigger computes it."""
    return UUID(bytes=md5(f"{len(name)}:{name}{value}".encode(), usedforsecurity=False).digest())


def entries_of(tenant_id: UUID, metadata: Mapping[str, str]) -> list[tuple[type[MetadataEntry], ColumnElement[bool]]]:
    """For each entry: the rows of the jobs that have it, and what joins them to `jobs`."""
    joins = []
    for name, value in metadata.items():
        row = aliased(MetadataEntry)
        joins.append((row, and_(row.job_id == Job.id, row.tenant_id == tenant_id, row.entry == entry_of(name, value))))
    return joins
