"""Reading the fields of a request: a null is as good as no field, a wrong one is named."""

import json
import math
from collections.abc import Mapping
from typing import Any

from jaxgpt_export.serve.api.api_error import ApiError, bad_value


def parse_body(body: bytes) -> "Fields":
    """Read a request's JSON; ApiError when it is none, or no object."""
    try:
        value = json.loads(body, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is no JSON: {error}", code="invalid_json") from None
    if not isinstance(value, dict):
        raise ApiError(400, f"the body is {type(value).__name__}, expected an object", code="invalid_json")
    return Fields(value)


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON")


class Fields:
    """The fields of a request; each method returns one, or a default where it is missing or null."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = values

    def get(self, name: str) -> Any:
        """Return a field as it is, None where it is missing."""
        return self._values.get(name)

    def names(self) -> list[str]:
        """Return the names of all fields."""
        return list(self._values)

    def require_absent(self, name: str, why: str) -> None:
        """Raise ApiError where a field asks for something that there is not."""
        if self.get(name) not in (None, "", [], {}, False):
            raise ApiError(400, f"{name} is not supported: {why}", param=name, code="unsupported_value")

    def boolean(self, name: str, default: bool = False) -> bool:
        """Return true or false."""
        value = self.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise bad_value(name, value, "true or false")
        return value

    def whole(self, name: str, default: int, least: int, most: int) -> int:
        """Return a whole number; 3.0 is one."""
        value = self.get(name)
        if value is None:
            return default
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise bad_value(name, value, f"a whole number from {least} to {most}")
        return value

    def number(self, name: str, default: float, least: float, most: float) -> float:
        """Return a number."""
        value = self.get(name)
        if value is None:
            return default
        fits = isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most
        if not fits or not math.isfinite(value):
            raise bad_value(name, value, f"a number from {least:g} to {most:g}")
        return float(value)

    def text(self, name: str, default: str = "") -> str:
        """Return a text that UTF-8 can hold."""
        value = self.get(name)
        if value is None:
            return default
        if not isinstance(value, str):
            raise bad_value(name, value, "a text")
        return valid_text(name, value)

    def texts(self, name: str, most: int) -> tuple[str, ...]:
        """Return a text or a list of them as a tuple; empty ones are left out."""
        value = self.get(name)
        if value is None:
            return ()
        values = value if isinstance(value, list) else [value]
        if not all(isinstance(text, str) for text in values) or len(values) > most:
            raise bad_value(name, value, f"a text or a list of at most {most} texts")
        return tuple(valid_text(name, text) for text in values if text)

    def section(self, name: str) -> "Fields":
        """Return an object's fields, none where it is missing."""
        value = self.get(name)
        if value is not None and not isinstance(value, dict):
            raise bad_value(name, value, "an object")
        return Fields(value or {})


def valid_text(name: str, text: str) -> str:
    """Return a text; ApiError where it holds half a character (a lone surrogate)."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ApiError(
            400,
            f"{name} holds half a character (a lone surrogate) at {error.start}; leave it out",
            param=name,
            code="invalid_value",
        ) from None
    return text
