"""Metadata of all types is read as it was written, lazily and fast, and every accessor wants its type and range."""

import math
import time
import tracemalloc
from pathlib import Path

import gguf
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekv.errors import ModelError
from edgekv.formats import gguf_values
from edgekv.formats.gguf import GgufFile
from edgekv.formats.gguf_values import Metadata
from tests.unit.formats import gguf_image as image
from tests.unit.formats.gguf_image import Image, Key, value_of

INTEGERS = {image.U8: (0, 255), image.I8: (-128, 127), image.U16: (0, 65535), image.I16: (-32768, 32767)}
INTEGERS |= {
    kind: (0, (1 << bits) - 1) if kind in (image.U32, image.U64) else (-(1 << bits - 1), (1 << bits - 1) - 1)
    for kind, bits in ((image.U32, 32), (image.I32, 32), (image.U64, 64), (image.I64, 64))
}


def read(folder: Path, *keys: Key) -> Metadata:
    path = folder / "model.gguf"
    path.write_bytes(Image(keys).build())
    with GgufFile(path) as file:
        return file.metadata


def refusal(folder: Path, data: bytes) -> str:
    path = folder / "model.gguf"
    path.write_bytes(data)
    with pytest.raises(ModelError) as caught:
        GgufFile(path)
    return str(caught.value).removeprefix(f"{path}: ")


def number_of(kind: int) -> st.SearchStrategy[object]:
    if kind == image.BOOL:
        return st.booleans()
    if kind == image.STRING:
        return st.text(max_size=20)
    if kind in INTEGERS:
        return st.integers(*INTEGERS[kind])
    return st.floats(width=32 if kind == image.F32 else 64, allow_nan=False, allow_infinity=False)


def scalar() -> st.SearchStrategy[tuple[int, int, object]]:
    kinds = st.sampled_from([kind for kind in range(13) if kind != image.ARRAY])
    return kinds.flatmap(lambda kind: st.tuples(st.just(kind), st.just(image.U32), number_of(kind)))


def array() -> st.SearchStrategy[tuple[int, int, object]]:
    def of(kind: int) -> st.SearchStrategy[tuple[int, int, object]]:
        flat = st.lists(number_of(kind), max_size=8)
        nested = st.recursive(flat, lambda inner: st.lists(inner, min_size=1, max_size=3), max_leaves=4)
        return st.tuples(st.just(image.ARRAY), st.just(kind), nested.filter(lambda value: depth(value) <= 4))

    return st.sampled_from([kind for kind in range(13) if kind != image.ARRAY]).flatmap(of)


def depth(value: object) -> int:
    return 1 + max((depth(item) for item in value), default=0) if isinstance(value, list) else 0


@settings(max_examples=150, deadline=None)
@given(values=st.lists(scalar() | array(), max_size=6))
def test_values_of_all_types_are_read_back(
    tmp_path_factory: pytest.TempPathFactory, values: list[tuple[int, int, object]]
) -> None:
    keys = [Key(f"key.{index}", kind, value, element) for index, (kind, element, value) in enumerate(values)]
    metadata = read(tmp_path_factory.getbasetemp(), *keys)
    assert list(metadata) == [key.name for key in keys]
    assert len(metadata) == len(keys)
    flat = [len(key.value) if depth(key.value) > 1 else key.value for key in keys]  # type: ignore[arg-type]
    assert [value_of(metadata, key.name) for key in keys] == flat
    assert [metadata.is_array(key.name) for key in keys] == [key.kind == image.ARRAY for key in keys]


@pytest.fixture
def metadata(tmp_path: Path) -> Metadata:
    return read(
        tmp_path,
        Key("text", image.STRING, "ä"),
        Key("count", image.U16, 40),
        Key("rate", image.F32, 0.5),
        Key("nan", image.F64, math.nan),
        Key("on", image.BOOL, True),
        Key("texts", image.ARRAY, ["a", ""], image.STRING),
        Key("counts", image.ARRAY, [-1, 7], image.I8),
        Key("rates", image.ARRAY, [0.5, math.inf], image.F32),
        Key("flags", image.ARRAY, [True, False], image.BOOL),
        Key("bits", image.ARRAY, [0, 1], image.U8),
        Key("nothing", image.ARRAY, [], image.I8),
        Key("deep", image.ARRAY, [[1], [2]], image.U8),
    )


def test_each_accessor_reads_its_type(metadata: Metadata) -> None:
    assert metadata.text("text") == metadata.optional_text("text") == "ä"
    assert metadata.integer("count", 0, 40) == metadata.optional_integer("count", 40, 50) == 40
    assert metadata.number("rate", 0, 1) == metadata.optional_number("rate", 0.5, 0.5) == 0.5
    assert metadata.number("count", 0, 100) == 40.0
    assert isinstance(metadata.number("count", 0, 100), float)
    assert metadata.flag("on", False) is True
    assert metadata.texts("texts") == ["a", ""]
    assert metadata.integers("counts", -1, 7) == (-1, 7)
    assert metadata.integers("nothing", 0, 0) == ()
    assert metadata.numbers("rates") == (0.5, math.inf)
    assert metadata.flags("flags") == (True, False)
    assert metadata.flags("bits") == (False, True)


def test_a_value_is_one_of_several(metadata: Metadata) -> None:
    assert metadata.is_one_of("count", (1, 40))
    assert metadata.is_one_of("text", ("ä",))
    assert not metadata.is_one_of("count", (1, 41))
    assert not metadata.is_one_of("counts", ([-1, 7], (-1, 7)))
    assert metadata.shown("count") == "40"
    assert metadata.shown("text") == "'ä'"
    assert metadata.shown("counts") == "an array of 2 int8"


def test_what_is_absent(metadata: Metadata) -> None:
    assert "absent" not in metadata
    assert metadata.optional_text("absent") is None
    assert metadata.optional_integer("absent", 0, 1) is None
    assert metadata.optional_number("absent", 0, 1) is None
    assert metadata.flag("absent", True) is True
    assert metadata.flag("absent", False) is False
    assert not metadata.is_array("absent")
    assert metadata.field("absent") is None
    metadata.check_count("absent", 1, 1, "things")
    for wanted in (metadata.text, metadata.texts, metadata.numbers, metadata.flags, metadata.shown):
        with pytest.raises(ModelError, match=r"model\.gguf: key 'absent': is missing"):
            wanted("absent")


@pytest.mark.parametrize(
    ("accessor", "key", "message"),
    [
        ("text", "count", "key 'count' at byte 67: expected a string, found uint16"),
        ("integer", "text", "expected an integer, found string"),
        ("integer", "on", "expected an integer, found bool"),
        ("integer", "rate", "expected an integer, found float32"),
        ("integer", "counts", "expected an integer, found an array of 2 int8"),
        ("integer", "count", "expected an integer from 0 to 39, found 40"),
        ("number", "on", "expected a number, found bool"),
        ("number", "nan", "expected a number from 0 to 39, found nan"),
        ("number", "count", "expected a number from 0 to 39, found 40"),
        ("flag", "count", "expected true or false, found uint16"),
        ("texts", "text", "expected an array of strings, found string"),
        ("texts", "counts", "expected an array of strings, found an array of 2 int8"),
        ("integers", "count", "expected an array of integers, found uint16"),
        ("integers", "rates", "expected an array of integers, found an array of 2 float32"),
        ("integers", "deep", "expected an array of integers, found an array of 2 array"),
        ("integers", "counts", "expected integers from 0 to 39, found -1 to 7"),
        ("flags", "counts", "expected an array of true and false, found other numbers"),
        ("flags", "rates", "expected an array of true and false, found an array of 2 float32"),
        ("flags", "on", "expected an array of true and false, found bool"),
        ("numbers", "counts", "expected an array of floating-point numbers, found an array of 2 int8"),
    ],
)
def test_what_is_of_another_type_or_out_of_range(metadata: Metadata, accessor: str, key: str, message: str) -> None:
    bounds = {"integer": (0, 39), "number": (0, 39), "integers": (0, 39), "flag": (True,)}.get(accessor, ())
    with pytest.raises(ModelError) as caught:
        getattr(metadata, accessor)(key, *bounds)
    assert message in str(caught.value)


def test_text_that_is_not_utf8_matters_when_it_is_read(tmp_path: Path) -> None:
    found = read(tmp_path, Key("bad", image.STRING, b"a\xff"), Key("list", image.ARRAY, ["", b"\xff"], image.STRING))
    with pytest.raises(ModelError, match="key 'bad' at byte 39: the string that ends at byte 49 is not UTF-8"):
        found.text("bad")
    with pytest.raises(ModelError, match="key 'list' at byte 77: the string that ends at byte 94 is not UTF-8"):
        found.texts("list")


def test_arrays_have_as_many_elements_as_are_wanted(metadata: Metadata) -> None:
    metadata.check_count("counts", 2, 2, "things")
    metadata.check_count("counts", 1, 3, "things")
    metadata.check_count("count", 1, 3, "things")  # what is no array, its accessor refuses
    with pytest.raises(ModelError, match=r"key 'counts' at byte \d+: has 2 entries for 3 things"):
        metadata.check_count("counts", 3, 3, "things")
    with pytest.raises(ModelError, match=r"key 'counts' at byte \d+: 2 things, which must be 3 to 1,000"):
        metadata.check_count("counts", 3, 1000, "things")


def test_what_is_of_another_type_is_refused_unread(tmp_path: Path) -> None:
    """As objects, the array takes 16 times its bytes; written out, the string takes ten times its own."""
    count = 1 << 20
    path = tmp_path / "model.gguf"
    keys = [Key("x", image.ARRAY, [], image.U8), Key("text", image.STRING, "\x00" * 5 * count)]
    data = bytearray(Image(keys).build())
    at = data.index(b"x" + bytes([image.ARRAY])) + 9
    data[at : at + 8] = count.to_bytes(8, "little") + b"\xff" * count
    path.write_bytes(data)
    with GgufFile(path) as file:
        metadata = file.metadata
    tracemalloc.start()
    for refuse in (
        lambda: metadata.text("x"), lambda: metadata.integer("x", 0, 1), lambda: metadata.number("x", 0, 1),
        lambda: metadata.flag("x", False), lambda: metadata.numbers("x"), lambda: metadata.texts("x"),
        lambda: metadata.text("text"), lambda: metadata.shown("text"), lambda: metadata.is_one_of("text", (0,)),
    ):  # fmt: skip
        with pytest.raises(ModelError):
            refuse()
    assert metadata.shown("x") == f"an array of {count:,} uint8"
    assert not metadata.is_one_of("x", (0,))
    assert tracemalloc.get_traced_memory()[1] < count
    tracemalloc.stop()


def test_a_string_may_be_as_long_as_a_chat_template(tmp_path: Path) -> None:
    longest = "ä" * (gguf_values.MAX_TEXT_BYTES // 2)
    assert read(tmp_path, Key("text", image.STRING, longest)).text("text") == longest
    with pytest.raises(ModelError, match=r"a string of 4,194,305 bytes is over the limit of 4,194,304"):
        read(tmp_path, Key("text", image.STRING, longest + "a")).text("text")


def lie(key: Key, mark: str, nth: int, value: int) -> bytes:
    source = Image([key, Key("next", image.U8, 0)])
    data = bytearray(source.build())
    place = [found for found in source.marks if found.what == mark][nth]
    data[place.offset : place.offset + place.size] = value.to_bytes(place.size, "little")
    return bytes(data)


TEXTS = Key("list", image.ARRAY, ["a", "b"], image.STRING)
BYTES = Key("list", image.ARRAY, [1, 2], image.U8)
NESTED = Key("list", image.ARRAY, [[1], [2]], image.U8)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (lie(BYTES, "type", 0, 13), "key 'list' at byte 36: unknown value type 13: the file is damaged or newer"),
        (lie(BYTES, "type", 1, 13), "key 'list' at byte 40: unknown value type 13"),
        (lie(BYTES, "count", 2, 1 << 63), "an array of 9,223,372,036,854,775,808 takes at least 9,223,372,036,854,"),
        (lie(TEXTS, "count", 2, 6), "an array of 6 takes at least 48 bytes, but the file ends after 35: it is damaged"),
        (lie(TEXTS, "length", 1, 1 << 62), "takes 4,611,686,018,427,387,920 bytes, but the file ends after 35"),
        (lie(TEXTS, "length", 2, (1 << 64) - 1), "takes 18,446,744,073,709,551,632 bytes, but the file ends after"),
        (lie(TEXTS, "length", 0, 65536), "key 1 of 2 at byte 24: a name of 65,536 bytes, which must be 1 to 65,535"),
        (lie(TEXTS, "length", 0, 0), "key 1 of 2 at byte 24: a name of 0 bytes"),
        (lie(NESTED, "count", 3, 1 << 40), "an array of 1,099,511,627,776 takes at least 1,099,511,627,776 bytes"),
        (lie(NESTED, "type", 2, 8), "takes "),
        (Image([BYTES, BYTES]).build(), "key 'list' at byte 62: appears twice"),
        (
            Image([Key("a", image.ARRAY, [[[[[1]]]]], image.U8)]).build(),
            "key 'a' at byte 77: arrays nested more than 4",
        ),
    ],
    ids=lambda value: "" if isinstance(value, bytes) else None,
)
def test_a_value_that_lies(tmp_path: Path, data: bytes, message: str) -> None:
    assert message in refusal(tmp_path, data)


def test_metadata_of_no_sane_size_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(lie(BYTES, "count", 2, 1 << 36))
    with path.open("r+b") as file:
        file.truncate(1 << 37)  # sparse
    tracemalloc.start()
    with pytest.raises(ModelError, match="key 'list' at byte 52: takes 68,719,476,736 bytes, and metadata is over the"):
        GgufFile(path)
    assert tracemalloc.get_traced_memory()[1] < 4 << 20
    tracemalloc.stop()


def test_strings_of_no_sane_number_are_walked_over_no_further_than_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_values, "MAX_HEADER_BYTES", 1 << 16)
    path = tmp_path / "model.gguf"
    path.write_bytes(lie(Key("list", image.ARRAY, [], image.STRING), "count", 2, 1 << 30))
    with path.open("r+b") as file:
        file.truncate(1 << 37)
    start = time.monotonic()
    with pytest.raises(ModelError, match="and metadata is over the limit of 65,536 that no real file comes near"):
        GgufFile(path)
    assert time.monotonic() - start < 1


def test_arrays_in_arrays_are_few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_values, "MAX_ARRAYS", 3)
    assert read(tmp_path, Key("list", image.ARRAY, [[1], [2]], image.U8)).is_array("list")
    data = Image([Key("list", image.ARRAY, [[1], [2], [3]], image.U8)]).build()
    assert "or more than 3 of them" in refusal(tmp_path, data)


def test_a_large_header_is_read_on_as_it_is_needed_and_no_further(tmp_path: Path) -> None:
    words = ["x" * 1000] * 5000
    path = tmp_path / "model.gguf"
    keys = [Key("list", image.ARRAY, words, image.STRING), Key("last", image.U8, 9)]
    path.write_bytes(Image(keys).build() + bytes(8 << 20))
    with GgufFile(path) as file:
        assert file.metadata.texts("list") == words
        assert file.metadata.integer("last", 0, 9) == 9
        assert len(file.metadata._data) == path.stat().st_size - (8 << 20)


@pytest.mark.slow
def test_a_vocabulary_of_128k_is_walked_over_in_a_moment(tmp_path: Path) -> None:
    """The gguf package takes seconds and hundreds of megabytes for the same file."""
    path, count = tmp_path / "model.gguf", 1 << 17
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_token_list([f"token{index}" for index in range(count)])
    writer.add_token_merges([f"to ken{index}" for index in range(2 * count)])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    times_s = []
    for _ in range(3):
        start = time.perf_counter()
        with GgufFile(path) as file:
            assert len(file.metadata.texts("tokenizer.ggml.tokens")) == count
        times_s.append(time.perf_counter() - start)
    assert min(times_s) < 1
    tracemalloc.start()
    GgufFile(path).close()
    assert tracemalloc.get_traced_memory()[1] < 4 * path.stat().st_size
    tracemalloc.stop()
