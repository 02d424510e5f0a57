"""What ends a request before its answer, and how that is said: the HTTP status, and words for the client."""

from __future__ import annotations

from typing import Any


class HttpError(Exception):
    """An answer that is not 200. `kind` is a word for programs, `param` the field at fault, `retry_after` seconds."""

    def __init__(self, status: int, message: str, kind: str = "invalid_request_error", param: str | None = None,
                 retry_after: int | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.kind, self.param = status, message, kind, param
        self.retry_after, self.code = retry_after, code

    def openai(self) -> dict[str, Any]:
        """The body that OpenAI's clients read."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    def anthropic(self) -> dict[str, Any]:
        """The body that Anthropic's clients read."""
        kind = {401: "authentication_error", 403: "permission_error", 404: "not_found_error",
                413: "request_too_large", 429: "rate_limit_error", 503: "overloaded_error"}.get(
                    self.status, "invalid_request_error" if self.status < 500 else "api_error")
        return {"type": "error", "error": {"type": kind, "message": self.message}}


def bad_request(message: str, param: str | None = None) -> HttpError:
    """400: the request cannot be served as it is."""
    return HttpError(400, message, param=param)


def unavailable(message: str, retry_after: int = 5) -> HttpError:
    """503: not now."""
    return HttpError(503, message, "service_unavailable", retry_after=retry_after)


def overloaded(message: str, retry_after: int) -> HttpError:
    """429: too much at once."""
    return HttpError(429, message, "rate_limit_exceeded", retry_after=retry_after, code="rate_limit_exceeded")
