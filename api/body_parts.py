"""A parsed body beside the model that it is to become: to which part of the model each of its objects belongs."""

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel, Discriminator, Tag


@dataclass(slots=True)
class Shape:
    """What a model says of one of its fields: an object of a model, a list of something, or either by a tag. None of
    them where the value is the user's own."""

    model: type[BaseModel] | None = None
    items: "Shape | None" = None
    discriminator: Callable[[Any], Hashable] | None = None
    by_tag: dict[Hashable, "Shape"] = field(default_factory=dict)

    def of(self, value: object) -> "Shape | None":
        return self if self.discriminator is None else self.by_tag.get(self.discriminator(value))

    def arms(self) -> "Iterable[Shape]":
        return self.by_tag.values() or (self,)


def drop_nulls(body: object, model: type[BaseModel]) -> bool:
    """Take every null out of `body` that says nothing: of a field nobody knows, and of one that may be left out. What
    is the user's own, such as schemas and metadata, stays as it is. Whether anything was taken out."""
    is_changed = False
    waiting: list[tuple[object, Shape]] = [(body, Shape(model))]
    while waiting:
        value, any_shape = waiting.pop()
        shape = any_shape.of(value)
        if shape is None:
            continue
        if isinstance(value, list) and shape.items is not None:
            items = shape.items
            waiting += [(item, items) for item in value if isinstance(item, dict | list)]
        elif isinstance(value, dict) and shape.model is not None:
            is_changed = _drop_own(value, shape.model) or is_changed
            shapes = shapes_of(shape.model)
            waiting += [(inner, shapes[name]) for name, inner in value.items() if name in shapes]
    return is_changed


def _drop_own(value: dict[str, Any], model: type[BaseModel]) -> bool:
    required = _required_of(model)
    nothing = [name for name, inner in value.items() if inner is None and name not in required]
    for name in nothing:
        del value[name]
    return bool(nothing)


def owner_at(model: type[BaseModel], location: Sequence[int | str]) -> type[BaseModel] | None:
    """The model of the object at `location`, as pydantic's errors spell it, with the tags of unions. Without a tag it
    is one that may be there."""
    shape: Shape | None = Shape(model)
    for step in location:
        shape = _step_into(shape, step) if shape is not None else None
    return None if shape is None else next((arm.model for arm in shape.arms() if arm.model is not None), None)


def _step_into(shape: Shape, step: int | str) -> Shape | None:
    if step in shape.by_tag:
        return shape.by_tag[step]
    for arm in shape.arms():
        if isinstance(step, int) and arm.items is not None:
            return arm.items
        if isinstance(step, str) and arm.model is not None and step in shapes_of(arm.model):
            return shapes_of(arm.model)[step]
    return None


@cache
def shapes_of(model: type[BaseModel]) -> dict[str, Shape]:
    """Of its fields that hold more than plain values, by the name that bodies use."""
    annotations = get_type_hints(model, include_extras=True)
    shapes = {info.alias or name: _shape_of(annotations[name]) for name, info in model.model_fields.items()}
    return {name: shape for name, shape in shapes.items() if shape != Shape()}


@cache
def _required_of(model: type[BaseModel]) -> frozenset[str]:
    return frozenset(info.alias or name for name, info in model.model_fields.items() if info.is_required())


def _shape_of(annotation: Any) -> Shape:
    if get_origin(annotation) is Annotated:
        inner, *extras = get_args(annotation)
        discriminators = [extra.discriminator for extra in extras if isinstance(extra, Discriminator)]
        by = next((one for one in discriminators if callable(one)), None)
        return _shape_of(inner) if by is None else Shape(discriminator=by, by_tag=_tagged(inner))
    if get_origin(annotation) in (Union, UnionType):
        return next((shape for arm in get_args(annotation) if (shape := _shape_of(arm)) != Shape()), Shape())
    if get_origin(annotation) in (list, tuple, Sequence):
        return Shape(items=_shape_of(get_args(annotation)[0]))
    return Shape(annotation) if isinstance(annotation, type) and issubclass(annotation, BaseModel) else Shape()


def _tagged(union: Any) -> dict[Hashable, Shape]:
    arms = [(arm, extra.tag) for arm in get_args(union) for extra in get_args(arm) if isinstance(extra, Tag)]
    return {tag: _shape_of(arm) for arm, tag in arms}
