"""Frozen dataclasses that are written as JSON objects and read back, field by field.

A field's name is its key. What older files lack takes the field's default; keys that no field has are left
where they are. A field with the metadata LEFT_OUT is written only where it has a value.
"""

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

Data = TypeVar("Data", bound="JsonData")

# Metadata of a field that JSON has only where it is not None.
LEFT_OUT = {"left out where it is None": True}


@dataclasses.dataclass(frozen=True)
class JsonData:
    """Base of what is read from JSON and written as it."""

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object."""
        values = {field: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {
            field.name: _plain(value)
            for field, value in values.items()
            if value is not None or field.metadata != LEFT_OUT
        }

    @classmethod
    def from_json(cls: type[Data], found: Mapping[str, Any]) -> Data:
        """Read a JSON object.

        Raises:
          KeyError: a key is missing whose field has no default.
          TypeError: an object or a list is expected and something else is there.
        """
        hints = typing.get_type_hints(cls)
        given: dict[str, Any] = {}
        for field in dataclasses.fields(cls):
            if field.name in found:
                given[field.name] = _typed(hints[field.name], found[field.name], field.name)
            elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
                raise KeyError(f"{cls.__name__} lacks {field.name}")
        return cls(**given)


def _plain(value: Any) -> Any:
    if isinstance(value, JsonData):
        return value.to_json()
    if isinstance(value, tuple | list):
        return [_plain(each) for each in value]
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    return value


def _typed(hint: Any, value: Any, name: str) -> Any:
    """Turn a value of JSON into what a field's type asks for: objects into classes, lists into tuples."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        (hint,) = (argument for argument in arguments if argument is not type(None))
        return _typed(hint, value, name)
    if isinstance(hint, type) and issubclass(hint, JsonData):
        if not isinstance(value, Mapping):
            raise TypeError(f"{name} is {type(value).__name__}, expected an object")
        return hint.from_json(value)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise TypeError(f"{name} is {type(value).__name__}, expected a list")
        element = arguments[0] if len(arguments) == 2 and arguments[1] is ... else Any
        return tuple(_typed(element, each, name) for each in value)
    if origin is dict:
        if not isinstance(value, Mapping):
            raise TypeError(f"{name} is {type(value).__name__}, expected an object")
        return {key: _typed(arguments[1], each, name) for key, each in value.items()}
    return value
