"""What a built package would hold, against the tree; and wheels that are built."""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest

import edgekv
from edgekv.kernels.cpu.build import SOURCES, library_name
from tests.kernels.cpu import compiler

REPOSITORY = Path(__file__).parents[2]
OBJECT = "decode_split-0123456789abcdef-0123456789abcdef.hsaco"


def project() -> dict[str, Any]:
    return tomllib.loads((REPOSITORY / "pyproject.toml").read_text())


def packages_under(folder: Path, name: str) -> set[str]:
    found = {name} if (folder / "__init__.py").is_file() else set()
    for inner in folder.iterdir():
        if inner.is_dir() and not inner.is_symlink():
            found |= packages_under(inner, f"{name}.{inner.name}")
    return found


def test_every_package_of_the_tree_is_in_the_wheel() -> None:
    tree = packages_under(REPOSITORY / "edgekv", "edgekv") | packages_under(REPOSITORY / "kernels", "edgekv.kernels")
    assert set(project()["tool"]["setuptools"]["packages"]) == tree


def test_the_kernels_are_found_with_and_without_the_link() -> None:
    assert project()["tool"]["setuptools"]["package-dir"]["edgekv.kernels"] == "kernels"
    assert (REPOSITORY / "edgekv" / "kernels").resolve() == REPOSITORY / "kernels"


def test_the_version_is_the_same_everywhere() -> None:
    version = project()["project"]["version"]
    assert edgekv.__version__ == version
    assert f"## {version}" in (REPOSITORY / "CHANGELOG.md").read_text()


def build_wheel(folder: Path, path: str) -> Path:
    """A wheel of a copy of the tree, made with the programs in `path`."""
    copy = folder / "copy"
    copy.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, copy)
    for name in ("edgekv", "kernels"):  # without the link from one to the other
        skip = shutil.ignore_patterns("__pycache__", "kernels", "prebuilt")
        shutil.copytree(REPOSITORY / name, copy / name, ignore=skip)
    prebuilt = copy / "kernels/prebuilt/gfx1100"  # as packaging/prebuild_kernels.py leaves it
    prebuilt.mkdir(parents=True)
    (prebuilt / OBJECT).write_bytes(b"code")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(copy)]
    environment = {name: value for name, value in os.environ.items() if name != "CXX"} | {"PATH": path}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = folder.glob("*.whl")
    return wheel


def headers(folder: Path) -> list[Path]:
    """What GPU kernels are compiled from, relative to the folder."""
    return [path.relative_to(folder) for path in folder.glob("*/*.h")]


def unpacked(wheel: Path, folder: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


needs_build = pytest.mark.skipif(
    importlib.util.find_spec("build") is None or importlib.util.find_spec("setuptools") is None,
    reason="building wheels needs `build` and `setuptools`",
)


@needs_build
@pytest.mark.slow
def test_a_wheel_holds_the_kernels_and_uses_them(tmp_path: Path) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    compiler.install(programs)
    wheel = build_wheel(tmp_path, str(programs))
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    assert wheel.name == f"edgekv-{edgekv.__version__}-py3-none-{platform}.whl"
    assert compiler.count_linked(programs) == 1
    installed = unpacked(wheel, tmp_path / "installed")
    assert not list(installed.glob("*.data"))  # nothing that an installer would have to move
    sources = {path.name for path in SOURCES.iterdir() if path.is_file()}
    assert sources <= {path.name for path in (installed / "edgekv/kernels/cpu/src").iterdir()}
    for name in headers(REPOSITORY / "kernels"):
        assert (installed / "edgekv/kernels" / name).is_file(), name
    assert (installed / "edgekv/kernels/prebuilt/gfx1100" / OBJECT).read_bytes() == b"code"

    ask = "from edgekv.kernels.cpu.library import load_library; print(load_library().path)"
    environment = {"PYTHONPATH": str(installed), "PATH": "", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    told = subprocess.run([sys.executable, "-c", ask], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert told.stdout.strip() == str(installed / "edgekv/kernels/cpu/prebuilt" / library_name()), told.stderr
    assert not (tmp_path / "cache").exists()


@needs_build
@pytest.mark.slow
def test_without_a_compiler_a_wheel_is_for_any_machine(tmp_path: Path) -> None:
    wheel = build_wheel(tmp_path, "")
    assert wheel.name == f"edgekv-{edgekv.__version__}-py3-none-any.whl"
    names = [name for name in zipfile.ZipFile(wheel).namelist() if "/prebuilt/" in name]
    assert names == [f"edgekv/kernels/prebuilt/gfx1100/{OBJECT}"], "code of cards runs on any machine"


@needs_build
@pytest.mark.slow
def test_a_compiler_that_fails_costs_the_kernels_and_not_the_wheel(tmp_path: Path) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    compiler.install(programs, compile="exit 1")
    assert build_wheel(tmp_path, str(programs)).name.endswith("-py3-none-any.whl")
