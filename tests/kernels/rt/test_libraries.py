"""Where vendors' libraries are looked for."""

import re
import sys
from pathlib import Path

import pytest

from edgekv.kernels.rt import libraries
from edgekv.kernels.rt.libraries import find_libraries, library_folders, library_version

NAME = re.compile(r"libthing(-[0-9a-f]{8})?\.so(\.\d+)*")


@pytest.fixture(autouse=True)
def _only_what_the_test_makes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libraries, "_SYSTEM", ())
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.delenv("LD_LIBRARY_PATH", raising=False)


def make(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_text(name)
    return folder


def test_torchs_folders_come_first_then_wheels_then_named_then_the_systems(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch, system, named = (make(tmp_path / name) for name in ("torch", "system", "named"))
    site = tmp_path / "site-packages"
    wheels = [
        make(site / name)
        for name in ("nvidia/cuda_nvrtc/lib", "nvidia/cu13/lib", "torch/lib", "_rocm_sdk_core/lib", "numpy/lib")
    ]
    monkeypatch.setattr(libraries, "_SYSTEM", (str(system), str(tmp_path / "nothing")))
    monkeypatch.setattr(sys, "path", ["", "relative", str(tmp_path / "zip.zip"), str(site)])
    monkeypatch.setenv("LD_LIBRARY_PATH", f":relative:{named}:{torch}")
    assert library_folders([torch]) == [torch, wheels[0], wheels[1], wheels[2], wheels[3], named, system]


def test_what_is_started_elsewhere_looks_nowhere_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "nvidia" / "cuda_nvrtc" / "lib")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", "."])
    monkeypatch.setenv("LD_LIBRARY_PATH", ":nvidia/cuda_nvrtc/lib:")
    assert library_folders() == []


def test_the_newest_of_a_folder_comes_first(tmp_path: Path) -> None:
    names = ("libthing.so.9.2", "libthing.so.12", "libthing.so.12.10", "libthing.so.12.9", "libthing-0a1b2c3d.so.11")
    folder = make(tmp_path, *names, "libthing-builtins.so.99", "libthing.so.bak", "liblother.so.99")
    assert [path.name for path in find_libraries(NAME, [folder])] == [
        "libthing.so.12.10",
        "libthing.so.12.9",
        "libthing.so.12",
        "libthing-0a1b2c3d.so.11",
        "libthing.so.9.2",
    ]


def test_a_library_of_many_names_is_found_once_and_broken_links_not_at_all(tmp_path: Path) -> None:
    first, second = make(tmp_path / "first", "libthing.so.1.2.3"), make(tmp_path / "second")
    for link, target in (("libthing.so.1", "libthing.so.1.2.3"), ("libthing.so", "libthing.so.1")):
        (first / link).symlink_to(target)
    (second / "libthing.so.1").symlink_to(first / "libthing.so.1.2.3")
    (second / "libthing.so.7").symlink_to(first / "nowhere")
    (second / "libthing.so.8").symlink_to("libthing.so.8")
    assert find_libraries(NAME, [first, second, tmp_path / "nothing"]) == [first / "libthing.so.1.2.3"]


def test_what_this_process_has_loaded_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, other = make(tmp_path / "folder", "libthing.so.9"), make(tmp_path / "its own", "libthing.so.1")
    maps = tmp_path / "maps"
    maps.write_text(
        "7f00-7f01 r--p 00000000 08:01 1234                       /usr/lib/libc.so.6\n"
        f"7f01-7f02 r-xp 00000000 08:01 1235                       {other}/libthing.so.1\n"
        f"7f02-7f03 rw-p 00001000 08:01 1235                       {other}/libthing.so.1\n"
        "7f03-7f04 rw-p 00000000 00:00 0 \n"
        "7f04-7f05 rw-p 00000000 00:00 0                          [heap]\n"
        "7f05-7f06 r--p 00000000 08:01 1236                       /gone/libthing.so.2 (deleted)\n"
    )
    monkeypatch.setattr(libraries, "_LOADED", maps)
    assert find_libraries(NAME, [folder]) == [other / "libthing.so.1", folder / "libthing.so.9"]
    monkeypatch.setattr(libraries, "_LOADED", tmp_path / "nothing")
    assert find_libraries(NAME, [folder]) == [folder / "libthing.so.9"]


@pytest.mark.parametrize(
    ("name", "version"),
    [
        ("libthing.so", ()),
        ("libthing.so.12", (12,)),
        ("libthing.so.12.8.61", (12, 8, 61)),
        ("libthing-0123abcd.so.12", (12,)),
        ("libthing64.so.7", (7,)),
    ],
)
def test_the_version_in_a_name(name: str, version: tuple[int, ...]) -> None:
    assert library_version(Path("/x.so.3") / name) == version
