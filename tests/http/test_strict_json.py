"""Strict means: what is accepted is what Python's parser makes of it, and what it should not have taken is refused."""

import contextlib
import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekv.http.strict_json import StrictJsonError, parse

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(TEXT, inner, max_size=5),
    max_leaves=20,
)


@settings(deadline=None)
@given(value=VALUES, ascii_only=st.booleans())
def test_all_that_json_can_say_is_taken(value, ascii_only):
    assert parse(json.dumps(value, ensure_ascii=ascii_only).encode()) == value


@settings(deadline=None)
@given(st.binary(max_size=60) | st.text(alphabet='{}[]",:0123456789.eE+-\\ud8aNIfty ', max_size=60).map(str.encode))
def test_anything_else_is_refused_not_raised(data):
    try:
        value = parse(data)
    except StrictJsonError:
        return
    assert json.loads(json.dumps(value, allow_nan=False)) == value


@pytest.mark.parametrize("body", [
    b'{"a":1,"a":1}', b"[NaN]", b"[-Infinity]", b"[1e400]", b"[-1e400]", b"[9223372036854775808]", b'["\\ud83d"]',
    b'{"\\ud83d": 1}', b'["\xed\xa0\x80"]', b"[01]", b"[1,]", b"[1] 2", b"'a'", b"\x00", b'"\n"', b"[" * 33 + b"]" * 33,
])  # fmt: skip
def test_refused(body):
    with pytest.raises(StrictJsonError):
        parse(body)


@pytest.mark.parametrize(("body", "value"), [
    (b'["\\ud83d\\ude00"]', ["😀"]), (b"[0.1234567890123456789012345]", [0.12345678901234568]), (b"[1e-400]", [0.0]),
    (b'["12345678901234567890"]', ["12345678901234567890"]), (b"[12345678901234567890.0]", [1.2345678901234567e19]),
    (b'["[[[[{{{{"]', ["[[[[{{{{"]), (b'["\\"[NaN]"]', ['"[NaN]']),
    (b"[-9223372036854775808]", [-(2**63)]), (b"[" * 32 + b"]" * 32, json.loads("[" * 32 + "]" * 32)),
])  # fmt: skip
def test_taken(body, value):
    assert parse(body) == value


@pytest.mark.parametrize("body", [
    b"[" * 2_000_000, b'{"a":' * 400_000, b"[" + b"[]," * 500_000, b'"' + b"\\" * 2_000_001, b"[" + b"9" * 2_000_000,
    b"[" + b"1," * 1_000_000 + b"1]", b'["' + b"\\u0041" * 300_000 + b'"]', b"[" + b"1e9," * 500_000 + b"1]",
])  # fmt: skip
def test_the_work_is_bounded_by_the_size(body):
    began = time.process_time()
    with contextlib.suppress(StrictJsonError):
        parse(body)
    assert time.process_time() - began < 1
