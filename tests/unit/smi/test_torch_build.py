"""What the installed torch was built for, read from its files."""

import importlib.machinery
import importlib.util
from pathlib import Path

import pytest

from edgekv.smi.torch_build import built_for, read_torch_build

VERSION = "from typing import Optional\n__version__ = '{}'\ncuda: Optional[str] = {!r}\nhip: Optional[str] = {!r}\n"
NOISE = b"\x7fELF\x00\x01libsm_6.so\x00cosm_90\x00sm_ \x00 gfx1010 is not supported\x00gfx\x00sm_80 "


def library(folder: Path, *strings: bytes) -> Path:
    path = folder / "libtorch_python.so"
    path.write_bytes(NOISE + b"\x00" + b"\x00".join(strings) + b"\x00\x02\x03")
    return path


@pytest.mark.parametrize(
    "told",
    [
        "sm_50 sm_60 sm_70 sm_75 sm_80 sm_86 sm_90",
        "sm_75 sm_80 sm_86 sm_90a sm_120f compute_120",
        "gfx900 gfx90a:xnack- gfx1030 gfx1151",
        "gfx11-generic gfx10-3-generic",
        "sm_89",
    ],
)
def test_the_list_of_targets_is_found_in_torchs_library(told: str, tmp_path: Path) -> None:
    path = library(tmp_path, b"torch.cuda", told.encode(), b"sm_80 is old")
    assert " ".join(built_for(path)) == told
    is_list = " " in told
    (tmp_path / "other").mkdir()
    other = library(tmp_path / "other", b"gfx942", told.encode(), b"sm_52")
    assert built_for(other) == (tuple(told.split()) if is_list else ()), "a name alone may be there for any reason"


def test_a_library_that_does_not_tell_says_nothing(tmp_path: Path) -> None:
    assert built_for(library(tmp_path)) == ()
    assert built_for(tmp_path / "none.so") == ()
    (tmp_path / "empty.so").write_bytes(b"")
    assert built_for(tmp_path / "empty.so") == ()


@pytest.mark.parametrize(
    ("version", "cuda", "hip", "targets"),
    [
        ("2.13.0+cu130", "13.0", None, ("sm_75", "compute_120")),
        ("2.13.0+rocm7.2", None, "7.2.53211", ("sm_75", "compute_120")),
        ("2.13.0+cpu", None, None, ()),
    ],
)
def test_a_build_is_read_without_importing_it(
    version: str, cuda: str | None, hip: str | None, targets: tuple[str, ...], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    (tmp_path / "lib").mkdir()
    library(tmp_path / "lib", b"sm_75 compute_120")
    (tmp_path / "version.py").write_text(VERSION.format(version, cuda, hip))
    found = importlib.machinery.ModuleSpec("torch", None, origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)
    build = read_torch_build()
    assert build is not None
    assert (build.version, build.cuda, build.hip) == (version, cuda, hip)
    assert (build.targets, build.libraries) == (targets, tmp_path / "lib")
    (tmp_path / "version.py").unlink()
    assert read_torch_build() is None
