"""What a client is told when it does not get what it asked for. Runs in: anywhere; owns: nothing.

The body is OpenAI's: `{"error": {"message", "type", "param", "code"}}`. A message speaks of the request alone: no
addresses, no paths, no other user's text.
"""

import json
import math
from typing import Any, assert_never

from starlette.responses import Response

from edgekv.actors.stream import Failed
from edgekv.errors import ContextLengthExceeded, NotServing, QueueFull


class ApiError(Exception):
    """A refusal with its HTTP status; `param` names the offending field, as in `messages[0].content`."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = headers or {}

    @property
    def type(self) -> str:
        """OpenAI's class of error."""
        match self.status:
            case 401:
                return "authentication_error"
            case 403:
                return "permission_error"
            case 404:
                return "not_found_error"
            case 429:
                return "rate_limit_error"
            case status if status >= 500:
                return "server_error"
            case _:
                return "invalid_request_error"

    def body(self) -> dict[str, Any]:
        """The JSON object that is sent."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        """The whole answer."""
        return JsonResponse(self.body(), status=self.status, headers=self.headers)


def invalid(param: str | None, message: str, *, code: str | None = None) -> ApiError:
    """A 400 about one field."""
    return ApiError(400, message, param=param, code=code)


def refusal(error: ContextLengthExceeded | QueueFull | NotServing) -> ApiError:
    """How the engine's refusal to admit a request reads over HTTP."""
    match error:
        case ContextLengthExceeded():
            return ApiError(400, str(error), code="context_length_exceeded", param="messages")
        case QueueFull():
            return ApiError(429, str(error), code="kv_cache_full", headers=retry_after(error.retry_after_s))
        case NotServing():
            return ApiError(503, str(error), code=error.code, headers=retry_after(error.retry_after_s))
        case _ as never:
            assert_never(never)


def lost(failure: Failed) -> ApiError:
    """How a sequence that the engine lost reads over HTTP."""
    status = 429 if failure.code == "kv_cache_full" else 503
    return ApiError(status, failure.message, code=failure.code, headers=retry_after(failure.retry_after_s))


def retry_after(seconds: float) -> dict[str, str]:
    """The header that tells a client when to come back, in whole seconds and never 0."""
    return {"retry-after": str(max(1, math.ceil(seconds)))}


class JsonResponse(Response):
    """Compact UTF-8 JSON; refuses to write what strict JSON has no word for."""

    media_type = "application/json"

    def __init__(self, content: object, *, status: int = 200, headers: dict[str, str] | None = None) -> None:
        super().__init__(to_json(content), status_code=status, headers=headers)


def to_json(content: object) -> bytes:
    """Compact UTF-8 JSON. Unpaired surrogates, which UTF-8 cannot carry, become U+FFFD."""
    text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode("utf-8", errors="replace")
