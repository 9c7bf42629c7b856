"""How objects of the domain are stored in columns."""

from typing import Any

from pydantic import BaseModel, TypeAdapter
from sqlalchemy import JSON, Dialect, Text, TypeDecorator


class PydanticJSON(TypeDecorator[BaseModel]):
    """A JSON column for one Pydantic class. `json`, not `jsonb`, which refuses U+0000."""

    impl = JSON
    cache_ok = True

    def __init__(self, model_class: type[BaseModel]) -> None:
        super().__init__()
        self.model_class = model_class

    def process_bind_param(self, value: BaseModel | None, dialect: Dialect) -> Any:
        return None if value is None else value.model_dump(mode="json")

    def process_result_value(self, value: Any | None, dialect: Dialect) -> BaseModel | None:
        return None if value is None else self.model_class.model_validate(value)


class AdaptedJSON(TypeDecorator[Any]):
    """A JSON column for several Pydantic classes, which a tag in the JSON distinguishes."""

    impl = JSON
    cache_ok = True

    def __init__(self, adapter: TypeAdapter[Any]) -> None:
        super().__init__()
        self.adapter = adapter

    def process_bind_param(self, value: Any | None, dialect: Dialect) -> Any:
        return None if value is None else self.adapter.dump_python(value, mode="json")

    def process_result_value(self, value: Any | None, dialect: Dialect) -> Any | None:
        return None if value is None else self.adapter.validate_python(value)


class TextEnum(TypeDecorator[Any]):
    """A text column for a StrEnum; the CHECK constraints name the values."""

    impl = Text
    cache_ok = True

    def __init__(self, enum_class: type) -> None:
        super().__init__()
        self.enum_class = enum_class

    def process_bind_param(self, value: Any | None, dialect: Dialect) -> str | None:
        return None if value is None else str(value)

    def process_result_value(self, value: Any | None, dialect: Dialect) -> Any | None:
        return None if value is None else self.enum_class(value)
