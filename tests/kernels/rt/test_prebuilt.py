"""Objects that came with the package."""

from pathlib import Path

import pytest

from edgekv.kernels.rt.prebuilt import find_prebuilt, prebuilt_name, prebuilt_targets

SOURCE, KEY, CODE = "attn/decode_split.h", "0123456789abcdef" * 4, b"\x7fELF object"


def write(folder: Path, target: str, code: bytes = CODE, key: str = KEY, source: str = SOURCE) -> Path:
    path = folder / target / prebuilt_name(source, key, code)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(code)
    return path


def test_an_object_is_found_by_card_source_and_key(tmp_path: Path) -> None:
    path = write(tmp_path, "gfx1100")
    assert path.name.startswith("decode_split-0123456789abcdef-")
    assert find_prebuilt(tmp_path, "gfx1100", SOURCE, KEY) == CODE
    assert find_prebuilt(tmp_path, "gfx1101", SOURCE, KEY) is None
    assert find_prebuilt(tmp_path, "gfx1100", "attn/kv_append.h", KEY) is None
    assert find_prebuilt(tmp_path, "gfx1100", SOURCE, "f" * 64) is None


def test_a_familys_object_stands_in_for_a_cards_own(tmp_path: Path) -> None:
    write(tmp_path, "gfx11-generic", b"for the family")
    assert find_prebuilt(tmp_path, "gfx1103", SOURCE, KEY) == b"for the family"
    write(tmp_path, "gfx1103")
    assert find_prebuilt(tmp_path, "gfx1103", SOURCE, KEY) == CODE


@pytest.mark.parametrize(
    ("target", "family"),
    [
        ("gfx1030", "gfx10-3-generic"),
        ("gfx1036", "gfx10-3-generic"),
        ("gfx1100", "gfx11-generic"),
        ("gfx1151", "gfx11-generic"),
        ("gfx1201", "gfx12-generic"),
    ],
)
def test_families(target: str, family: str) -> None:
    assert prebuilt_targets(target) == (target, family)


@pytest.mark.parametrize("target", ["gfx1010", "gfx906", "gfx1250", "gfx1170", "sm_89", "gfx12000"])
def test_other_cards_have_no_family(target: str) -> None:
    assert prebuilt_targets(target) == (target,)


def test_a_damaged_object_is_not_there(tmp_path: Path) -> None:
    path = write(tmp_path, "gfx1100")
    path.write_bytes(CODE[:-1])
    assert find_prebuilt(tmp_path, "gfx1100", SOURCE, KEY) is None
    path.rename(path.with_name(path.name[:-10] + ".hsaco"))
    assert find_prebuilt(tmp_path, "gfx1100", SOURCE, KEY) is None


def test_without_the_folder_there_is_none(tmp_path: Path) -> None:
    assert find_prebuilt(tmp_path / "nothing", "gfx1100", SOURCE, KEY) is None
