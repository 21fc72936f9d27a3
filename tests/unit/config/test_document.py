"""YAML text to data with positions: the scalars that surprise nobody, and what is refused."""

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from edgekv.config.document import MAX_BYTES, Place, dotted, parse_document, parse_scalar


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("no", "no"), ("on", "on"), ("yes", "yes"), ("true", True), ("False", False), ("null", None), ("~", None),
        ("010", 10), ("0o17", 15), ("0x1f", 31), ("1_000", "1_000"), ("-3", -3), ("1:30", "1:30"), ("1.5", 1.5),
        ("1e3", 1000.0), ("2024-01-01", "2024-01-01"), (".5", 0.5), (".", "."), ("", None),
        ("9" * 40, "9" * 40),
    ],
)  # fmt: skip
def test_plain_scalars_follow_yaml_1_2(text: str, value: object) -> None:
    assert parse_scalar(text) == value
    assert type(parse_scalar(text)) is type(value)


def test_quoted_scalars_are_text() -> None:
    assert parse_document("a: 'true'\nb: \"12\"\n", "f").data == {"a": "true", "b": "12"}


def test_every_key_and_value_knows_its_place() -> None:
    document = parse_document("a:\n  b: 1\n  c: [x, {d: y}]\n", "f.yaml")
    assert document.keys["a", "b"] == Place("f.yaml", 2, 3)
    assert document.values["a", "b"] == Place("f.yaml", 2, 6)
    assert document.values["a", "c", 0] == Place("f.yaml", 3, 7)
    assert document.keys["a", "c", 1, "d"] == Place("f.yaml", 3, 11)
    assert str(document.place_of(("a", "c", 1, "absent"))) == "f.yaml:3:10"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: 1\na: 2\n", "f:2:1: error: a: duplicate key: first given on line 1"),
        ("a: &x 1\n", "f:1:4: error: anchors"),
        ("a: *x\n", "f:1:4: error: aliases"),
        ("a: !!python/object:os.system 1\n", "f:1:4: error: tags"),
        ("<<: {a: 1}\n", "f:1:1: error: merge keys"),
        ("a: 1\n---\nb: 2\n", "f:2:1: error: more than one document"),
        ("[1, 2]\n", "f:1:1: error: expected 'name: value' pairs"),
        ("{[1]: 2}\n", "f:1:2: error: a key must be plain text"),
        ("a: [1\n", "f:2:1: error: not valid YAML"),
        ("a: \x01\n", "f: error: not valid YAML"),
        ("a: " + "[" * 40 + "]" * 40, "f:1:35: error: nested more than 32 deep"),
        ("a: " + "x" * MAX_BYTES, "f: error: larger than 256 KiB"),
    ],
)
def test_what_a_configuration_does_not_need_is_refused_in_its_place(text: str, expected: str) -> None:
    faults = [str(fault) for fault in parse_document(text, "f").faults]
    assert len(faults) == 1
    assert faults[0].startswith(expected)


def test_an_alias_bomb_is_refused_before_it_grows() -> None:
    levels = "".join(f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(9))
    document = parse_document("a: &a [x]\n" + levels, "f")
    assert "anchors" in str(document.faults[0])


def test_an_empty_file_is_an_empty_document() -> None:
    for text in ("", "# nothing\n", "---\n"):
        document = parse_document(text, "f")
        assert (document.data, document.faults) == ({}, [])


def test_names_with_dots_are_quoted_in_messages() -> None:
    assert dotted(("models", "qwen2.5", "aliases", 0)) == 'models."qwen2.5".aliases[0]'


plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.text(st.characters(codec="utf-8"), max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abc", min_size=1), inner, max_size=3),
    max_leaves=12,
)


@given(st.dictionaries(st.text("abcdef", min_size=1, max_size=5), plain, max_size=4), st.booleans())
def test_what_yaml_writes_is_read_back(data: dict[str, object], flow: bool) -> None:
    class Plain(yaml.SafeDumper):
        def ignore_aliases(self, data: object) -> bool:
            return True

    document = parse_document(yaml.dump(data, Dumper=Plain, default_flow_style=flow), "f")
    assert document.faults == []
    assert document.data == data


@given(st.text(max_size=200))
def test_no_text_raises(text: str) -> None:
    parse_document(text, "f")
