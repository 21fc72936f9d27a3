"""Reading a request's body within bounds of size and time. Runs in: trio; owns: nothing."""

import trio
from starlette.requests import Request

from edgekv.http.errors import ApiError
from edgekv.http.presence import ClientGone
from edgekv.http.settings import HttpSettings


async def read_json_body(request: Request, settings: HttpSettings) -> bytes:
    """The whole body of a request that says it is JSON. Raises `ApiError` (408, 413, 415) and `ClientGone`."""
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise ApiError(415, "Send the body as JSON, with 'Content-Type: application/json'.")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise ApiError(415, "Compressed bodies are not supported.")
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > settings.max_body_bytes:
        raise _too_large(settings)
    chunks: list[bytes] = []
    num_bytes = 0
    with trio.move_on_after(settings.body_timeout_s):
        while True:
            message = await request.receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            chunk = message.get("body", b"")
            num_bytes += len(chunk)
            if num_bytes > settings.max_body_bytes:
                raise _too_large(settings)
            chunks.append(chunk)
            if not message.get("more_body", False):
                return b"".join(chunks)
    raise ApiError(408, f"The body did not arrive within {settings.body_timeout_s:g} seconds.")


def _too_large(settings: HttpSettings) -> ApiError:
    return ApiError(413, f"The body is larger than {settings.max_body_bytes:,} bytes.", code="body_too_large")
