"""What a built package would hold, against the tree."""

import tomllib
from pathlib import Path
from typing import Any

import edgekv

REPOSITORY = Path(__file__).parents[2]


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
