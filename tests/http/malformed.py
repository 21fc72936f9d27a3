"""Requests that no client should send: HTTP/2 in every state of disorder, half WebSockets, and broken HTTP/1.1.

Each is what one connection sends. Stock hypercorn 0.18 on trio dies or hangs on six of them.
"""

import random
import struct
from collections.abc import Iterator

import hpack

_RANDOM = random.Random(46)
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_SOCKET = b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
_SOCKET_KEY = b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"

DATA, HEADERS, PRIORITY, RESET, SETTINGS, PING, GOAWAY, WINDOW, CONTINUATION = 0, 1, 2, 3, 4, 6, 7, 8, 9


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def _packed(*headers: tuple[bytes, bytes]) -> bytes:
    return hpack.Encoder().encode(list(headers))


_SCHEME, _AUTHORITY = (b":scheme", b"http"), (b":authority", b"localhost")
_GET, _ROOT = (b":method", b"GET"), (b":path", b"/")
_WHOLE = _packed(_GET, (b":path", b"/v1/models"), _SCHEME, _AUTHORITY)


def _http2(*frames: bytes) -> bytes:
    return _PREFACE + _frame(SETTINGS, 0, 0, b"") + b"".join(frames)


def _get(
    headers: bytes = b"", path: bytes = b"/v1/models", version: bytes = b"1.1", host: bytes = b"localhost"
) -> bytes:
    return b"GET %s HTTP/%s\r\nHost: %s\r\n%s\r\n" % (path, version, host, headers)


def _post(headers: bytes, body: bytes) -> bytes:
    return b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n%s\r\n%s" % (
        headers,
        body,
    )


def _h2c(settings: bytes) -> bytes:
    return _get(b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n" + settings)


def _priority(stream: int, on: int) -> bytes:
    return _frame(PRIORITY, 0, stream, struct.pack(">IB", on, 10))


MALFORMED: dict[str, bytes] = {
    "h2c with bad settings": _h2c(b"HTTP2-Settings: !!!!\r\n"),
    "h2c without settings": _h2c(b""),
    "h2c with short settings": _h2c(b"HTTP2-Settings: AAM\r\n"),
    "h2c as it should be": _h2c(b"HTTP2-Settings: AAMAAABkAAQAAP__\r\n"),
    "path not ASCII": _get(path=b"/\xc3\xa9"),
    "preface, then garbage": _PREFACE + _RANDOM.randbytes(200),
    "preface, no settings": _PREFACE + _frame(HEADERS, 5, 1, _WHOLE),
    "preface, wrong": b"PRI * HTTP/2.0\r\n\r\nXX\r\n\r\n",
    "h2 without :path": _http2(_frame(HEADERS, 5, 1, _packed(_GET, _SCHEME, _AUTHORITY))),
    "h2 without :method": _http2(_frame(HEADERS, 5, 1, _packed(_ROOT, _SCHEME, _AUTHORITY))),
    "h2 path not ASCII": _http2(_frame(HEADERS, 5, 1, _packed(_GET, (b":path", b"/\xff\xfe"), _SCHEME, _AUTHORITY))),
    "h2 method not ASCII": _http2(_frame(HEADERS, 5, 1, _packed((b":method", b"G\xff"), _ROOT, _SCHEME, _AUTHORITY))),
    "h2 CONNECT": _http2(_frame(HEADERS, 5, 1, _packed((b":method", b"CONNECT"), _AUTHORITY))),
    "h2 extended CONNECT": _http2(
        _frame(
            HEADERS,
            4,
            1,
            _packed((b":method", b"CONNECT"), (b":protocol", b"websocket"), _ROOT, _SCHEME, _AUTHORITY),
        )
    ),
    "h2 data on a closed stream": _http2(_frame(HEADERS, 5, 1, _WHOLE), _frame(DATA, 1, 1, b"abc")),
    "h2 data on no stream": _http2(_frame(DATA, 1, 9, b"abc")),
    "h2 reset of an idle stream": _http2(_frame(RESET, 0, 7, b"\0\0\0\x08")),
    "h2 priority on itself": _http2(_priority(1, 1), _frame(HEADERS, 5, 1, _WHOLE)),
    "h2 priority loop": _http2(_priority(3, 5), _priority(5, 3), _frame(HEADERS, 5, 3, _WHOLE)),
    "h2 headers with priority on itself": _http2(_frame(HEADERS, 0x25, 1, struct.pack(">IB", 1, 10) + _WHOLE)),
    "h2 1,100 priorities": _http2(*(_priority(2 * number + 1, 0) for number in range(1100))),
    "h2 window overflow": _http2(_frame(WINDOW, 0, 0, struct.pack(">I", 0x7FFFFFFF))),
    "h2 window of zero": _http2(_frame(HEADERS, 4, 1, _WHOLE), _frame(WINDOW, 0, 1, b"\0\0\0\0")),
    "h2 continuation flood": _http2(
        _frame(HEADERS, 0, 1, _WHOLE),
        *(_frame(CONTINUATION, 0, 1, _packed((b"x%d" % number, b"y"))) for number in range(5000)),
    ),
    "h2 settings flood": _PREFACE
    + b"".join(_frame(SETTINGS, 0, 0, b"\0\4" + struct.pack(">I", number)) for number in range(3000)),
    "h2 ping flood": _http2(*(_frame(PING, 0, 0, b"12345678") for _ in range(20_000))),
    "h2 goaway": _http2(_frame(GOAWAY, 0, 0, b"\0" * 8)),
    "websocket without key": _get(_SOCKET),
    "websocket with bad key": _get(_SOCKET + b"Sec-WebSocket-Key: zz\r\n"),
    "websocket as it should be": _get(_SOCKET + _SOCKET_KEY),
    "websocket over HTTP/1.0": _get(_SOCKET + _SOCKET_KEY, version=b"1.0"),
    "websocket with bad extension": _get(
        _SOCKET + b"Sec-WebSocket-Extensions: permessage-deflate; server_max_window_bits=99\r\n" + _SOCKET_KEY
    ),
    "websocket protocol not ASCII": _get(_SOCKET + b"Sec-WebSocket-Protocol: \xff\xfe\r\n" + _SOCKET_KEY),
    "expect, then leave": _post(b"Expect: 100-continue\r\nContent-Length: 5\r\n", b""),
    "500 pipelined": _get() * 500,
    "5,000 pipelined": _get() * 5000,
    "long chunk extension": _post(b"Transfer-Encoding: chunked\r\n", b"1;" + b"a" * 100_000 + b"\r\nx\r\n0\r\n\r\n"),
    "trailers": _post(b"Transfer-Encoding: chunked\r\n", b"1\r\nx\r\n0\r\nA: b\r\n\r\n"),
    "body shorter than said": _get(b"Content-Length: 10\r\n") + b"12345",
    "host not ASCII": _get(host=b"\xff\xfe"),
    "host for IDNA": _get(host="\u2100.com".encode()),
    "host of half an address": _get(host=b"[::1"),
    "path of bad escapes": _get(path=b"/%ff%00"),
    "TLS hello": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + _RANDOM.randbytes(200),
    "nothing but NUL": b"\0" * 1000,
    "nothing but lines": b"\r\n" * 5000,
}

WELL_FORMED = [
    _get(path=b"/health"),
    _post(b"Content-Length: 26\r\n", b'{"prompt":"a","stream":1 }'),
    _post(b"Content-Length: 13\r\n", b'{"prompt":""}') + _get(),
    _post(b"Transfer-Encoding: chunked\r\n", b'd\r\n{"prompt":"a"\r\n1\r\n}\r\n0\r\n\r\n'),
]


def mutations(seed: int) -> Iterator[bytes]:
    """Endless, different for each seed: pieces changed, taken out, put in, said twice."""
    choice = random.Random(seed)
    bases = [data[:3000] for data in (*MALFORMED.values(), *WELL_FORMED)]
    while True:
        data = bytearray(choice.choice(bases))
        for _ in range(choice.randint(1, 6)):
            if not data:
                break
            at = choice.randrange(len(data))
            match choice.randrange(5):
                case 0:
                    data[at] = choice.randrange(256)
                case 1:
                    del data[at : at + choice.randint(1, 8)]
                case 2:
                    data[at:at] = choice.randbytes(choice.randint(1, 8))
                case 3:
                    start = choice.randrange(len(data))
                    data[at:at] = data[start : start + choice.randint(1, 40)]
                case _:
                    data[at] = choice.choice(b"\r\n :;,/%?\0\xff")
        yield bytes(data)
