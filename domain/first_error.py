"""Models that stop at the first bad item of a list.

pydantic looks at every item and collects what is wrong with each: seconds, and hundreds of megabytes, for a list of
some hundred thousand. Nobody is told of more than the first.
"""

from typing import Any

from pydantic import BaseModel, GetCoreSchemaHandler
from pydantic_core import CoreSchema

_LIST_TYPES = ("list", "tuple", "set", "frozenset")
_NO_SCHEMAS = frozenset({"metadata", "serialization"})


def _failing_fast(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_failing_fast(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    changed = {name: part if name in _NO_SCHEMAS else _failing_fast(part) for name, part in schema.items()}
    return changed | {"fail_fast": True} if schema.get("type") in _LIST_TYPES else changed


class FirstErrorModel(BaseModel):
    """As pydantic's `FailFast` on every list that is a field, or lies in one."""

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        schema: CoreSchema = _failing_fast(handler(source))
        return schema
