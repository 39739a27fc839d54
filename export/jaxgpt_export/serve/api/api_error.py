"""Errors in the shape that clients of OpenAI's API read."""

import dataclasses
from typing import Any


@dataclasses.dataclass
class ApiError(Exception):
    """A request that is not answered.

    Attributes:
      status: HTTP's: 400 what was asked for is wrong, 401 no key, 403 not from here, 404 no such model or
        route, 405 another method, 413 too large, 429 too busy, 500 our fault, 503 not now.
      message: one sentence: what, got, expected.
      param: the field that is wrong.
      code: a word for programs.
      headers: of the answer.
    """

    status: int
    message: str
    param: str | None = None
    code: str | None = None
    headers: dict[str, str] = dataclasses.field(default_factory=dict)

    def body(self) -> dict[str, Any]:
        """Return the answer's JSON."""
        kind = TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}


TYPES = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
    503: "unavailable_error",
}


def bad_value(name: str, got: object, expected: str) -> ApiError:
    """Return the error of a field that is not what it should be."""
    text = repr(got)
    shown = text if len(text) <= 80 else f"{text[:77]}..."
    return ApiError(400, f"{name} is {shown}, expected {expected}", param=name, code="invalid_value")
